"""What was probably meant by a name that doesn't exist: of packages, and of settings. No I/O."""

from collections.abc import Sequence

from rapidfuzz import process
from rapidfuzz.distance import OSA

_SUGGESTIONS = 3
_CANDIDATES = 50


def nearest(name: str, known: Sequence[str], *, similar_enough: float = 0.5) -> list[str]:
    """Return the known names that are spelled most alike, the nearest first, three at most.

    Two swapped letters are one mistake. How similar a name is, from 0 to 1: as many letters as the longer one
    has, less the mistakes, over that number. Of those that are equally near, one with the same letters comes
    first, then one with the same beginning.
    """
    found = process.extract(
        name, known, scorer=OSA.normalized_similarity, limit=_CANDIDATES, score_cutoff=similar_enough
    )
    letters = sorted(name)
    ranked = sorted(
        (-score, sorted(other) != letters, other[:1] != name[:1], other) for other, score, _ in found
    )
    return [other for *_, other in ranked[:_SUGGESTIONS]]
