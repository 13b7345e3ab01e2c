"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

SettingsFile = Annotated[
    Path | None,
    typer.Option(
        "--settings",
        help="The settings file (TOML). [default: what CHANDLERY_SETTINGS names]",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs: JSON, and nothing else.")]
DataDir = Annotated[Path | None, typer.Option(help="Where everything is kept.", show_default=False)]
