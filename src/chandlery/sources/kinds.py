"""Which kinds of package sources there are, and how each is read from its text."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from chandlery.errors import InvalidSourceError
from chandlery.nix.pinned_source import PinnedSource, trust_domain
from chandlery.nix.stores import NixStores
from chandlery.sources.arguments import SetArguments
from chandlery.sources.debian.index import DebianMirrors
from chandlery.sources.debian.installed_size import installed_size
from chandlery.sources.debian.source import SUITE, DebianSource
from chandlery.sources.flake import FlakeReference, FlakeSource
from chandlery.sources.git.address import GitAddress
from chandlery.sources.git.repository import GitRepository
from chandlery.sources.git.source import FRESH, REFERENCE, GitSource
from chandlery.sources.nixpkgs import CHANNEL, NIXOS, NixpkgsAddresses, NixpkgsSource
from chandlery.sources.package_source import PackageSource, SourceOptions
from chandlery.sources.path import PathSource
from chandlery.sources.pins import PinLimits


@dataclass(frozen=True, slots=True)
class _Place:
    """What a source is made of: `location` is what stands after the kind, `folder` is the data folder."""

    text: str
    location: str
    folder: Path
    mirrors: DebianMirrors
    options: SourceOptions
    nixpkgs: NixpkgsAddresses
    nix: NixStores | None

    def data(self, kind: str, location: str) -> Path:
        """Return the folder of one source. A location has no credentials: a new password changes nothing."""
        key = hashlib.sha256(f"{kind}!{location}".encode(errors="surrogateescape")).hexdigest()[:16]
        return self.folder / "sources" / f"{kind}-{key}"

    def arguments(self) -> SetArguments:
        """Return what a package set of nixpkgs' shape is called with."""
        return SetArguments(self.folder / "sources" / "overlays", self.options.config, self.options.overlays)


def parse(
    text: str,
    folder: Path,
    mirrors: DebianMirrors,
    options: SourceOptions | None = None,
    *,
    nixpkgs: NixpkgsAddresses = NIXOS,
    nix: NixStores | None = None,
) -> PackageSource:
    """Read `<kind>!<location>`; `folder` is for what sources fetch. Raises `InvalidSourceError`.

    Flakes need `nix`.
    """
    kind, separator, location = text.partition("!")
    if not separator or not location:
        raise InvalidSourceError(text, f"write {_FORMS}, such as debian!trixie")
    if kind not in KINDS:
        raise InvalidSourceError(text, f"{kind!r} is not a kind of source: write {_FORMS}")
    return KINDS[kind][1](_Place(text, location, folder, mirrors, options or SourceOptions(), nixpkgs, nix))


def estimated_size(pin: PinnedSource, packages: Iterable[str]) -> int | None:
    """Return about how many bytes an image of some packages will hold, with all that they need.

    It is None where nobody can tell before they are fetched. It blocks for milliseconds.
    """
    if pin.kind != "debian" or pin.nix is None:
        return None
    return installed_size(Path(pin.nix["lock"]), packages)


def _debian(place: _Place) -> PackageSource:
    if re.fullmatch(SUITE, place.location) is None:
        raise InvalidSourceError(place.text, f"{place.location!r} is not the name of a Debian suite")
    limits = PinLimits(place.options.pin_lifetime)
    return DebianSource(place.location, place.folder / "debian", place.mirrors, place.options.tags, limits)


def _path(place: _Place) -> PackageSource:
    path = Path(place.location).expanduser().absolute()
    source = PathSource(path, place.data("path", str(path)), place.arguments())
    # One that is away for now is served as it was.
    if not path.exists() and not source.was_pinned:
        raise InvalidSourceError(place.text, f"there is no folder {path}")
    if place.folder.resolve().is_relative_to(path.resolve()):
        raise InvalidSourceError(place.text, f"the data folder {place.folder} is in it, and always changes")
    return source


def _git(place: _Place) -> PackageSource:
    where, _, reference = (
        place.location.rpartition("!") if "!" in place.location else (place.location, "", "")
    )
    if where.startswith("~"):
        where = str(Path(where).expanduser())
    try:
        address = GitAddress.parse(where)
    except ValueError as error:
        # Not the text itself, which may have a password in it.
        raise InvalidSourceError("git!", str(error)) from error
    if REFERENCE.fullmatch(reference) is None:
        raise InvalidSourceError(
            f"git!{address.location}!{reference}", f"{reference!r} is no branch, tag or revision"
        )
    data = place.data("git", address.location)
    lifetime = place.options.pin_lifetime
    return GitSource(
        address,
        reference,
        data,
        place.arguments(),
        place.options.tags,
        PinLimits(lifetime),
        fresh=min(FRESH, lifetime),
    )


def _nixpkgs(place: _Place) -> PackageSource:
    if re.fullmatch(CHANNEL, place.location) is None:
        reason = f"{place.location!r} is neither a channel, such as nixos-unstable, nor a commit of 40 digits"
        raise InvalidSourceError(place.text, reason)
    return NixpkgsSource(
        place.location,
        place.data("nixpkgs", place.location),
        place.nixpkgs,
        place.arguments(),
        tags=place.options.tags or (),
        limits=PinLimits(place.options.pin_lifetime),
    )


def _flake(place: _Place) -> PackageSource:
    try:
        reference = FlakeReference.parse(place.location)
    except ValueError as error:
        # What stands before an @ may be a password.
        raise InvalidSourceError(f"flake!{place.location.rpartition('@')[2]}", str(error)) from error
    text = f"flake!{reference.shown}"
    if place.options.config or place.options.overlays:
        raise InvalidSourceError(text, "a flake says itself with what config and overlays it is made")
    if place.nix is None:
        raise InvalidSourceError(text, "a flake can't be read without Nix")
    data = place.data("flake", reference.shown)
    store = place.nix.at(trust_domain("flake", reference.location))
    limits = PinLimits(place.options.pin_lifetime)
    if reference.git_address is None:
        return FlakeSource(reference, data, store, limits)
    upstream = GitRepository(reference.git_address, data, text)
    return FlakeSource(reference, data, store, limits, ask_upstream=upstream.head)


# Each kind of source: how it is written, and what makes one.
KINDS: Mapping[str, tuple[str, Callable[[_Place], PackageSource]]] = {
    "debian": ("debian!<suite>", _debian),
    "path": ("path!<folder>", _path),
    "git": ("git!<address>!<branch, tag or revision>", _git),
    "nixpkgs": ("nixpkgs!<channel or commit>", _nixpkgs),
    "flake": ("flake!<reference>", _flake),
}

*_ALL_BUT_LAST, _LAST = (form for form, _ in KINDS.values())
_FORMS = f"{', '.join(_ALL_BUT_LAST)} or {_LAST}"
