"""Nix package sets made of literals, whose packages are built by the bash of this machine."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from chandlery.nix.nix import Nix, Resolution
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.documents import Platform

SYSTEM = Platform.of_host().nix_system

# On CI it has to be there, so nothing is passed over.
requires_nix = pytest.mark.skipif(
    shutil.which("nix") is None and "CI" not in os.environ, reason="not installed: nix"
)

_SET = """
let
  build = name: script: derivation {
    inherit name;
    system = builtins.currentSystem;
    builder = "/bin/bash";
    # Nix kills a builder that closes its output, as `id` does just before it exits; so bash ends last.
    args = [ "-euc" "PATH=/bin; ${script}\nexit" ];
    # The bash of this machine is not in the sandbox of a derivation that doesn't ask for it.
    __impureHostDeps = hostPaths;
  };
  hostPaths = [ "/bin" "/usr" "/lib" ] ++ (if builtins.currentSystem == "x86_64-linux" then [ "/lib64" ]
    else [ ]);
in rec { %s }
"""


def source_of(folder: Path, expression: str) -> PinnedSource:
    """Write a package set; its revision is its content's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "default.nix").write_text(expression)
    revision = hashlib.sha256(expression.encode()).hexdigest()
    return PinnedSource("path", str(folder), revision, nix={"tree": str(folder)})


def packages(folder: Path, attributes: str) -> PinnedSource:
    """Write a package set with `build NAME SCRIPT` to make its packages."""
    return source_of(folder, _SET % attributes)


async def resolve(nix: Nix, source: PinnedSource, attribute_path: str) -> Resolution:
    """Return what one attribute path gives."""
    return (await nix.resolve(source, SYSTEM, [attribute_path]))[attribute_path]


NIXPKGS_SHAPE = Path(__file__).parent / "nixpkgs_shape"


def nixpkgs_shape(overlays: Sequence[Path] = (), **config: object) -> PinnedSource:
    """Return a package set that is called as nixpkgs is, with packages that are refused or do harm."""
    nix = {"tree": str(NIXPKGS_SHAPE), "config": config, "overlays": [str(path) for path in overlays]}
    return PinnedSource("nixpkgs", "nixos-unstable", "2" * 40, nix=nix)
