"""`chandlery scrub` and `chandlery collect`: a data folder put in order by hand, beside a server too."""

import asyncio
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from chandlery import logs
from chandlery.app import image_builder, open_parts
from chandlery.command_options import DataDir, SettingsFile
from chandlery.garbage_collector import Collected, DiskLimits, GarbageCollector
from chandlery.repaired_blobs import RepairedBlobs
from chandlery.scrub import Finding, Scrub
from chandlery.settings import Settings

Source = Annotated[
    str | None, typer.Option(help="The package set that images can be made of.", show_default=False)
]


def scrub(
    repair: Annotated[bool, typer.Option(help="Make again what is damaged or missing.")] = True,
    data_dir: DataDir = None,
    source: Source = None,
    settings_file: SettingsFile = None,
) -> None:
    """Check the digest of every blob and the blobs of every image, and repair what can be.

    Prints what was wrong, and exits with 1 if something is wrong still.
    """
    settings = Settings.load(settings_file, data_dir=data_dir, source=source)
    logs.configure(settings.log_format)
    if not asyncio.run(_scrub(settings, repair=repair)):
        raise typer.Exit(1)


def collect(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
    disk_limit: Annotated[
        int | None,
        typer.Option(
            min=0, help="Bytes that blobs and Nix's own store may take; 0: no limit.", show_default=False
        ),
    ] = None,
    data_dir: DataDir = None,
    source: Source = None,
    settings_file: SettingsFile = None,
) -> None:
    """Collect garbage once, as a server does all the time: down to the disk limit, and no further."""
    settings = Settings.load(settings_file, data_dir=data_dir, source=source, disk_limit=disk_limit)
    logs.configure(settings.log_format)
    _print_collected(asyncio.run(_collect(settings, dry_run=dry_run)), dry_run=dry_run)


async def _scrub(settings: Settings, *, repair: bool) -> bool:
    """Scrub, print what was found, and tell whether everything is well now."""
    async with (
        open_parts(settings) as parts,
        image_builder(settings, parts) as builder,
        parts.leases.lease() as lease,
    ):
        repaired = RepairedBlobs(parts.blobs, parts.index, builder, lease, hold=None)
        checks = Scrub(parts.blobs, parts.index, repaired)
        findings = [finding async for finding in checks.findings(repair=repair)]
    unrepaired = [finding for finding in findings if finding.error]
    if findings:
        _print_findings(findings)
    typer.echo(
        f"{checks.blobs} blobs with {checks.bytes / 1e6:,.1f} MB checked: "
        f"{len(findings)} damaged or missing, {len(findings) - len(unrepaired)} repaired"
    )
    return not unrepaired


async def _collect(settings: Settings, *, dry_run: bool) -> Collected:
    async with open_parts(settings) as parts:
        limits = DiskLimits(settings.disk_limit, settings.gc_grace)
        collector = GarbageCollector(parts.blobs, parts.index, parts.leases, parts.nix, limits)
        return await collector.collect(dry_run=dry_run)


def _print_findings(findings: list[Finding]) -> None:
    table = Table("Blob", "Problem", "Image", "Outcome", box=None, pad_edge=False)
    for finding in findings:
        outcome = finding.error or ("made again" if finding.image else "removed: no image needs it")
        table.add_row(f"sha256:{finding.digest.hex[:12]}", finding.problem, finding.image, outcome)
    Console().print(table)


def _print_collected(collected: Collected, *, dry_run: bool) -> None:
    if collected.images:
        table = Table("Image", "Last used", box=None, pad_edge=False)
        for image in collected.images:
            used = datetime.fromtimestamp(image.last_used, UTC)
            table.add_row(image.name, f"{used:%Y-%m-%d %H:%M} UTC")
        Console().print(table)
    freed = "would be freed" if dry_run else "freed"
    typer.echo(
        f"{len(collected.images)} images, and {collected.orphans} blobs that none needs\n"
        f"blobs: {collected.blobs / 1e6:,.1f} MB, of which {collected.freed_blobs / 1e6:,.1f} MB {freed}\n"
        f"Nix store: {collected.nix / 1e6:,.1f} MB, of which {collected.freed_nix / 1e6:,.1f} MB {freed}\n"
        + (
            f"limit: {collected.limit / 1e6:,.1f} MB"
            if collected.limit
            else "limit: none, so nothing has to go"
        )
    )
