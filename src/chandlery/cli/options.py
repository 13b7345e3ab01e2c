"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from chandlery.layers.compression import COMPRESSIONS

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
Source = Annotated[
    str | None,
    typer.Option(
        help="The package set, such as nixpkgs!nixos-unstable, git!URL!BRANCH or path!FOLDER; "
        "or the name of one in the settings file. [default: debian!trixie]",
        show_default=False,
    ),
]
MaxLayers = Annotated[
    int | None,
    typer.Option(help="Layers per image, the root filesystem's included. [default: 96]", show_default=False),
]
Compression = Annotated[
    str | None,
    typer.Option(help=f"Of layers: {', '.join(COMPRESSIONS)}. [default: gzip]", show_default=False),
]
