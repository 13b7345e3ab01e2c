"""Store paths and their closures, as Nix means them; pure data.

Sizes are nar sizes: the size of one store path by itself. The size of a closure is the sum over its nodes,
and is never added to another closure's, which would count shared paths twice.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import total_ordering
from pathlib import PurePosixPath
from typing import Self

# Nix base-32 has no e, o, t and u (Nix manual, "Store Path").
_BASE_NAME = re.compile(r"([0-9a-df-np-sv-z]{32})-([0-9a-zA-Z+\-._?=]{1,211})")


@total_ordering
@dataclass(frozen=True, slots=True)
class StorePath:
    """A store path such as `/nix/store/<hash>-git-2.39.5`; ordered by name first, then by hash.

    The name comes first so that an order doesn't change when only the hash does.
    """

    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Check that `text` is a whole store path, nothing below one; `ValueError` if not."""
        if _BASE_NAME.fullmatch(PurePosixPath(text).name) is None or not text.startswith("/"):
            raise ValueError(f"{text!r} is not a store path")
        return cls(text)

    @property
    def base_name(self) -> str:
        """The last part: `<hash>-<name>`."""
        return self.text.rpartition("/")[2]

    @property
    def name(self) -> str:
        """What follows the hash: `git-2.39.5`."""
        return self.base_name[33:]

    def __lt__(self, other: "StorePath") -> bool:
        return (self.name, self.text) < (other.name, other.text)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class ClosureNode:
    """One store path of a closure: its own size in bytes and the store paths it refers to."""

    path: StorePath
    nar_size: int
    references: tuple[StorePath, ...]


@dataclass(frozen=True, slots=True)
class Closure:
    """The roots and everything they refer to, directly or not; nodes sorted, each once."""

    roots: tuple[StorePath, ...]
    nodes: tuple[ClosureNode, ...]

    @classmethod
    def of(cls, roots: Iterable[StorePath], nodes: Iterable[ClosureNode]) -> Self:
        """Sort, and leave a store path's reference to itself out."""
        unique = {node.path: node for node in nodes}
        return cls(
            tuple(sorted(set(roots))),
            tuple(
                ClosureNode(path, node.nar_size, tuple(sorted(set(node.references) - {path})))
                for path, node in sorted(unique.items())
            ),
        )

    @property
    def nar_size(self) -> int:
        """The size of the whole closure in bytes."""
        return sum(node.nar_size for node in self.nodes)
