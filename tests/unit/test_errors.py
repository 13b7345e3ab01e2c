import inspect
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_type_hints

import pytest

from chandlery import errors
from chandlery.errors import ChandleryError

CLASSES = [
    found
    for _, found in inspect.getmembers(errors, inspect.isclass)
    if issubclass(found, ChandleryError) and found.__module__ == errors.__name__
]
EXAMPLES: Mapping[Any, Any] = {
    str: "text",
    float: 1.5,
    int: 1,
    Sequence[str]: ("one", "two"),
    Mapping[str, str]: {"one": "reason"},
    Mapping[str, Sequence[str]]: {"one": ("two",)},
    Mapping[str, Mapping[str, str]]: {"one": {"reason": "unfree", "message": "why"}},
}
each_class = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)


def example(kind: type[ChandleryError]) -> ChandleryError:
    """Make an error of a class from what its constructor says that it takes."""
    if kind.__init__ is Exception.__init__:
        return kind("text")
    hints = get_type_hints(kind.__init__)
    hints.pop("return")
    return kind(*(EXAMPLES[hint] for hint in hints.values()))


@each_class
def test_an_error_comes_back_whole_from_another_process(kind: type[ChandleryError]) -> None:
    error = example(kind)
    revived = pickle.loads(pickle.dumps(error))  # noqa: S301 (made on the line itself)
    assert type(revived) is kind
    assert str(revived) == str(error)
    assert vars(revived) == vars(error)


@each_class
def test_an_error_tells_a_person_something(kind: type[ChandleryError]) -> None:
    assert str(example(kind)).strip()


def drawn(tree: str) -> Iterator[tuple[str, str]]:
    """Yield the pairs of class and parent that a drawn tree has."""
    parents: list[str] = []
    for line in tree.splitlines():
        match = re.match(r"((?:│   |    )*(?:├── |└── )?)(\w+Error)\b", line)
        if match:
            depth = len(match[1]) // 4
            parents[depth:] = [match[2]]
            if depth:
                yield match[2], parents[depth - 1]


def test_the_docstring_draws_the_tree_as_it_is() -> None:
    documented = errors.__doc__ or ""
    assert dict(drawn(documented)) == {
        kind.__name__: kind.__base__.__name__
        for kind in CLASSES
        if kind is not ChandleryError and kind.__base__
    }


def test_a_missing_package_is_told_with_its_nearest_names() -> None:
    error = errors.PackagesNotFoundError(["gti", "xyzzy"], {"gti": ["git", "gtk"], "xyzzy": []})
    assert str(error) == "not in the package set: gti (did you mean git, gtk?), xyzzy"


def test_a_failed_build_is_told_with_its_last_lines() -> None:
    error = errors.BuildError("git-2.39", "its builder failed with exit code 2", ["cc: error", "make: stop"])
    assert str(error).splitlines() == [
        "git-2.39 could not be built: its builder failed with exit code 2",
        "  cc: error",
        "  make: stop",
    ]
