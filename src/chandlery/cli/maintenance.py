"""`chandlery scrub`, `collect`, `status`: a data folder put in order or looked at, beside a server too."""

import asyncio
import shutil
from datetime import UTC, datetime
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from chandlery.cli.options import AsJson, DataDir, SettingsFile
from chandlery.errors import SettingsError
from chandlery.maintenance.garbage_collector import Collected, DiskLimits, GarbageCollector
from chandlery.maintenance.repaired_blobs import RepairedBlobs
from chandlery.maintenance.scrub import Finding, Scrub
from chandlery.maintenance.status import DataFolderStatus, examine
from chandlery.server.parts import open_images, open_parts
from chandlery.settings.settings import Settings
from chandlery.telemetry import logs

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


def status(as_json: AsJson = False, data_dir: DataDir = None, settings_file: SettingsFile = None) -> None:
    """Tell what the data folder holds and what that takes on the disk.

    Nothing is changed, and a server may run meanwhile.
    """
    settings = Settings.load(settings_file, data_dir=data_dir)
    folder = settings.data_dir
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"data_dir: {folder} is no folder")
    found = examine(folder) if folder.exists() else None
    if as_json:
        typer.echo(msgspec.json.encode(_as_json(settings, found)))
    elif found is None:
        typer.echo(f"there is no data folder {folder} yet: a server makes it, or the first build")
    else:
        _print_status(settings, found)


async def _scrub(settings: Settings, *, repair: bool) -> bool:
    """Scrub, print what was found, and tell whether everything is well now."""
    async with (
        open_parts(settings) as parts,
        open_images(settings, parts) as images,
        parts.stores.leases.lease() as lease,
    ):
        repaired = RepairedBlobs(parts.stores, images, lease)
        checks = Scrub(parts.stores, repaired)
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
        collector = GarbageCollector(parts.stores, limits)
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


def _as_json(settings: Settings, found: DataFolderStatus | None) -> dict[str, object]:
    """Return `--json`: sizes in bytes, and little of a folder that isn't there."""
    told: dict[str, object] = {
        "data_dir": str(settings.data_dir),
        "exists": found is not None,
        "storage": settings.storage or None,
        "disk_limit": settings.disk_limit or None,
    }
    if found is not None:
        told |= {"total": found.bytes, "free": _free(settings), **msgspec.structs.asdict(found)}
    return told


def _print_status(settings: Settings, found: DataFolderStatus) -> None:
    typer.echo(f"{settings.data_dir}, {'in use by a server' if found.server_runs else 'no server runs'}\n")
    table = Table("Part", "On the disk", "Number", "", box=None, pad_edge=False)
    for column in table.columns[1:3]:
        column.justify = "right"
    for part in found.parts:
        table.add_row(part.name, _megabytes(part.bytes), f"{part.number:,}", part.what)
    table.add_row("total", _megabytes(found.bytes))
    Console().print(table)
    counts = found.counts
    if counts:
        typer.echo(f"\nimages: {counts.images:,}, with {counts.layers:,} layers of store paths")
    else:
        typer.echo("\nimages: not counted, since the build index can't be read")
    if settings.storage:
        needed = f"; images need {counts.blobs:,} with {_megabytes(counts.blob_bytes)}" if counts else ""
        typer.echo(f"blobs: in {settings.storage}, not counted{needed}")
    if settings.nix_store == "machine":
        typer.echo("Nix store: this machine's, not counted")
    for twice in found.twice:
        typer.echo(f"kept twice: {twice.why}: {twice.number:,} with {_megabytes(twice.bytes)}")
    if not found.twice:
        typer.echo("kept twice: nothing")
    if found.unreadable:
        typer.echo(f"not counted: {found.unreadable:,} files that this user can't read")
    limited = sum(found.part(name).bytes for name in ("blobs", "Nix store"))
    limit = f"{_megabytes(limited)} of {_megabytes(settings.disk_limit)}" if settings.disk_limit else "none"
    typer.echo(f"disk limit: {limit}; free on the disk: {_megabytes(_free(settings))}")


def _free(settings: Settings) -> int:
    return shutil.disk_usage(settings.data_dir).free


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
