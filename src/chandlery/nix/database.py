"""What a Nix store of Chandlery's own holds, read from its database in a tenth of the time that Nix takes.

Nothing is written there. The database is an inside matter of Nix, so its version is looked at each time: for
another one, or one that can't be read, `DatabaseUnreadableError` says to ask Nix instead.

    nix/var/nix/db/schema       10, since Nix 2.0
    nix/var/nix/db/db.sqlite    ValidPaths (path, narSize, ca), Refs, DerivationOutputs
"""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from chandlery.nix.closure import Closure, ClosureNode, StorePath

_SCHEMA = "10"
# Seconds; Nix holds the database for milliseconds.
_BUSY_TIMEOUT = 5.0

# JSON, since a query has a limited number of parameters.
_VALID = "SELECT path FROM ValidPaths WHERE path IN (SELECT value FROM json_each(?))"
_NEEDED = """
WITH RECURSIVE needed (id) AS (
    SELECT id FROM ValidPaths WHERE path IN (SELECT value FROM json_each(?))
    UNION
    SELECT Refs.reference FROM Refs JOIN needed ON Refs.referrer = needed.id
)
"""
_NODES = f"{_NEEDED} SELECT id, path, narSize FROM ValidPaths JOIN needed USING (id)"  # noqa: S608
_REFERENCES = f"{_NEEDED} SELECT referrer, reference FROM Refs JOIN needed ON referrer = needed.id"  # noqa: S608
# What derivations make. Those that need no other fetch something, as a .deb, which is unpacked by another.
_MADE = f"""
{_NEEDED} SELECT needed.id, DerivationOutputs.path, ValidPaths.narSize
FROM needed JOIN DerivationOutputs ON DerivationOutputs.drv = needed.id
LEFT JOIN ValidPaths ON ValidPaths.path = DerivationOutputs.path
WHERE EXISTS (SELECT 1 FROM Refs WHERE referrer = needed.id)
"""  # noqa: S608
# All outputs, also of what fetches something.
_OUTPUTS = f"""
{_NEEDED} SELECT made_by.path, DerivationOutputs.path, made.id, made.narSize
FROM needed JOIN DerivationOutputs ON DerivationOutputs.drv = needed.id
JOIN ValidPaths AS made_by ON made_by.id = needed.id
LEFT JOIN ValidPaths AS made ON made.path = DerivationOutputs.path
"""  # noqa: S608
# A number is never given twice (AUTOINCREMENT).
_NEWEST = "SELECT max(id) FROM ValidPaths"


class DatabaseUnreadableError(Exception):
    """Nix has to be asked; the text says why."""


@dataclass(frozen=True, slots=True)
class Additions:
    """What derivations, and those that they need, have added to a store.

    `registered` are the bytes of what Nix has registered as whole; `unfinished` are derivations, and outputs
    of theirs that aren't there.
    """

    registered: int
    unfinished: tuple[tuple[StorePath, StorePath], ...]


class NixDatabase:
    """The database of the store in `folder`; all methods block for milliseconds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "nix/var/nix/db"

    def valid(self, paths: Iterable[str]) -> set[str]:
        """Return those of some store paths that are there, with all that they need."""
        with self._opened() as database:
            return {path for (path,) in database.execute(_VALID, (_json(paths),))}

    def closure(self, roots: Iterable[StorePath]) -> Closure:
        """Return the closure of those of some store paths that are there."""
        wanted = set(roots)
        names = _json(path.text for path in wanted)
        with self._opened() as database:
            # In one transaction, lest a collector comes between.
            database.execute("BEGIN")
            nodes = database.execute(_NODES, (names,)).fetchall()
            references = _grouped(database.execute(_REFERENCES, (names,)))
        paths = {number: StorePath.parse(path) for number, path, _ in nodes}
        return Closure.of(
            wanted & set(paths.values()),
            (
                ClosureNode(paths[number], size or 0, tuple(paths[it] for it in references.get(number, ())))
                for number, _, size in nodes
            ),
        )

    def made_by(self, derivations: Iterable[str]) -> tuple[Closure, frozenset[StorePath]]:
        """Return all that derivations, and those that they need, make or will make, and what of it is there.

        The size of what isn't there is 0. What derivations fetch is left out.
        """
        names = _json(derivations)
        with self._opened() as database:
            database.execute("BEGIN")
            made = database.execute(_MADE, (names,)).fetchall()
            references = _grouped(database.execute(_REFERENCES, (names,)))
        outputs: dict[int, list[StorePath]] = {}
        for number, path, _ in made:
            outputs.setdefault(number, []).append(StorePath.parse(path))
        closure = Closure.of(
            (),
            (
                ClosureNode(
                    StorePath.parse(path),
                    size or 0,
                    tuple(it for needed in references.get(number, ()) for it in outputs.get(needed, ())),
                )
                for number, path, size in made
            ),
        )
        return closure, frozenset(StorePath.parse(path) for _, path, size in made if size is not None)

    def newest(self) -> int:
        """Return the number of what was registered last; whatever comes later has a higher one."""
        with self._opened() as database:
            return database.execute(_NEWEST).fetchone()[0] or 0

    def added(self, derivations: Iterable[str], since: int) -> Additions:
        """Return what derivations, and those that they need, have added `since` a number of `newest`."""
        with self._opened() as database:
            outputs = database.execute(_OUTPUTS, (_json(derivations),)).fetchall()
        return Additions(
            sum(size or 0 for _, _, number, size in outputs if number is not None and number > since),
            tuple(
                (StorePath.parse(derivation), StorePath.parse(output))
                for derivation, output, number, _ in outputs
                if number is None and output
            ),
        )

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            schema = (self._folder / "schema").read_text().strip()
            if schema != _SCHEMA:
                raise DatabaseUnreadableError(f"its schema is {schema}, and this program reads {_SCHEMA}")
            address = f"{(self._folder / 'db.sqlite').as_uri()}?mode=ro"
            connected = sqlite3.connect(address, uri=True, timeout=_BUSY_TIMEOUT, isolation_level=None)
            with closing(connected) as database:
                yield database
        except (OSError, sqlite3.Error) as error:
            raise DatabaseUnreadableError(str(error)) from error


def _json(texts: Iterable[str]) -> str:
    return msgspec.json.encode(list(texts)).decode()


def _grouped(rows: Iterable[tuple[int, int]]) -> Mapping[int, list[int]]:
    grouped: dict[int, list[int]] = {}
    for referrer, reference in rows:
        grouped.setdefault(referrer, []).append(reference)
    return grouped
