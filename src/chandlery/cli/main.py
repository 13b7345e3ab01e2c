"""The `chandlery` command."""

import sys
from typing import Annotated, NoReturn

import typer

from chandlery import __version__
from chandlery.cli.build import build
from chandlery.cli.demo import demo
from chandlery.cli.maintenance import collect, scrub, status
from chandlery.cli.plan import plan, popularity
from chandlery.cli.serve import serve
from chandlery.cli.settings import config, doctor
from chandlery.errors import ChandleryError

app = typer.Typer(
    name="chandlery",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="A container registry whose images are built from Nix packages the moment they are pulled.\n\n"
    "Every option can be set by an environment variable, CHANDLERY_ and the option's name in capitals, or in "
    "the TOML file that --settings or CHANDLERY_SETTINGS names. `chandlery config` prints them all.",
)


def main() -> None:
    """Run the command; what went wrong is told in one line on stderr, with exit code 1."""
    try:
        app()
    except ChandleryError as error:
        _fail(str(error))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


# In the order in which `chandlery --help` lists them.
for command in (serve, build, scrub, collect, status, plan, popularity, config, doctor, demo):
    app.command()(command)


def _fail(message: str) -> NoReturn:
    typer.echo(f"chandlery: {message}", err=True)
    sys.exit(1)
