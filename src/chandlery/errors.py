"""What goes wrong with a pull, as data; the status and code of each error are decided in `registry.endpoint`.

Errors that one module raises and those above it turn into one of these are beside the module: of downloads,
tarballs, programs and the demo.

ChandleryError
├── InvalidDigestError          not a digest
├── InvalidNameError            not a repository name, or one that can't name an image
├── InvalidReferenceError       not a tag or a digest
├── InvalidSourceError          not a package source
├── SettingsError               the settings can't be used
├── CredentialsError            it isn't known who asks
├── PullDeniedError             who asks is known, and may not have it
├── NotFoundError
│   ├── ReferenceNotFoundError  the source has no such tag, or no such manifest is known
│   ├── BlobNotFoundError       no such blob
│   └── PackagesNotFoundError   the package set has no such attribute paths
├── SourceUnavailableError      the package set can't be had now, and never was
│   ├── SuiteNotFoundError      the Debian mirror answers, and has no such suite
│   └── RevisionGoneError       the package set can't be had any more as it once was
├── EvaluationError             packages that can't be had, for different reasons; and if they have one:
│   ├── UnfreeError             they are unfree
│   ├── BrokenError             they are marked as broken
│   ├── InsecureError           they are marked as insecure
│   ├── UnsupportedSystemError  they aren't for this platform
│   ├── NotAPackageError        the attribute paths lead to something else
│   ├── EvaluationFailedError   their expressions fail
│   ├── InfiniteRecursionError  their expressions need themselves
│   ├── EvaluationTimeoutError  evaluation took longer than the limit
│   └── EvaluationMemoryError   evaluation took more memory than the limit
├── BuildError                  Nix could not build something
│   ├── BuildTimeoutError       it took longer than the limit
│   └── DownloadError           something that it needs could not be fetched
├── BuildTooLargeError          an image is larger than this server makes
├── TryAgainError               not now: the same request succeeds later
│   ├── BuildPendingError       the image is still being built
│   │   ├── PinPendingError     its package source is still being looked up
│   │   └── EvaluationPendingError  its packages are still being evaluated
│   ├── BuildStoppedError       the server stops, or stopped this build
│   ├── TooManyBuildsError      the queue is full
│   │   └── BuildDisplacedError     the build gave way in it
│   ├── TooManyEvaluationsError  so many names are being evaluated for one client that no other is
│   ├── TooManyReferencesError  so many tags of a source were asked for that no other is looked up
│   ├── TooManyLoginsError      so many passwords wait to be tried that no other is taken
│   └── RateLimitError          one client asks for too much
├── NixError                    Nix itself failed
│   └── NixMissingError         there is no Nix
├── UnsupportedEntryError       a file that a layer can't hold
├── StorePathContentError       a file below nix-support that can't be understood
└── StorageError                the data folder, or the bucket, can't be read or written
    └── StorageFullError        no space left
        └── LowDiskError        less is left than the operator keeps free
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def in_bytes(size: int) -> str:
    """Return a size as people read it: 1,234 B, 5.6 MB, 7.8 GB."""
    if size < 1_000_000:
        return f"{size:,} B"
    return f"{size / 1e9:,.2f} GB" if size >= 1_000_000_000 else f"{size / 1e6:,.1f} MB"


class ChandleryError(Exception):
    """The root of the tree; its text is written for the person who pulled."""

    build: str  # the id of the build that it ended, if there was one

    def __reduce__(self) -> tuple[Any, ...]:
        # Layers are packed in other processes. An exception is unpickled by calling its class with its text,
        # which is not what most of these take, so it would be lost on its way back.
        return _revive, (type(self), self.args), self.__dict__


def _revive(cls: type[ChandleryError], args: tuple[Any, ...]) -> ChandleryError:
    return cls.__new__(cls, *args)


class InvalidDigestError(ChandleryError):
    """Some text is not a sha256 digest."""

    def __init__(self, text: str) -> None:
        super().__init__(f"{text!r} is not a digest: expected sha256: and 64 hexadecimal digits")
        self.text = text


class InvalidNameError(ChandleryError):
    """Some text is not a repository name, or it can't name an image."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name!r} is not an image name: {reason}")
        self.name = name
        self.reason = reason


class InvalidReferenceError(ChandleryError):
    """Some text is neither a tag nor a digest."""

    def __init__(self, reference: str) -> None:
        super().__init__(f"{reference!r} is neither a tag nor a digest")
        self.reference = reference


class InvalidSourceError(ChandleryError):
    """Some text does not name a package source."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(f"{text!r} is not a package source: {reason}")
        self.text = text
        self.reason = reason


class SettingsError(ChandleryError):
    """The settings can't be used; the text names the setting and what to do."""


class CredentialsError(ChandleryError):
    """It isn't known who asks: no credentials came, or none that are right. The text never has them.

    `code` is that of RFC 6750, section 3.1, for a token that isn't good enough, and else empty.
    """

    def __init__(self, reason: str, code: str = "") -> None:
        super().__init__(reason)
        self.code = code


class PullDeniedError(ChandleryError):
    """The access rules refuse something that an image is made of; `user` is empty for who isn't logged in."""

    def __init__(self, user: str, denied: Sequence[str]) -> None:
        who = user or "a client that has not logged in"
        super().__init__(f"{who} may not pull {', '.join(denied)}: the access rules of this server say so")
        self.user = user
        self.denied = tuple(denied)


class NotFoundError(ChandleryError):
    """What was asked for isn't there."""


class ReferenceNotFoundError(NotFoundError):
    """The package source has no such tag, or no manifest with this digest is known."""

    def __init__(self, name: str, reference: str, hint: str) -> None:
        super().__init__(f"{name}: no manifest {reference!r}: {hint}")
        self.name = name
        self.reference = reference
        self.hint = hint


class BlobNotFoundError(NotFoundError):
    """No blob has this digest; `reason` says why one that was there can't be made again."""

    def __init__(self, digest: str, reason: str = "") -> None:
        lost = f": it was lost, and can't be made again: {reason}" if reason else ""
        super().__init__(f"no blob {digest}{lost}")
        self.digest = digest
        self.reason = reason


class PackagesNotFoundError(NotFoundError):
    """The package set has no such attribute paths."""

    def __init__(self, missing: Sequence[str], suggestions: Mapping[str, Sequence[str]]) -> None:
        described = [
            f"{name} (did you mean {', '.join(suggestions[name])}?)" if suggestions.get(name) else name
            for name in missing
        ]
        super().__init__(f"not in the package set: {', '.join(described)}")
        self.missing = tuple(missing)
        self.suggestions = dict(suggestions)

    def suggesting(self, wanted: Callable[[str], bool]) -> "PackagesNotFoundError":
        """Return the same with those of its suggestions that are wanted."""
        suggestions = {name: list(filter(wanted, found)) for name, found in self.suggestions.items()}
        told = PackagesNotFoundError(self.missing, suggestions)
        told.__dict__.update({**vars(self), "suggestions": suggestions})
        return told


class SourceUnavailableError(ChandleryError):
    """The package set can't be had now, and there is no earlier state of it to serve."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"the package source {source} can't be reached: {reason}")
        self.source = source
        self.reason = reason


class SuiteNotFoundError(SourceUnavailableError):
    """The Debian mirror answers, and has no such suite, which it may have been told wrongly."""


class RevisionGoneError(SourceUnavailableError):
    """The package source has moved on, and what it was at an older revision isn't kept."""

    def __init__(self, source: str, revision: str) -> None:
        super().__init__(source, f"its revision {revision} is not kept any more")
        self.revision = revision


class EvaluationError(ChandleryError):
    """Packages that are in the set but can't be had, each with its reason; see `evaluation_error`.

    `reasons` are, by attribute path, {"reason": the word of a class, "message": Nix's or empty}.
    """

    reason = ""
    is_so = "can't be evaluated"
    advice = ""

    def __init__(self, reasons: Mapping[str, Mapping[str, str]]) -> None:
        kinds = {name: _evaluation_error_class(of["reason"]) for name, of in reasons.items()}
        said = [
            f"{name} {kinds[name].is_so}: {of['message']}" if of["message"] else f"{name} {kinds[name].is_so}"
            for name, of in reasons.items()
        ]
        advice = dict.fromkeys(kind.advice for kind in kinds.values() if kind.advice)
        super().__init__("; ".join([*said, *advice]))
        self.reasons = {name: dict(of) for name, of in reasons.items()}


class UnfreeError(EvaluationError):
    """Packages with a licence that the package set refuses, unless its config allows it."""

    reason = "unfree"
    is_so = "is unfree"
    advice = (
        "the operator of this server can allow it in the source's config: allowUnfree = true, "
        "or allowUnfreePackages = [its name] where nixpkgs is new enough for that"
    )


class BrokenError(EvaluationError):
    """Packages that the package set marks as broken."""

    reason = "broken"
    is_so = "is marked as broken"
    advice = (
        "another revision of the package set may have it whole, or config.allowBroken = true lets it be tried"
    )


class InsecureError(EvaluationError):
    """Packages with known vulnerabilities."""

    reason = "insecure"
    is_so = "is marked as insecure"
    advice = (
        "take another version of it; the operator of this server can allow one in the source's config: "
        "permittedInsecurePackages = [its name and version]"
    )


class UnsupportedSystemError(EvaluationError):
    """Packages that aren't for the platform."""

    reason = "unsupported"
    is_so = "is not available for this platform"
    advice = "put amd64 or arm64 before the packages to choose another platform"


class NotAPackageError(EvaluationError):
    """Attribute paths that lead to something else than a package."""

    reason = "not_a_package"
    is_so = "is not a package"
    advice = "name a package, such as one within that set, with a dot between their names"


class EvaluationFailedError(EvaluationError):
    """Packages whose expressions throw, abort, or can't be understood."""

    reason = "failed"
    advice = "this is for the authors of the package set to mend"


class InfiniteRecursionError(EvaluationError):
    """Packages whose expressions need their own value, or endlessly many others'."""

    reason = "infinite_recursion"
    advice = "this is for the authors of the package set to mend"


class EvaluationTimeoutError(EvaluationError):
    """Packages whose evaluation takes longer than the limit in the settings."""

    reason = "time_limit"
    is_so = "takes too long to evaluate"
    advice = "the operator of this server can raise evaluation_timeout"


class EvaluationMemoryError(EvaluationError):
    """Packages whose evaluation takes more memory than the limit in the settings, or than there is."""

    reason = "memory_limit"
    is_so = "takes too much memory to evaluate"
    advice = "the operator of this server can raise evaluation_memory"


def evaluation_error(reasons: Mapping[str, Mapping[str, str]]) -> EvaluationError:
    """Return the error of packages that can't be had: of its own class where all have one reason."""
    kinds = {_evaluation_error_class(of["reason"]) for of in reasons.values()}
    return (kinds.pop() if len(kinds) == 1 else EvaluationError)(reasons)


def _evaluation_error_class(reason: str) -> type[EvaluationError]:
    kinds = (kind for kind in EvaluationError.__subclasses__() if kind.reason == reason)
    return next(kinds, EvaluationFailedError)


class BuildError(ChandleryError):
    """Nix could not build something that the image needs."""

    def __init__(self, what: str, reason: str, log_tail: Sequence[str]) -> None:
        tail = "".join(f"\n  {line}" for line in log_tail)
        super().__init__(f"{what} could not be built: {reason}{tail}")
        self.what = what
        self.reason = reason
        self.log_tail = tuple(log_tail)


class BuildTimeoutError(BuildError):
    """The build took longer than the limit in the settings (seconds)."""

    def __init__(self, what: str, limit: float, log_tail: Sequence[str]) -> None:
        super().__init__(what, f"it was stopped after {limit:g} s, the limit on this server", log_tail)
        self.limit = limit


class DownloadError(BuildError):
    """Something that the build needs could not be fetched from where it should be."""


class BuildTooLargeError(ChandleryError):
    """An image is larger than the limit on this server, or its build is.

    `reason` says in words what was counted: `size` of it were asked for, and `setting` allows `limit`.
    """

    def __init__(self, image: str, reason: str, size: int, limit: int, setting: str) -> None:
        super().__init__(f"{image} {reason}: ask for less, or let the operator raise {setting}")
        self.image = image
        self.reason = reason
        self.size = size
        self.limit = limit
        self.setting = setting


class TryAgainError(ChandleryError):
    """Not now: the same request succeeds later; `retry_after` is when to ask again, in seconds."""

    retry_after = 5


class BuildPendingError(TryAgainError):
    """The image is still being built, or waits for its turn: `position` in the queue, 0 when it has begun."""

    def __init__(self, image: str, build: str, position: int) -> None:
        where = f"is number {position} in the queue" if position else "is being built"
        super().__init__(f"{image} {where} (build {build}): pull again in a moment")
        self.image = image
        self.build = build
        self.position = position


class PinPendingError(BuildPendingError):
    """It isn't known yet what an image's tag means now: its package source takes long to answer."""

    def __init__(self, image: str, source: str) -> None:
        super().__init__(image, "", 0)
        self.args = (f"{source} is still being looked up for {image}: pull again in a moment",)
        self.source = source


class EvaluationPendingError(BuildPendingError):
    """It isn't known yet whether the package set has what an image is made of."""

    def __init__(self, image: str) -> None:
        super().__init__(image, "", 0)
        self.args = (f"the packages of {image} are still being evaluated: ask again in a moment",)


class BuildStoppedError(TryAgainError):
    """The build was stopped before its end, as it is when the server stops."""

    def __init__(self, image: str, build: str) -> None:
        super().__init__(f"the build of {image} was stopped (build {build}): pull again in a moment")
        self.image = image
        self.build = build


class TooManyBuildsError(TryAgainError):
    """So many builds wait already that no other is taken."""

    def __init__(self, image: str, limit: int) -> None:
        super().__init__(f"{image} can't be built now: {limit} builds are waiting already; pull again later")
        self.image = image
        self.limit = limit


class BuildDisplacedError(TooManyBuildsError):
    """The build waited in the queue, which is full, and gave way to one of a client that has fewer."""

    def __init__(self, image: str, limit: int) -> None:
        super().__init__(image, limit)
        self.args = (
            f"{image} has lost its place in the queue to a client with fewer builds, since {limit} are "
            "waiting already: pull again later, and fewer images at once",
        )


class TooManyEvaluationsError(TryAgainError):
    """So many names are being evaluated for one client, with no build of theirs, that no other is."""

    def __init__(self, image: str, limit: int) -> None:
        super().__init__(
            f"{image} can't be looked up now: {limit} other names are being looked up for you already; "
            "ask again in a moment"
        )
        self.image = image
        self.limit = limit


class TooManyReferencesError(TryAgainError):
    """So many different references of a package source were asked for that no other is looked up now."""

    def __init__(self, source: str) -> None:
        super().__init__(f"too many different tags of {source} were asked for lately: pull again in a moment")
        self.source = source


class TooManyLoginsError(TryAgainError):
    """So many passwords wait to be tried that no other is taken."""

    def __init__(self) -> None:
        super().__init__("too many log in at once: try again in a moment")


class RateLimitError(TryAgainError):
    """One client asks for too much: more than `limit` of `what` in a `period` (minute, hour)."""

    def __init__(self, what: str, limit: int, period: str, retry_after: int) -> None:
        super().__init__(
            f"too many {what}: the limit here is {limit} per {period} and client; "
            f"try again in {retry_after} s"
        )
        self.what = what
        self.limit = limit
        self.period = period
        self.retry_after = retry_after


class NixError(ChandleryError):
    """Nix itself failed: it isn't about one package."""


class NixMissingError(NixError):
    """There is no Nix on this machine."""

    def __init__(self, program: str) -> None:
        super().__init__(
            f"the program {program} was not found: install Nix "
            "(on Debian: apt-get install nix-bin), or add it to PATH"
        )
        self.program = program


class UnsupportedEntryError(ChandleryError):
    """A store path holds something that an image layer can't."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path} can't stand in an image layer: {reason}")
        self.path = path
        self.reason = reason


class StorePathContentError(ChandleryError):
    """A file of a store path that tells Chandlery something can't be understood."""

    def __init__(self, store_path: str, file: str, reason: str) -> None:
        super().__init__(f"{store_path}/{file}: {reason}")
        self.store_path = store_path
        self.file = file
        self.reason = reason


class StorageError(ChandleryError):
    """The data folder can't be read or written, or the bucket that has the blobs."""


class StorageFullError(StorageError):
    """There is no space left where the data folder is."""

    def __init__(self, path: str) -> None:
        super().__init__(f"no space left on the device that holds {path}: free some and pull again")
        self.path = path


class LowDiskError(StorageFullError):
    """Where the data folder is, `free` bytes are left, and the operator keeps `least` of them.

    `needed` is what the image would take of them, if that is known.
    """

    def __init__(self, path: str, free: int, least: int, needed: int = 0) -> None:
        what = f"the image needs {in_bytes(needed)} of what is free" if needed else "too little is left"
        StorageError.__init__(
            self,
            f"{what} on the device that holds {path}: {in_bytes(free)}, of which min_free_disk keeps "
            f"{in_bytes(least)}: free some, set disk_limit or lower min_free_disk, and pull again",
        )
        self.path = path
        self.free = free
        self.least = least
        self.needed = needed
