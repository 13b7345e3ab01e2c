"""Nix package sets made of literals, whose packages are built by the bash of this machine."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from chandlery.nix import Nix, Resolution
from chandlery.oci import Platform
from chandlery.package_source import PinnedSource

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
    args = [ "-euc" "PATH=/bin; ${script}" ];
  };
in rec { %s }
"""


def source_of(folder: Path, expression: str) -> PinnedSource:
    """Write a package set; its revision is its content's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "default.nix").write_text(expression)
    return PinnedSource("path", str(folder), hashlib.sha256(expression.encode()).hexdigest())


def packages(folder: Path, attributes: str) -> PinnedSource:
    """Write a package set with `build NAME SCRIPT` to make its packages."""
    return source_of(folder, _SET % attributes)


async def resolve(nix: Nix, source: PinnedSource, attribute_path: str) -> Resolution:
    """Give what one attribute path gives."""
    return (await nix.resolve(source, SYSTEM, [attribute_path]))[attribute_path]
