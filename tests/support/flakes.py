"""Flakes that tests make."""

import os
import subprocess
from pathlib import Path


def lock(folder: Path) -> None:
    environment = {**os.environ, "NIX_CONFIG": "experimental-features = nix-command flakes\n"}
    command = ["nix", "flake", "lock", "--store", str(folder.parent / "locking"), str(folder)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
