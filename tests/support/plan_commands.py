"""The commands `plan` and `popularity`, run in this process."""

from pathlib import Path

import typer
from typer.testing import CliRunner

from chandlery.cli import plan as plan_commands

APP, LIB, DATA = (
    f"/nix/store/{str(number) * 32}-{name}" for number, name in enumerate(["app-1", "lib-2", "data-3"])
)
CLOSURE = [
    {"path": APP, "narSize": 3_000_000, "references": [LIB, DATA]},
    {"path": LIB, "narSize": 5_000_000, "references": []},
    {"path": DATA, "narSize": 100_000, "references": []},
]
cli = typer.Typer(pretty_exceptions_enable=False)
cli.command()(plan_commands.plan)
cli.command()(plan_commands.popularity)


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(cli, list(map(str, arguments)), env={"COLUMNS": "200"})
    if result.exception:
        raise result.exception
    return result.stdout
