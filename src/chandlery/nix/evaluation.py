"""What attribute paths give in a package set, whatever a package does to the evaluator.

All are asked for in one evaluation, which tells each answer as it comes. So where one ends the evaluation, or
takes all its time or memory, it is known which: the others are asked for again without it.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol

import msgspec

from chandlery.errors import (
    EvaluationFailedError,
    EvaluationMemoryError,
    EvaluationTimeoutError,
    NotAPackageError,
    StorageFullError,
)
from chandlery.image.name import paths_within
from chandlery.nix.closure import StorePath
from chandlery.nix.configuration import Purpose, host_paths
from chandlery.nix.output import MarkedLines
from chandlery.nix.pinned_source import PinnedSource

EXPRESSIONS = Path(__file__).resolve().parent / "expressions"

# Of the time for one evaluation: for all answers together, and then for the reasons of what is refused.
_PATIENCE, _PATIENCE_WITH_REASONS = 2.5, 0.5
# Reasons that are heard at once; each evaluates the package set anew.
_EXPLAINED_AT_ONCE = 2

# What has its reason already, or needs none.
_TOLD = ("found", "not_found", NotAPackageError.reason)


class Resolution(msgspec.Struct, frozen=True, kw_only=True):
    """What an attribute path gives: a derivation, or why there is none (`nix/expressions/resolve.nix`).

    `status` is "found", "not_found" or the `reason` of an `EvaluationError`. `path` are the parts of the
    attribute path as the package set writes them, `place` those of the set in which the first package on it
    stands; `other_names` are what else the package is called: its
    pname, Debian packages that are one derivation with it, what an alias stands for, and the packages that
    the path passes. They are None in what a version remembered that didn't ask for them.
    """

    status: str
    name: str = ""
    pname: str = ""
    version: str = ""
    main_program: str | None = msgspec.field(name="mainProgram", default=None)
    derivation: str = msgspec.field(name="drvPath", default="")
    output: str = ""
    outputs: dict[str, str] = {}
    message: str = ""
    path: tuple[str, ...] = ()
    place: tuple[str, ...] = ()
    other_names: tuple[str, ...] | None = msgspec.field(name="otherNames", default=None)

    @property
    def found(self) -> bool:
        """Return whether there is a derivation."""
        return self.status == "found"

    @property
    def store_path(self) -> StorePath:
        """The output that was asked for."""
        return StorePath.parse(self.outputs[self.output])

    @property
    def names(self) -> frozenset[str]:
        """All that the package is called, and all that stands in its attribute path."""
        return paths_within(self.path).union(self.other_names or ())

    @property
    def is_limit(self) -> bool:
        """Return whether a limit was reached, which depends on what else was asked for at once."""
        return self.status in (EvaluationTimeoutError.reason, EvaluationMemoryError.reason)

    def checked(self) -> "Resolution":
        """Return this if its paths are what they should be; a package set may claim anything.

        What is no derivation in the store would be read as an expression, with no restriction.
        """
        with suppress(ValueError, KeyError):
            if not self.found or (self.store_path and StorePath.parse(self.derivation).name.endswith(".drv")):
                return self
        return failed("it has no derivation in the Nix store")


def failed(message: str, reason: str = EvaluationFailedError.reason) -> Resolution:
    """Return the answer of something that can't be evaluated."""
    return Resolution(status=reason, message=message)


class PackageSet:
    """A pinned source for a system as Chandlery's expressions take it, and what evaluation may read.

    A flake is evaluated purely: it has its own way to what is locked, and no other file can be read, these
    expressions included. So they are given as text.
    """

    def __init__(self, source: PinnedSource, system: str) -> None:
        described = source.to_nix()
        files: dict[str, str] = {
            name: _resolved(described[name]) for name in ("lock", "tree") if name in described
        }
        overlays = [_resolved(path) for path in described.get("overlays", ())]
        self.location = source.location
        self.purpose = Purpose.PURELY_EVALUATE if source.is_pure else Purpose.EVALUATE
        self._described = {**described, **files, "overlays": overlays}
        self._system = system
        readable = {f"overlay-{number}": path for number, path in enumerate(overlays)}
        self._readable: dict[str, str] = {"chandlery": str(EXPRESSIONS)} | files | readable

    def arguments(self, expression: str, about: Mapping[str, Any]) -> list[str]:
        """Return the arguments of `nix-instantiate` for an expression of Chandlery's own about this set."""
        request = {"source": self._described, "system": self._system, "hostPaths": host_paths(), **about}
        argument = ["--argstr", "request", msgspec.json.encode(request).decode()]
        if self.purpose is Purpose.PURELY_EVALUATE:
            return ["--expr", _alone(expression), *argument]
        allowed = [word for name, path in self._readable.items() for word in ("-I", f"{name}={path}")]
        return [str(EXPRESSIONS / expression), *allowed, *argument]

    def shortened(self, message: str) -> str:
        """Return a message without the folder of this machine in which the package set is."""
        tree = self._readable.get("tree")
        return message.replace(f"{tree}/", "") if tree else message


class Evaluate(Protocol):
    """Evaluates an expression about a package set for some seconds; gives its JSON, or why there is none."""

    async def __call__(
        self,
        packages: PackageSet,
        expression: str,
        about: Mapping[str, Any],
        timeout: float,
        on_output: Callable[[bytes], object] | None = None,
    ) -> bytes | Resolution:
        """Evaluate; `on_output` gets stderr as it comes."""
        ...


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Resolves attribute paths with evaluations of `limit` seconds; it takes three times that at most."""

    evaluate: Evaluate
    limit: float

    async def resolve(self, packages: PackageSet, attribute_paths: Sequence[str]) -> dict[str, Resolution]:
        """Return an answer for each. What took the time or memory that others left is tried again, alone."""
        left = _PATIENCE * self.limit
        answers: dict[str, Resolution] = {}
        suspects: dict[str, Resolution] = {}
        waiting = list(dict.fromkeys(attribute_paths))
        while waiting or suspects:
            if left <= 0:
                answers |= suspects | _without_time(waiting)
                break
            batch = waiting or [suspects.popitem()[0]]
            timeout, began = min(left, self.limit), time.monotonic()
            told, failure = await self._ask(packages, batch, timeout)
            # What it takes to stop a Nix that doesn't want to is nobody's.
            left -= min(timeout, time.monotonic() - began)
            answers |= told.answers
            waiting = [path for path in batch if path not in answers]
            if not waiting:
                continue
            if failure is None or not told.begun:
                # It is about the whole set, or answers make no sense.
                answers |= dict.fromkeys(waiting, failure or failed("Nix gave no answer"))
                break
            culprit, *waiting = waiting
            had_all = culprit == batch[0]
            (suspects if failure.is_limit and not had_all else answers)[culprit] = failure
        return await self._explained(packages, answers)

    async def _ask(
        self, packages: PackageSet, attribute_paths: Sequence[str], timeout: float
    ) -> "tuple[_Told, Resolution | None]":
        """Resolve attribute paths in one evaluation; give the answers that came, and why no more did."""
        told = _Told()
        mark = token_hex(16)
        about = {"attributePaths": list(attribute_paths), "mark": mark}
        lines = MarkedLines(mark, told.line)
        result = await self.evaluate(packages, "resolve.nix", about, timeout, lines)
        return told, result if isinstance(result, Resolution) else None

    async def _explained(
        self, packages: PackageSet, answers: Mapping[str, Resolution]
    ) -> dict[str, Resolution]:
        """Evaluate what was refused with nothing to catch its error, for the reason, while there is time."""
        explained = dict(answers)
        turns = asyncio.Semaphore(_EXPLAINED_AT_ONCE)
        timeout = _PATIENCE_WITH_REASONS * self.limit

        async def explain(path: str) -> None:
            try:
                async with turns:
                    said = await self.evaluate(packages, "explain.nix", {"attributePath": path}, timeout)
            except StorageFullError:
                return  # the answer is known, but for its reason
            if isinstance(said, Resolution) and not said.is_limit:
                # The error counts more than what the package says of itself: it may be another's.
                general = said.status == EvaluationFailedError.reason
                explained[path] = failed(said.message, answers[path].status if general else said.status)

        unexplained = [
            path for path, each in answers.items() if each.status not in _TOLD and not each.message
        ]
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout), asyncio.TaskGroup() as group:
                for path in unexplained:
                    group.create_task(explain(path))
        return explained


@dataclass(slots=True)
class _Told:
    """What an evaluation tells while it runs: that the package set could be read, and then answers."""

    answers: dict[str, Resolution] = field(default_factory=dict)
    begun: bool = False

    def line(self, text: bytes) -> None:
        self.begun = True
        if text.strip():
            with suppress(msgspec.MsgspecError):
                path, answer = msgspec.json.decode(text, type=tuple[str, Resolution])
                self.answers[path] = answer.checked()


def _without_time(attribute_paths: Sequence[str]) -> dict[str, Resolution]:
    message = "others that were asked for at once took all the time that there is"
    return dict.fromkeys(attribute_paths, failed(message, EvaluationTimeoutError.reason))


def _resolved(path: str) -> str:
    """Nix follows links before it looks whether it may read what is there."""
    return str(Path(path).resolve())


def _alone(name: str) -> str:
    """Return an expression together with the two that it imports."""
    expression, look_up, package_set = (
        (EXPRESSIONS / each).read_text() for each in (name, "look_up.nix", "package_set.nix")
    )
    return (
        f"{{ request }}:\n({expression})\n"
        f"{{ inherit request; lookUp =\n{look_up};\npackageSet =\n{package_set};\n}}"
    )
