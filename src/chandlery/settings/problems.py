"""What is wrong with the settings, told for each of them by its full name and the place that it is from.

pydantic says which value breaks which rule; the words are Chandlery's. A password is in none of them.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from chandlery.errors import SettingsError
from chandlery.image.nearest import nearest
from chandlery.settings.places import DEFAULT, KeyPath, Places
from chandlery.settings.values import MASK, dotted, shown, without_secrets

# See `nearest`: what is less alike is another name.
_SIMILAR_ENOUGH = 0.6


class ContradictionError(ValueError):
    """Settings that don't go together; `path` is the one to change."""

    def __init__(self, path: Sequence[str], reason: str) -> None:
        super().__init__(reason)
        self.path = tuple(path)


def settings_error(error: ValidationError, model: type[BaseModel], places: Places) -> SettingsError:
    """Return everything that pydantic found, in one line."""
    return SettingsError("; ".join(dict.fromkeys(_problem(each, model, places) for each in error.errors())))


def meant_by(name: str, known: Iterable[str]) -> str:
    """Return the known name that was probably meant; empty if none is like it."""
    return next(iter(nearest(name.lower(), [*known], similar_enough=_SIMILAR_ENOUGH)), "")


def _problem(details: ErrorDetails, model: type[BaseModel], places: Places) -> str:
    path: KeyPath = details["loc"]
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, ContradictionError):
        path = cause.path
    # pydantic says so of a key that a table has, rather than of its value.
    path = [key for key in path if key != "[key]"]
    keys = [key for key in path if isinstance(key, str)]
    # What is missing nobody said; but who said the rest of its table did.
    origin = places.origin(path[:-1] if details["type"] == "missing" else path)
    where = "" if origin == DEFAULT else f" ({origin})"
    return f"{dotted(tuple(keys))}: {_reason(details, model)}{where}"


def _reason(details: ErrorDetails, model: type[BaseModel]) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return _unknown(details["loc"], model)
    if kind == "missing":
        return "it has to be there"
    if kind == "value_error":
        return without_secrets(str(context["error"]))
    told = _RULES.get(kind)
    if told is None:
        return details["msg"][:1].lower() + details["msg"][1:]
    keys = tuple(str(key) for key in details["loc"] if isinstance(key, str))
    value = shown(keys, details["input"])
    return told(value if value == MASK else repr(value), context)


def _unknown(path: KeyPath, model: type[BaseModel]) -> str:
    known = _keys(model, path[:-1])
    meant = meant_by(str(path[-1]), known)
    what = "setting" if len(path) == 1 else "key"
    if meant:
        return f"there is no such {what}: did you mean {meant}?"
    return f"there is no such {what}" + (f": there are {', '.join(sorted(known))}" if len(path) > 1 else "")


def _keys(annotation: Any, path: KeyPath) -> Collection[str]:
    """Return the keys of the table that a path leads to, from a type on."""
    keys = _fields(annotation)
    if not path:
        return keys
    if keys:
        return _keys(keys[str(path[0])], path[1:]) if path[0] in keys else {}
    # The values of a mapping, or one of several types.
    arguments = get_args(annotation)
    if isinstance(get_origin(annotation), type) and issubclass(get_origin(annotation), Mapping):
        return _keys(arguments[1], path[1:])
    return next(filter(None, (_keys(each, path) for each in arguments)), {})


def _fields(annotation: Any) -> Mapping[str, Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {field.alias or name: field.annotation for name, field in annotation.model_fields.items()}
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return {field.name: field.type for field in dataclasses.fields(annotation)}
    return {}


_WHOLE_NUMBER = "is no whole number"
_NUMBER = "is no number"
_TABLE = "is no table"

# By pydantic's name for a broken rule, from the value (as Python writes it) and what the rule says.
_RULES: Mapping[str, Callable[[str, Mapping[str, Any]], str]] = {
    **dict.fromkeys(
        ("int_parsing", "int_type", "int_from_float", "int_parsing_size"),
        lambda value, _: f"{value} {_WHOLE_NUMBER}",
    ),
    **dict.fromkeys(("float_parsing", "float_type", "finite_number"), lambda value, _: f"{value} {_NUMBER}"),
    **dict.fromkeys(("bool_parsing", "bool_type"), lambda value, _: f"{value} is neither true nor false"),
    **dict.fromkeys(
        ("model_type", "model_attributes_type", "dataclass_type", "dict_type", "mapping_type"),
        lambda value, _: f"{value} {_TABLE}",
    ),
    **dict.fromkeys(
        ("tuple_type", "list_type"),
        lambda value, _: f"{value} is no list: write it in brackets, as [{value}]",
    ),
    "string_type": lambda value, _: f"{value} is no text: write it in quotes",
    "path_type": lambda value, _: f"{value} is no path: write it in quotes",
    "literal_error": lambda value, rule: f"{value} is none of {rule['expected'].replace(chr(39), '')}",
    "greater_than": lambda value, rule: f"{value} is too little: it must be more than {rule['gt']:g}",
    "greater_than_equal": lambda value, rule: f"{value} is too little: {rule['ge']:g} is the least",
    "less_than": lambda value, rule: f"{value} is too much: it must be less than {rule['lt']:g}",
    "less_than_equal": lambda value, rule: f"{value} is too much: {rule['le']:g} is the most",
}
