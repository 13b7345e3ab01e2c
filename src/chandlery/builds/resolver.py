"""From attribute paths to derivations: asked of Nix once per pin, and then remembered.

What an attribute path gives at a pin never changes, so a new mix of known packages calls no evaluator. What
is missing or can't be evaluated is told, all of it at once, with the nearest names, and asked for again the
next time; it is remembered only for `derivations`, to which it is an answer.
"""

import asyncio
from collections.abc import Mapping, Sequence

import msgspec
import structlog

from chandlery.builds.index import ResolutionRecords
from chandlery.errors import EvaluationError, NixError, PackagesNotFoundError, StorageError, evaluation_error
from chandlery.image.nearest import nearest
from chandlery.nix.nix import Resolution
from chandlery.nix.pinned_source import PinnedSource
from chandlery.nix.stores import NixStores
from chandlery.oci.digest import Digest
from chandlery.telemetry.metrics import Metrics

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# Goes up when the expressions of `nix/expressions` make other derivations of the same package set.
_DERIVATIONS_VERSION = "5"

# Sets of names that are kept, those within sets included.
_MOST_PLACES = 100
# Seconds that who pulls waits for suggestions, at most.
_SUGGESTIONS_TIMEOUT = 20.0
# See `nearest`.
_SIMILAR_WITH_DOTS = 0.75


class PackageResolver:
    """Resolves in any pinned source, for any system (`x86_64-linux`)."""

    def __init__(self, nix: NixStores, index: ResolutionRecords, metrics: Metrics | None = None) -> None:
        self._metrics = metrics or Metrics()
        self._nix = nix
        self._index = index
        self._names: dict[tuple[str, ...], list[str]] = {}

    async def remembers(self, pin: PinnedSource, system: str, attribute_paths: Sequence[str]) -> bool:
        """Return whether `resolve` would evaluate nothing."""
        known = await self.known(pin, system, attribute_paths)
        return all(path in known for path in attribute_paths)

    async def resolve(
        self, pin: PinnedSource, system: str, attribute_paths: Sequence[str], *, remembered: bool = True
    ) -> Mapping[str, Resolution]:
        """Find a derivation for every attribute path; with `remembered` false, by evaluation alone.

        Raises `PackagesNotFoundError` and `EvaluationError`, each with all the packages that it is about.
        """
        known = dict(await self.known(pin, system, attribute_paths)) if remembered else {}
        unknown = [path for path in attribute_paths if path not in known]
        self._metrics.looked_up("resolution", hits=len(known), misses=len(unknown))
        if not unknown:
            return known
        answers = await self._nix.of(pin).resolve(pin, system, unknown)
        missing = [path for path in unknown if answers[path].status == "not_found"]
        if missing:
            raise PackagesNotFoundError(missing, await self._suggestions(pin, system, missing))
        refused = {path: answers[path] for path in unknown if not answers[path].found}
        if refused:
            raise _refusal(refused)
        await self._remember(pin, system, answers)
        return known | answers

    async def known(
        self, pin: PinnedSource, system: str, attribute_paths: Sequence[str]
    ) -> Mapping[str, Resolution]:
        """Return what is remembered of attribute paths, and led to a derivation; see `resolve`."""
        records = await self._records(pin, system, attribute_paths)
        return {path: record for path, record in records.items() if record.found}

    async def derivations(
        self, pin: PinnedSource, system: str, attribute_paths: Sequence[str], sound: str
    ) -> Mapping[str, str]:
        """Return the derivation of each attribute path, and nothing for one that leads to none.

        `sound` is an attribute path that leads to one: if it doesn't now, the evaluation itself failed.
        Raises `EvaluationError` then, and for those that take more time or memory than there is.
        """
        answers = await self._records(pin, system, attribute_paths)
        unknown = [path for path in attribute_paths if path not in answers]
        if unknown:
            evaluated = await self._nix.of(pin).resolve(pin, system, [sound, *unknown])
            limited = {path: each for path, each in evaluated.items() if each.is_limit}
            if not evaluated[sound].found:
                limited[sound] = evaluated[sound]
            if limited:
                raise _refusal(limited)
            await self._remember(pin, system, {path: evaluated[path] for path in unknown})
            answers |= evaluated
        return {path: answers[path].derivation for path in attribute_paths if answers[path].found}

    async def _records(
        self, pin: PinnedSource, system: str, attribute_paths: Sequence[str]
    ) -> dict[str, Resolution]:
        records = await self._index.resolutions(_key(pin, system), attribute_paths)
        return {path: msgspec.json.decode(record, type=Resolution) for path, record in records.items()}

    async def _remember(self, pin: PinnedSource, system: str, answers: Mapping[str, Resolution]) -> None:
        records = {path: msgspec.json.encode(answer) for path, answer in answers.items()}
        await self._index.remember_resolutions(_key(pin, system), records)

    async def _suggestions(
        self, pin: PinnedSource, system: str, missing: Sequence[str]
    ) -> Mapping[str, Sequence[str]]:
        """Find the nearest names that the package set has, by edit distance; those that are found in time."""
        suggestions: dict[str, Sequence[str]] = {path: [] for path in missing}
        try:
            async with asyncio.timeout(_SUGGESTIONS_TIMEOUT):
                for path in missing:
                    suggestions[path] = await self._nearest(pin, system, path)
        except (TimeoutError, NixError, StorageError) as error:
            log.info("no suggestions", source=pin.location, reason=str(error) or "it took too long")
        return suggestions

    async def _nearest(self, pin: PinnedSource, system: str, path: str) -> list[str]:
        *parent, last = path.split(".")
        names = await self._names_below(pin, system, parent)
        found = [".".join([*parent, name]) for name in await asyncio.to_thread(nearest, last, names)]
        if parent and not found:
            # The dots may be part of a name, as in Debian's python3.11.
            names = await self._names_below(pin, system, [])
            found = await asyncio.to_thread(nearest, path, names, similar_enough=_SIMILAR_WITH_DOTS)
        return found

    async def _names_below(self, pin: PinnedSource, system: str, parent: Sequence[str]) -> list[str]:
        place = (*pin.key_parts, system, *parent)
        names = self._names.get(place)
        if names is None:
            names = await self._nix.of(pin).attribute_names(pin, system, parent)
            # A package set may have 100,000 names: those of a source's earlier pins are let go.
            self._names = {
                known: of
                for known, of in self._names.items()
                if known[:2] != place[:2] or known[2] == place[2]
            }
            self._names[place] = names
            if len(self._names) > _MOST_PLACES:
                del self._names[next(iter(self._names))]
        return names


def _key(pin: PinnedSource, system: str) -> str:
    return Digest.of_parts([_DERIVATIONS_VERSION, *pin.key_parts, system]).hex


def _refusal(answers: Mapping[str, Resolution]) -> EvaluationError:
    return evaluation_error(
        {path: {"reason": each.status, "message": each.message} for path, each in answers.items()}
    )
