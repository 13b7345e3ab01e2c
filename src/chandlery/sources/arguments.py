"""What a package set is called with, beside its system: nixpkgs' `config` and `overlays`, pinned by content.

Overlays are files or folders of the operator's, which may change while the server runs. A file is pinned
alone: one that imports others belongs into a folder, with a `default.nix`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from chandlery.errors import SourceUnavailableError
from chandlery.nix.pinned_source import PinnedSource
from chandlery.sources.operator_folder import OperatorFolder
from chandlery.sources.pin_file import PinFile
from chandlery.sources.pins import PinLimits, Pins
from chandlery.sources.trees import SourceTrees

# What is read from a local disk is looked at each time; it takes a moment.
LOCAL_LIMITS = PinLimits(lifetime=0.0, patience=20.0, back_off=1.0)

# Overlays of all sources share a place.
_MOST_TREES = 32


@dataclass(frozen=True, slots=True)
class PinnedArguments:
    """The arguments as they are now; see `PinnedSource` for `variant` and `stale`."""

    variant: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    overlays: Sequence[str] = ()
    stale: str = ""

    def source(self, kind: str, location: str, revision: str, tree: Path, stale: str = "") -> PinnedSource:
        """Return the package set that stands in a tree, called with these.

        `SourceUnavailableError` if there is none.
        """
        if not (tree / "default.nix").exists():
            raise SourceUnavailableError(f"{kind}!{location}", f"there is no default.nix at {revision[:16]}")
        reasons = "; ".join(each for each in (stale, self.stale) if each)
        nix = {"tree": str(tree), "config": self.config, "overlays": list(self.overlays)}
        return PinnedSource(kind, location, revision, self.variant, nix, stale=reasons)


class SetArguments:
    """The arguments that the operator chose; copies of the overlays are kept in `folder`."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any] | None = None, overlays: Sequence[Path] = ()
    ) -> None:
        # What TOML can say and JSON can't, such as a date, becomes text.
        self._config: Mapping[str, Any] = msgspec.json.decode(msgspec.json.encode(config or {}))
        self._trees = SourceTrees(folder, "overlays", most=_MOST_TREES)
        self._overlays = [self._pins_of(path.expanduser().absolute(), folder) for path in overlays]

    async def pin(self) -> PinnedArguments:
        """Return the arguments as they are now; an overlay that can't be read is as it was last.

        Raises `SourceUnavailableError` if it never could be.
        """
        if not self._config and not self._overlays:
            return PinnedArguments()
        pins = [await each.get("") for each in self._overlays]
        trees = []
        for pin in pins:
            tree = self._trees.get(pin.revision)
            if tree is None:
                raise SourceUnavailableError("overlays", f"the copy of {pin.revision[:16]} is gone")
            trees.append(str(tree))
        stated = msgspec.json.encode([self._config, [pin.revision for pin in pins]], order="deterministic")
        stale = "; ".join(pin.stale for pin in pins if pin.stale)
        return PinnedArguments(hashlib.sha256(stated).hexdigest(), self._config, trees, stale)

    def _pins_of(self, path: Path, folder: Path) -> Pins:
        key = hashlib.sha256(str(path).encode(errors="surrogateescape")).hexdigest()[:16]
        text = f"overlay {path}"
        overlay = OperatorFolder(path, self._trees, text)
        return Pins(PinFile(folder / f"{key}.json"), text, overlay.resolve, LOCAL_LIMITS)
