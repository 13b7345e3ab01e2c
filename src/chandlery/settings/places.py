"""The places that settings come from: options, variables, the settings file, Nixery's variables.

What the first place says counts, and tables are joined key by key. Which place a value is from is never
guessed: it is looked up in what each of them said.
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import msgspec
from pydantic import BaseModel

from chandlery.errors import SettingsError

VARIABLE_PREFIX = "CHANDLERY_"

# The way to a value: `("sources", "ours", "tags")`.
KeyPath = Sequence[str | int]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value is from: `kind` is option, variable, nixery (a variable of Nixery's), file or default."""

    kind: str
    name: str = ""

    def __str__(self) -> str:
        """Return it as people read it."""
        words = {"nixery": "Nixery's variable", "option": "option", "variable": "variable", "file": "file"}
        return f"{words[self.kind]} {self.name}" if self.kind in words else self.kind


DEFAULT = Origin("default")


@dataclass(frozen=True, slots=True)
class Place:
    """What one place says, and for each setting what the operator wrote it as there."""

    values: Mapping[str, Any]
    origins: Mapping[str, Origin]


class Places:
    """All places, the one that counts most first."""

    def __init__(self, places: Iterable[Place]) -> None:
        self._places = tuple(places)

    def values(self) -> dict[str, Any]:
        """Return what they say together."""
        together: dict[str, Any] = {}
        for place in reversed(self._places):
            together = _over(place.values, together)
        return together

    def origin(self, path: KeyPath) -> Origin:
        """Return where a value is from; one that nobody said is the default."""
        for place in self._places:
            if _says(place.values, path):
                return place.origins[str(path[0])]
        return DEFAULT


def options(given: Mapping[str, Any]) -> Place:
    """Return the options of the command line; those that are None were not given."""
    values = {name: value for name, value in given.items() if value is not None}
    return Place(values, {name: Origin("option", f"--{name.replace('_', '-')}") for name in values})


def settings_file(file: Path, named_by: str) -> Place:
    """Read the settings file; `SettingsError` if it can't be, or isn't TOML."""
    try:
        values = tomllib.loads(file.read_text())
    except OSError as error:
        raise SettingsError(f"{named_by} names {file}, which can't be read: {error.strerror}") from error
    except ValueError as error:  # of TOML, and of UTF-8
        raise SettingsError(f"{file} is not TOML: {error}") from error
    return Place(values, {name: Origin("file", str(file)) for name in values})


def variables(settings_type: type[BaseModel], environment: Mapping[str, str]) -> Place:
    """Read the variables that are settings: `CHANDLERY_` and a name. One that is empty is as if not set.

    Tables are JSON, lists are JSON or have commas between their entries. `SettingsError` names a variable
    that is neither.
    """
    said = {name.upper(): value for name, value in environment.items() if value}
    values = {}
    for name, field in settings_type.model_fields.items():
        value = said.get(variable(name))
        if value is not None and not (name == "port" and is_of_kubernetes(value)):
            values[name] = _decoded(name, field.annotation, value)
    return Place(values, {name: Origin("variable", variable(name)) for name in values})


def variable(setting: str) -> str:
    """Return the variable of a setting."""
    return f"{VARIABLE_PREFIX}{setting}".upper()


def is_of_kubernetes(value: str) -> bool:
    """Return whether a value is what Kubernetes says beside a service called chandlery: an address."""
    return value.startswith(("tcp://", "udp://", "sctp://"))


def _decoded(setting: str, annotation: Any, text: str) -> Any:
    """Return what a variable says: a text, a list or a table. Raises `SettingsError`."""
    if _is(annotation, _LISTS) and not text.lstrip().startswith("["):
        return [entry.strip() for entry in text.split(",") if entry.strip()]
    if not _is(annotation, _LISTS | _TABLES):
        return text
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise SettingsError(
            f"{setting}: write it as JSON, or in the settings file (variable {variable(setting)})"
        ) from error


_LISTS = frozenset({tuple})
_TABLES = frozenset({Mapping, BaseModel})


def _is(annotation: Any, kinds: frozenset[type]) -> bool:
    """Return whether a type, or one of several, is of these kinds."""
    if get_origin(annotation) in (Union, UnionType):
        return any(_is(each, kinds) for each in get_args(annotation))
    plain = get_origin(annotation) or annotation
    return isinstance(plain, type) and any(issubclass(plain, kind) for kind in kinds)


def _over(upper: Mapping[str, Any], lower: Mapping[str, Any]) -> dict[str, Any]:
    """Return both tables as one; where both say something, it is `upper` that counts."""
    both = dict(lower)
    for key, value in upper.items():
        below = both.get(key)
        both[key] = (
            _over(value, below) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
        )
    return both


def _says(values: Any, path: KeyPath) -> bool:
    for key in path:
        if not isinstance(values, Mapping):
            return True  # the value as a whole, such as a text that stands for a table
        if key not in values:
            return False
        values = values[key]
    return True
