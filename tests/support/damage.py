"""What may happen to a file of a blob."""

from pathlib import Path

from chandlery.oci.digest import Digest
from chandlery.oci.documents import BuiltImage, ManifestFormat


def a_blob(image: BuiltImage, which: str) -> Digest:
    return {
        "manifest": image.manifests[ManifestFormat.OCI].digest,
        "docker manifest": image.manifests[ManifestFormat.DOCKER].digest,
        "config": image.config.digest,
        "layer": image.layers[0].descriptor.digest,
        "root layer": image.layers[-1].descriptor.digest,
    }[which]


def lose(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
