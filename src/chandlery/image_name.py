"""What an image name asks for: `shell/git/jq` and a reference, to an `ImageRequest`. No I/O.

The parts of a repository name are packages, in any order. Meta-packages stand before them: `shell` adds what
people expect in an interactive shell, and `amd64` or `arm64` chooses the platform.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from chandlery.errors import InvalidNameError, InvalidReferenceError
from chandlery.oci import ARCHITECTURES, Platform

# distribution-spec, "Pulling manifests": the grammars of <name> and of a tag.
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"{_PART}(?:/{_PART})*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[a-f0-9]{64}")
# "Many clients impose a limit of 255 characters" (distribution-spec); longer names can't be pulled anyway.
_LONGEST_NAME = 255

LATEST = "latest"
SHELL = "shell"

# In every image: a CA bundle, and the names of protocols and services.
BASE_PACKAGES = ("cacert", "iana-etc")

# In `shell` images. Names are nixpkgs'; a package set that isn't nixpkgs has them as aliases.
SHELL_PACKAGES = (
    "bashInteractive",
    "coreutils",
    "findutils",
    "gawk",
    "gnugrep",
    "gnused",
    "gnutar",
    "gzip",
    "less",
    "nano",
    "ncurses",
    "procps",
    "which",
)


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """What one pull asks for.

    `packages` are attribute paths as the client wrote them, sorted and without repeats, so `git/jq` and
    `jq/git` are one image; what every image holds and what `shell` adds is not among them.
    """

    packages: tuple[str, ...]
    platform: Platform
    shell: bool = False
    reference: str = LATEST

    @property
    def name(self) -> str:
        """The one spelling of all names of this image; without the platform."""
        return "/".join((SHELL, *self.packages) if self.shell else self.packages)

    @property
    def all_packages(self) -> tuple[str, ...]:
        """Every attribute path to resolve, sorted."""
        return tuple(sorted({*self.packages, *BASE_PACKAGES, *(SHELL_PACKAGES if self.shell else ())}))


def parse(name: str, reference: str, host: Platform) -> ImageRequest:
    """Read a repository name and a reference; `host` is the platform of names that choose none.

    Raises `InvalidNameError` and `InvalidReferenceError`.
    """
    check(name, reference)
    return of_parts(name.split("/"), reference, host)


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


def of_parts(parts: Sequence[str], reference: str, host: Platform) -> ImageRequest:
    """Read the parts of an image name: meta-packages, then attribute paths (which may have capitals here)."""
    name = "/".join(parts)
    shell = False
    architecture: str | None = None
    first_package = 0
    for part in parts:
        if part == SHELL:
            shell = True
        elif part in ARCHITECTURES:
            if architecture not in (None, part):
                raise InvalidNameError(name, f"it asks for {architecture} and for {part}: choose one")
            architecture = part
        else:
            break
        first_package += 1
    packages = parts[first_package:]
    for part in packages:
        if part == SHELL or part in ARCHITECTURES:
            raise InvalidNameError(name, f"{part} comes before the packages, as in {part}/{packages[0]}")
    if not packages and not shell:
        raise InvalidNameError(name, "it names no package")
    platform = Platform("linux", architecture) if architecture else host
    return ImageRequest(tuple(sorted(set(packages))), platform, shell, reference)


def is_digest(reference: str) -> bool:
    """Tell a digest from a tag; a tag has no colon."""
    return ":" in reference
