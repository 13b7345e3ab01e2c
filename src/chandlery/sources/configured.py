"""The package sources of one server: each has a name that the first part of an image name picks.

One is the default, which serves the names that pick none; it need not have a name.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.documents import Platform
from chandlery.sources.package_source import PackageSource


@dataclass(frozen=True, slots=True)
class ConfiguredSource:
    """A source and how it is used.

    `platforms` are those of image names that choose none, the one of a single manifest first; `pin_lifetime`
    is in seconds.
    """

    source: PackageSource
    platforms: tuple[Platform, ...]
    pin_lifetime: float = 3600.0


class Sources:
    """The sources by name; the name of the default one is `default`, which is empty if it has none."""

    def __init__(self, named: Mapping[str, ConfiguredSource], default: str = "") -> None:
        self._named = named
        self._default = default

    @classmethod
    def of_one(cls, source: PackageSource) -> "Sources":
        """Return a source that has no name."""
        return cls({"": ConfiguredSource(source, source.platforms)})

    def __iter__(self) -> Iterator[ConfiguredSource]:
        return iter(self._named.values())

    def of(self, name: str) -> PackageSource:
        """Return the source of an `ImageRequest`."""
        return self._named[name or self._default].source

    def platforms(self, name: str) -> Sequence[Platform]:
        """Return the platforms of image names that choose none."""
        return self._named[name or self._default].platforms

    async def at(self, pin: PinnedSource, platform: Platform) -> PinnedSource | None:
        """Find the source that has what was pinned once; None if none has it any more, or never had."""
        for each in self:
            if each.source.kind == pin.kind and each.source.serves(pin.location):
                found = await each.source.at(pin.revision, platform)
                if found == pin:
                    return found
        return None

    async def refresh(self, name: str) -> None:
        """See now whether a source has moved, if its pin has lived its time."""
        configured = self._named[name or self._default]
        await configured.source.refresh(configured.pin_lifetime)

    async def close(self) -> None:
        """Stop what is under way, such as fetches; nothing is asked for after it."""
        for each in self:
            await each.source.close()

    def keep(self, revisions: Sequence[str]) -> None:
        """Let these revisions be the last to go; see `PackageSource.keep`."""
        for each in self:
            each.source.keep(revisions)
