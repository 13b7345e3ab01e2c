"""What clients have written: OCI layouts, and programs in them."""

import json
from collections.abc import Iterator
from pathlib import Path

# elf(5), e_machine
ELF_AARCH64 = 183


def machine_of(program: Path) -> int:
    """Return the machine that an ELF file is for (elf(5), e_machine; 64 bits, little-endian)."""
    return int.from_bytes(program.read_bytes()[18:20], "little")


def blobs_of(layout: Path) -> Iterator[Path]:
    """Yield the config of the one image in an OCI layout, and then its layers."""
    [image] = json.loads((layout / "index.json").read_text())["manifests"]

    def blob(digest: str) -> Path:
        return layout / "blobs" / digest.replace(":", "/")

    manifest = json.loads(blob(image["digest"]).read_text())
    yield blob(manifest["config"]["digest"])
    for layer in manifest["layers"]:
        yield blob(layer["digest"])
