"""What an image name asks for: `shell/git/jq` and a reference, to an `ImageRequest`. No I/O.

The parts of a repository name are packages, in any order. Before them may stand, in any order, the name of a
package source, `amd64` or `arm64` for the platform, and names of profiles, such as `shell`. What these are
called is in the `NamePrefixes` of a server.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

from chandlery.errors import InvalidNameError, InvalidReferenceError
from chandlery.image.profile import BASE_PACKAGES, SHIPPED, Profile
from chandlery.oci.documents import ARCHITECTURES, Platform

# distribution-spec, "Pulling manifests": the grammars of <name> and of a tag.
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"{_PART}(?:/{_PART})*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[a-f0-9]{64}")
# "Many clients impose a limit of 255 characters" (distribution-spec); longer names can't be pulled anyway.
_LONGEST_NAME = 255

LATEST = "latest"


@dataclass(frozen=True, slots=True)
class NamePrefixes:
    """What may stand before the packages of an image name on a server.

    `host` is the platform of names that choose none. `sources` are the names of package sources; the one that
    is called `default_source`, if any, is that of names that choose none.
    """

    host: Platform
    sources: frozenset[str] = frozenset()
    default_source: str = ""
    profiles: Mapping[str, Profile] = field(default_factory=lambda: SHIPPED)

    def kind(self, part: str) -> str:
        """Return what a part is as a prefix: "platform", "source" or "profile"; empty for a package."""
        if part in ARCHITECTURES:
            return "platform"
        if part in self.sources:
            return "source"
        return "profile" if part in self.profiles else ""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """What one pull asks for.

    `packages` are attribute paths as the client wrote them, sorted and without repeats, so `git/jq` and
    `jq/git` are one image; what every image holds and what profiles add is not among them. `source` is the
    name of a package source, empty for the default one. `profile` is what `profiles` say, in all. With
    `any_platform` the name chose none, and `platform` is the server's own.
    """

    packages: tuple[str, ...]
    platform: Platform
    profiles: tuple[str, ...] = ()
    source: str = ""
    reference: str = LATEST
    profile: Profile = field(default_factory=Profile)
    any_platform: bool = False

    @property
    def name(self) -> str:
        """The one spelling of all names of this image; without the platform."""
        return "/".join((*((self.source,) if self.source else ()), *self.profiles, *self.packages))

    @property
    def title(self) -> str:
        """What an image calls itself: its name, without that of the source, which every server chooses."""
        return "/".join((*self.profiles, *self.packages))

    @property
    def all_packages(self) -> tuple[str, ...]:
        """Every attribute path to resolve, sorted."""
        return tuple(sorted({*self.packages, *BASE_PACKAGES, *self.profile.packages}))

    @property
    def most_wanted_first(self) -> tuple[str, ...]:
        """Every attribute path, for collisions: what was asked for, what profiles add, what is always in."""
        return tuple(dict.fromkeys([*self.packages, *self.profile.packages, *BASE_PACKAGES]))


def parse(name: str, reference: str, name_prefixes: NamePrefixes) -> ImageRequest:
    """Read a repository name and a reference. Raises `InvalidNameError` and `InvalidReferenceError`."""
    check(name, reference)
    return of_parts(name.split("/"), reference, name_prefixes)


def check(name: str, reference: str) -> None:
    """Raise `InvalidNameError` or `InvalidReferenceError` unless both keep distribution-spec's grammar."""
    if len(name) > _LONGEST_NAME:
        raise InvalidNameError(f"{name[:40]}...", f"it is longer than {_LONGEST_NAME} characters")
    if _NAME.fullmatch(name) is None:
        raise InvalidNameError(
            name,
            "its parts are separated by / and hold a-z and 0-9, "
            "with single . or _ (or __, or any number of -) between them",
        )
    if _TAG.fullmatch(reference) is None and _DIGEST.fullmatch(reference) is None:
        raise InvalidReferenceError(reference[:140])


def is_part(text: str) -> bool:
    """Return whether something may be a part of an image name."""
    return re.fullmatch(_PART, text) is not None


def of_parts(parts: Sequence[str], reference: str, name_prefixes: NamePrefixes) -> ImageRequest:
    """Read the parts of an image name: name prefixes, then attribute paths (which may have capitals here)."""
    name = "/".join(parts)
    prefixes: dict[str, list[str]] = {"platform": [], "source": [], "profile": []}
    packages: list[str] = []
    for part in parts:
        kind = name_prefixes.kind(part)
        if packages or not kind:
            packages.append(part)
        elif part not in prefixes[kind]:
            prefixes[kind].append(part)
    for part in packages:
        kind = name_prefixes.kind(part)
        if kind:
            raise InvalidNameError(
                name, f"{part} is a {kind} here, and comes before the packages: {part}/{packages[0]}"
            )
    for kind in ("platform", "source"):
        if len(prefixes[kind]) > 1:
            raise InvalidNameError(name, f"it asks for {' and for '.join(prefixes[kind])}: choose one")
    profiles = [name_prefixes.profiles[part] for part in prefixes["profile"]]
    profile = reduce(lambda merged, each: each.over(merged), profiles, Profile())
    if not packages and not profile.packages:
        raise InvalidNameError(name, "it names no package")
    architecture = next(iter(prefixes["platform"]), None)
    source = next(iter(prefixes["source"]), "")
    return ImageRequest(
        tuple(sorted(set(packages))),
        Platform("linux", architecture) if architecture else name_prefixes.host,
        tuple(prefixes["profile"]),
        "" if source == name_prefixes.default_source else source,
        reference,
        profile,
        architecture is None,
    )


def paths_within(path: Sequence[str]) -> frozenset[str]:
    """Return the attribute paths that stand in one, given as its parts.

    In `pkgs.git.out` these are `pkgs`, `git`, `out`, `pkgs.git`, `git.out` and itself.
    """
    places = range(len(path))
    return frozenset(".".join(path[begin : end + 1]) for begin in places for end in places[begin:])


def is_digest(reference: str) -> bool:
    """Tell a digest from a tag; a tag has no colon."""
    return ":" in reference
