"""The last layer, packed; its functions take arguments that can be sent to another process.

What it holds is decided in `layers.root_filesystem`. An operator's commands may change it first: they run in
Nix's sandbox over the layer as a tar (`nix/expressions/extra_commands.nix`), and return a store path with the
root layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chandlery.image.profile import Account
from chandlery.layers.archive import pack
from chandlery.layers.collisions import collisions, disputed
from chandlery.layers.compression import COMPRESSIONS
from chandlery.layers.main_program import MainPackage, main_program_of
from chandlery.layers.root_filesystem import owned, root_filesystem
from chandlery.layers.store_reader import StoreReader
from chandlery.nix.closure import Closure, StorePath
from chandlery.oci.documents import PackedLayer

# Counts up when the same packages give another root filesystem.
ROOT_LAYER_VERSION = 2


@dataclass(frozen=True, slots=True)
class RootLayerOptions:
    """Who owns the layer; store paths to put in beside the packages; a bash script that runs over it."""

    uid: int = 0
    gid: int = 0
    contents: tuple[StorePath, ...] = ()
    extra_commands: str = ""

    def key_parts(self) -> list[str]:
        """Return all of it as text, for a build's key."""
        return [str(self.uid), str(self.gid), self.extra_commands, *map(str, self.contents)]


@dataclass(frozen=True, slots=True)
class RootLayer:
    """The layer, the path of the main package's program, and a sentence for each collision of packages."""

    layer: PackedLayer
    main_program: str | None
    collisions: tuple[str, ...] = ()


def pack_root_layer(
    store_root: Path,
    closure: Closure,
    roots: Sequence[StorePath],
    owner: tuple[int, int],
    account: Account | None,
    main: MainPackage | None,
    compression: str,
    destination: Path,
) -> RootLayer:
    """Pack the root filesystem of a closure; raises what `root_filesystem` and `pack` raise."""
    reader = StoreReader(store_root)
    found = collisions(reader, closure, roots)
    entries = root_filesystem(
        closure, roots, reader, uid=owner[0], gid=owner[1], account=account, disputed=disputed(found)
    )
    program = main_program_of(reader, closure, main) if main else None
    layer = pack(entries, COMPRESSIONS[compression], destination)
    return RootLayer(layer, program, tuple(map(str, found)))


def pack_changed_root_layer(
    store_root: Path,
    store_path: StorePath,
    owner: tuple[int, int],
    account: Account | None,
    compression: str,
    destination: Path,
) -> PackedLayer:
    """Pack what the operator's commands made of the root filesystem; raises what `pack` raises."""
    entries = (owned(entry, owner, account) for entry in StoreReader(store_root).entries(store_path))
    return pack(entries, COMPRESSIONS[compression], destination)
