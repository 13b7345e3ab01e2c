"""What package sets that don't trust each other can do to each other's images."""

from pathlib import Path

from chandlery.image.name import LATEST, of_parts
from chandlery.nix.configuration import host_paths
from chandlery.nix.stores import store_folders
from chandlery.oci.documents import BuiltImage
from chandlery.server.parts import name_prefixes, open_images, open_parts
from chandlery.settings.settings import Settings
from chandlery.storage.blob_store import BlobStore
from tests.support import layers
from tests.support.nix_package_set import packages, requires_nix

TOOL = """
    # What every image has.
    cacert = build "cacert" "mkdir $out";
    iana-etc = build "iana-etc" "mkdir $out";
    victim = build "victim" ''mkdir -p $out/bin; echo "the real tool" > $out/bin/tool'';
    needs = build "needs" ''mkdir $out; read -r line < ${victim}/bin/tool; echo "$line" > $out/found'';
"""
# Builders own what they are given to build with.
TAMPERING = """
    innocent = build "innocent" ''
      chmod -R u+w ${victim}
      echo "another tool" > ${victim}/bin/tool
      read -r line < ${victim}/bin/tool
      mkdir $out
      echo "$line, as ${victim} has it" > $out/done
    '';
"""


def two_sources(folder: Path) -> Settings:
    """Return settings with two package sets that have packages with the same derivations."""
    packages(folder / "less", TOOL + TAMPERING)
    packages(folder / "trusted", TOOL)
    return Settings.load(
        data_dir=folder / "data",
        sources={name: {"from": f"path!{folder / name}"} for name in ("less", "trusted")},
        source="trusted",
        host_paths=host_paths(),
        substituters=(),
        compression="none",
    )


async def texts(blobs: BlobStore, image: BuiltImage) -> dict[str, str]:
    """Return the files of an image's store paths, by their last names."""
    found: dict[str, str] = {}
    for each in image.layers[:-1]:
        path = blobs.path(each.descriptor.digest)
        assert path is not None
        archive = layers.layer(path)
        names = [member.name for member in archive.getmembers() if member.isfile()]
        found |= {name.rpartition("/")[2]: layers.text(archive, name) for name in names}
    return found


@requires_nix
async def test_what_one_package_set_builds_changes_nothing_in_the_images_of_another(tmp_path: Path) -> None:
    settings = two_sources(tmp_path)
    prefixes = name_prefixes(settings)
    async with open_parts(settings) as parts, open_images(settings, parts) as images:

        async def pulled(*names: str) -> dict[str, str]:
            image = await images.image(of_parts(names, LATEST, prefixes))
            return await texts(parts.stores.blobs, image)

        assert (await pulled("less", "innocent"))["done"].startswith("another tool, as /nix/store/")
        # Of the less trusted set itself it is so.
        assert (await pulled("less", "victim"))["tool"] == "another tool\n"
        assert (await pulled("trusted", "victim"))["tool"] == "the real tool\n"
        assert (await pulled("trusted", "needs"))["found"] == "the real tool\n"
        assert len(parts.stores.nix.existing()) == len(store_folders(settings.data_dir)) == 2
