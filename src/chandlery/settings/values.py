"""How settings are shown: as lines of TOML, under their full names, and without what is secret. No I/O."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "***"

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SECRET_NAME = re.compile(r"secret|token|password|passwd|credential|(^|_)(sas|key)", re.IGNORECASE)
# RFC 3986, section 3.2.1: what stands before the @. A password may have characters that it should not, but is
# no port.
_USER = re.compile(r"([a-z][a-z0-9+.-]*://)([^/?#@\s:]*)(:(?![0-9]+/)\S*)?@", re.IGNORECASE)
_QUERY = re.compile(r"([?&][^=&\s]*(?:token|key|secret|password|sig)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """Return a text without the passwords and tokens of the URLs in it."""
    return _QUERY.sub(rf"\1{MASK}", _USER.sub(_without_password, text))


def _without_password(match: re.Match[str]) -> str:
    scheme, user, password = match.groups()
    # With http a token may stand in the place of the name; with ssh the name is mostly `git`, and no secret.
    if scheme.lower().endswith(("http://", "https://")):
        return f"{scheme}{MASK}@"
    return f"{scheme}{user}:{MASK}@" if password else match[0]


def shown(path: tuple[str, ...], value: Any) -> Any:
    """Return a value as others may see it; what is below a setting, and called as secrets are, is masked."""
    if len(path) > 1 and value and _SECRET_NAME.search(path[-1]):
        return MASK
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, list | tuple):
        return [shown(path[:1], each) for each in value]
    return value


def leaves(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the values of a table, each with its whole path; an empty table is a value."""
    if isinstance(value, Mapping) and value:
        for key, each in value.items():
            yield from leaves((*path, str(key)), each)
    else:
        yield path, value


def dotted(path: tuple[str, ...]) -> str:
    """Return a path as TOML writes it (TOML 1.0, "Keys")."""
    return ".".join(key if _BARE_KEY.fullmatch(key) else _text(key) for key in path)


def toml(value: Any) -> str:
    """Write a value as TOML, which has no word for None."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, Mapping):
        entries = ", ".join(f"{dotted((str(key),))} = {toml(each)}" for key, each in value.items())
        return f"{{ {entries} }}" if entries else "{}"
    return json.dumps(value)


def _text(value: str) -> str:
    # A string of JSON is one of TOML, but for one character that JSON leaves as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
