"""What clients say about themselves: Authorization headers and token scopes, read and never repeated. No I/O.

Basic is RFC 7617, Bearer RFC 6750; scopes are those of distribution's "Token Scope Documentation".
"""

import re
from base64 import b64decode
from collections.abc import Iterable
from dataclasses import dataclass, field

from chandlery.errors import CredentialsError

# A pull needs one, and a mount from another repository two.
MOST_SCOPES = 16

# RFC 7617, section 2: user and password have no control characters.
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# RFC 6750, section 2.1.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_PULL = "pull"


@dataclass(frozen=True, slots=True)
class Password:
    """A user and a password; the password isn't shown."""

    user: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class BearerToken:
    """A token, which isn't shown."""

    text: str = field(repr=False)


Credentials = Password | BearerToken


def parse_authorization(header: str | None) -> Credentials | None:
    """Read an Authorization header; None if there is none. Raises `CredentialsError` if it can't be read."""
    if not header:
        return None
    scheme, _, text = header.strip().partition(" ")
    match scheme.lower():
        case "basic":
            return _basic(text.strip())
        case "bearer" if _TOKEN.fullmatch(text.strip()):
            return BearerToken(text.strip())
    raise CredentialsError("the Authorization header is neither a Basic nor a Bearer one that can be read")


def _basic(text: str) -> Password | None:
    try:
        decoded = b64decode(text, validate=True).decode()
    except ValueError:
        decoded = ""
    user, separator, password = decoded.partition(":")
    if not separator or _CONTROL.search(decoded):
        raise CredentialsError("the Authorization header has no user and password that can be read")
    # Podman and skopeo send both empty when they have none.
    return Password(user, password) if user or password else None


def pull_scopes(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the repositories that scopes ask to pull from; what is no such scope is left out.

    `repository:shell/git:pull,push repository:jq:pull` gives `shell/git` and `jq`.
    """
    names = []
    for scope in " ".join(texts).split():
        kind, _, rest = scope.partition(":")
        name, _, actions = rest.rpartition(":")
        if kind == "repository" and name and _PULL in actions.split(","):
            names.append(name)
    return tuple(dict.fromkeys(names))[:MOST_SCOPES]


def pull_scope(name: str) -> str:
    """Return the scope that pulling from a repository takes."""
    return f"repository:{name}:{_PULL}"
