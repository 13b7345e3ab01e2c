"""Where packages come from, such as `debian!<suite>`, and the pin that makes each immutable.

A source moves (an index is updated, a folder is edited); a pin doesn't. Everything after the pin works with a
`PinnedSource`, so every build has a key. Adding a source is one class in a module of its own, its entry in
`sources.kinds`, and one branch in `nix/expressions/package_set.nix`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.documents import Platform


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """How a source is used, beside where it is.

    `tags` are patterns (fnmatch) of the revisions that a tag may choose; None is what the source's kind
    allows by itself. A pin is renewed when it is `pin_lifetime` seconds old. `config` and `overlays` (files
    or folders of the operator's) are nixpkgs'.
    """

    tags: tuple[str, ...] | None = None
    pin_lifetime: float = 3600.0
    config: Mapping[str, Any] = field(default_factory=dict)
    overlays: tuple[Path, ...] = ()


class PackageSource(Protocol):
    """Something that can be pinned. `text` is for people and has no credentials."""

    text: str
    kind: str
    location: str

    @property
    def platforms(self) -> tuple[Platform, ...]:
        """Return the platforms for which it makes images on this machine, the machine's own first."""
        ...

    def serves(self, location: str) -> bool:
        """Return whether revisions of this location of its kind may be among its own."""
        ...

    async def upstreams(self) -> Sequence[str]:
        """Return the addresses of HTTP servers that it asks anyway; none if it knows of none."""
        ...

    async def pin(self, reference: str, platform: Platform) -> PinnedSource:
        """Return what a tag means now: `latest`, the tag of a revision, or what else the source has.

        Raises `ReferenceNotFoundError` for another tag, `SourceUnavailableError` if there is nothing to pin.
        Cancelling the call stops nothing that another one waits for.
        """
        ...

    def chosen_by(self, reference: str, pin: PinnedSource | None = None) -> str:
        """Return the text of the source that a tag chooses beside this one, such as another branch of it.

        It is empty for a tag that chooses none, as `latest`. With the `pin` that the tag has given it is
        certain; without, it may be wrong about the tag of a revision.
        """
        ...

    async def at(self, revision: str, platform: Platform) -> PinnedSource | None:
        """Return a revision that was pinned once; None if the source can't give it any more."""
        ...

    async def refresh(self, max_age: float) -> None:
        """See whether the source has moved, if that was last done more than `max_age` seconds ago."""
        ...

    def keep(self, revisions: Sequence[str]) -> None:
        """Let these revisions be the last to go when old ones are removed; the most wanted comes first."""
        ...

    async def close(self) -> None:
        """Stop what is under way, such as a fetch; nothing is asked for after it."""
        ...
