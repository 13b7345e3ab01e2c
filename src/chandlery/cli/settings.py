"""`chandlery config` and `chandlery doctor`: which settings are in force, and whether they would work."""

import asyncio
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import msgspec
import structlog
import typer

from chandlery.cli.options import AsJson, DataDir, SettingsFile
from chandlery.doctor.checks import machine_checks, scratch_folder
from chandlery.doctor.examination import Check, Finding, Outcome, Status, examine
from chandlery.errors import SettingsError
from chandlery.settings.settings import SettingInForce, Settings
from chandlery.settings.values import dotted, shown, toml

# Columns at which the comments of `config` begin; beside a longer value they begin after it.
_COLUMN = 44
_NAME_WIDTH = 12

# What stands in the file of `config --example` for settings that are tables.
_EXAMPLES = {
    "storage_options": """\
[storage_options]
endpoint = "https://minio.example.com"
region = "us-east-1"
""",
    "sources": """\
[sources.unstable]
from = "nixpkgs!nixos-unstable"
config = { allowUnfree = true }

[sources.ours]
from = "git!https://git.example.com/packages.git"
tags = ["release-*"]
""",
    "profiles": """\
[profiles.web]
packages = ["nginx", "curl"]
user = "nonroot"
command = ["nginx", "-g", "daemon off;"]
environment = { TZ = "UTC" }
exposed_ports = ["8080/tcp"]
""",
    "access": """\
[access.default]
deny = ["nmap*"]
builds_per_hour = 20

[access.users.alice]
builds_per_hour = 0
""",
}


def config(
    example: Annotated[
        bool,
        typer.Option("--example", help="Print a settings file to start from: every default, commented out."),
    ] = False,
    as_json: AsJson = False,
    host: Annotated[str | None, typer.Option(help="As of serve.", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="As of serve.", show_default=False)] = None,
    source: Annotated[str | None, typer.Option(help="As of serve.", show_default=False)] = None,
    data_dir: DataDir = None,
    settings_file: SettingsFile = None,
) -> None:
    """Print every setting that is in force, and where it is from; what is secret is not shown.

    The names are those of the settings file, and so are the lines: they can be copied to one.
    """
    if example:
        typer.echo("\n".join(_example()))
        return
    settings = Settings.load(settings_file, host=host, port=port, source=source, data_dir=data_dir)
    if as_json:
        typer.echo(json.dumps({dotted(each.path): _for_programs(each) for each in settings.in_force()}))
        return
    for each in settings.in_force():
        typer.echo(_line(each))
    for notice in settings.notices:
        typer.echo(f"# {notice}")


def doctor(data_dir: DataDir = None, as_json: AsJson = False, settings_file: SettingsFile = None) -> None:
    """Check that a server could work here with these settings, and say what to mend.

    Nothing is changed, and a server may run meanwhile. Exits with 1 if something keeps a server from working,
    and with 0 if nothing does, or there are warnings only.
    """
    # As Ctrl-C: what was made for the checks is removed on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # What the parts log is about a server's work; what matters here is in the findings.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))
    tell: Callable[[Finding], object] = (lambda _: None) if as_json else _tell
    try:
        settings = Settings.load(settings_file, data_dir=data_dir)
    except SettingsError as error:
        findings = [Finding("settings", Outcome(str(error), Status.FAILURE), 0.0)]
        tell(findings[0])
    else:
        findings = asyncio.run(_examine(settings, tell))
    count = {status: sum(each.outcome.status == status for each in findings) for status in Status}
    if as_json:
        typer.echo(msgspec.json.encode({"ok": not count[Status.FAILURE], "checks": findings}))
    else:
        counts = (_counted(count[status], status) for status in (Status.WARNING, Status.FAILURE))
        typer.echo(f"\n{count[Status.OK]} of {len(findings)} checks passed, {', '.join(counts)}")
    if count[Status.FAILURE]:
        raise typer.Exit(1)


async def _examine(settings: Settings, tell: Callable[[Finding], object]) -> list[Finding]:
    findings = []
    with scratch_folder(settings.data_dir) as scratch:
        checks: list[Check] = machine_checks(settings, scratch)
        async for finding in examine(checks):
            tell(finding)
            findings.append(finding)
    return findings


_COLORS = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILURE: "red"}


def _tell(finding: Finding) -> None:
    outcome = finding.outcome
    status = typer.style(f"{outcome.status:<8}", fg=_COLORS[outcome.status])
    seconds = f" ({finding.seconds:.1f} s)" if finding.seconds >= 0.05 else ""
    typer.echo(f"{status} {finding.check:<{_NAME_WIDTH}} {outcome.text}{seconds}")
    if outcome.remedy:
        typer.echo(f"{'':<8} {'':<{_NAME_WIDTH}} to mend it: {outcome.remedy}")


def _counted(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def _line(setting: SettingInForce) -> str:
    name, value = dotted(setting.path), shown(setting.path, setting.value)
    said = f"# {name} is not set" if value is None else f"{name} = {toml(value)}"
    return f"{said:<{_COLUMN}}  # {setting.origin}"


def _for_programs(setting: SettingInForce) -> Mapping[str, Any]:
    return {
        "value": shown(setting.path, setting.value),
        "from": setting.origin.kind,
        "name": setting.origin.name,
    }


def _example() -> Iterator[str]:
    """Yield the lines of a settings file; tables come last, as TOML wants it."""
    defaults = Settings.defaults()
    yield "# The settings of chandlery. Each line that begins with # and a name is a default, or an example."
    for name, field in Settings.model_fields.items():
        if name not in _EXAMPLES:
            value = defaults[name]
            yield ""
            yield f"# {field.description}"
            yield f"# {name} is not set" if value is None else f"#{name} = {toml(value)}"
    for name, example in _EXAMPLES.items():
        yield ""
        yield f"# {Settings.model_fields[name].description}"
        yield from (f"#{line}" for line in example.splitlines())
