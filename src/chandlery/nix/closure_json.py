"""Closures as Nix prints them. No I/O.

Two kinds are read: `nix path-info --json --recursive`, and what `exportReferencesGraph` writes for a
derivation with structured attributes (Nix manual, "Advanced Attributes").
"""

import posixpath
from collections.abc import Iterator
from typing import Any

import msgspec

from chandlery.nix.closure import Closure, ClosureNode, StorePath


class _Path(msgspec.Struct, frozen=True, rename="camel"):
    nar_size: int
    references: list[str]
    path: str = ""
    # What a store doesn't have is listed too, by older versions of Nix.
    valid: bool = True


def parse_closure(content: bytes) -> Closure:
    """Read either; `ValueError` says what is wrong, above all if a store path is missing.

    Roots are those that the file names, and else the store paths that no other refers to.
    """
    try:
        decoded: Any = msgspec.json.decode(content)
        paths = [(path, each) for path, each in _paths(decoded) if each.valid]
    except msgspec.MsgspecError as error:
        raise ValueError(f"it is not the JSON of a closure: {error}") from error
    folder = posixpath.dirname(paths[0][0]) if paths else ""
    nodes = [
        ClosureNode(
            StorePath.parse(path),
            each.nar_size,
            # Nix 2.19 and later may leave the store's folder out.
            tuple(StorePath.parse(posixpath.join(folder, reference)) for reference in each.references),
        )
        for path, each in paths
    ]
    known = {node.path for node in nodes}
    referred = {reference for node in nodes for reference in node.references if reference != node.path}
    missing = sorted(referred - known)
    if missing:
        raise ValueError(
            f"it lacks {missing[0]}, which another store path needs"
            f"{f', and {len(missing) - 1} more' if len(missing) > 1 else ''}: was it made with --recursive?"
        )
    named = _named_roots(decoded)
    return Closure.of(map(StorePath.parse, named) if named else known - referred, nodes)


def _paths(decoded: Any) -> Iterator[tuple[str, _Path]]:
    """Yield store paths from a list of objects, an object of objects, or the lists within an object."""
    if isinstance(decoded, list):
        for each in msgspec.convert(decoded, list[_Path]):
            yield each.path, each
        return
    for key, value in msgspec.convert(decoded, dict[str, Any]).items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and "narSize" in value[0]:
            yield from _paths(value)
        elif isinstance(value, dict) and "narSize" in value:
            yield key, msgspec.convert(value, _Path)


def _named_roots(decoded: Any) -> list[str]:
    """Return what `exportReferencesGraph` was made of: {"exportReferencesGraph": {NAME: [STORE PATH]}}."""
    if not isinstance(decoded, dict) or "exportReferencesGraph" not in decoded:
        return []
    graphs = msgspec.convert(decoded["exportReferencesGraph"], dict[str, str | list[str]])
    return sorted(
        {root for roots in graphs.values() for root in ([roots] if isinstance(roots, str) else roots)}
    )
