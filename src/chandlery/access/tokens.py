"""Tokens for pulling: JSON Web Tokens, as distribution's "Token Authentication Implementation" has them.

A token says who it is for, what it may pull and until when. It is signed (HS256) with a key that only
the servers of one registry have. The client doesn't look into it, and nothing in it is secret.
"""

import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jwt

from chandlery.errors import CredentialsError, SettingsError

SERVICE = "chandlery"
_ALGORITHM = "HS256"
# RFC 7518, section 3.2: a key of the size of the hash output or larger.
_KEY_BYTES = 32
_MOST_REMEMBERED = 1_000


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token says: the user, empty for who hasn't logged in, and the repositories to pull from.

    `password_version` is that of `Users.version`: a token is worth nothing after the password was changed.
    """

    user: str
    password_version: str
    repositories: frozenset[str]


class Tokens:
    """Makes and reads tokens that are good for `lifetime` seconds."""

    def __init__(self, key: bytes, lifetime: int, *, clock: Callable[[], float] = time.time) -> None:
        self._key = key
        self._clock = clock
        self.lifetime = lifetime
        # A client sends its token with each of a hundred blobs, and checking one costs more than the rest.
        self._decode = lru_cache(_MOST_REMEMBERED)(self._decoded)

    def issue(self, grant: Grant) -> str:
        """Make a token."""
        now = int(self._clock())
        access = [
            {"type": "repository", "name": name, "actions": ["pull"]} for name in sorted(grant.repositories)
        ]
        claims = {
            "iss": SERVICE,
            "aud": SERVICE,
            "sub": grant.user,
            "iat": now,
            "exp": now + self.lifetime,
            "password_version": grant.password_version,
            "access": access,
        }
        return jwt.encode(claims, self._key, _ALGORITHM)

    def read(self, token: str) -> Grant:
        """Read a token; `CredentialsError` if it isn't one of these, or too old."""
        grant, end = self._decode(token)
        if end <= self._clock():
            raise CredentialsError("the token is too old: pull again", "invalid_token")
        return grant

    def _decoded(self, token: str) -> tuple[Grant, float]:
        """Return what a token says, and its end in seconds since the epoch."""
        options: Any = {"require": ["exp", "sub", "aud", "iss"], "verify_exp": False, "verify_iat": False}
        try:
            claims = jwt.decode(
                token, self._key, [_ALGORITHM], options=options, audience=SERVICE, issuer=SERVICE
            )
        except jwt.InvalidTokenError:
            # The reason could quote the token.
            raise CredentialsError("the token isn't this server's: log in again", "invalid_token") from None
        repositories = frozenset(entry["name"] for entry in claims["access"])
        return Grant(claims["sub"], claims["password_version"], repositories), claims["exp"]


def load_key(file: Path) -> bytes:
    """Read the signing key; a file that isn't there gets a new one. Raises `SettingsError`."""
    try:
        if not file.exists():
            _make_key(file)
        mode, key = file.stat().st_mode, file.read_bytes()
    except OSError as error:
        raise SettingsError(f"the token key {file} can't be used: {error.strerror}") from error
    if mode & 0o077:
        raise SettingsError(f"others may read the token key: chmod 600 {file}")
    if len(key) < _KEY_BYTES:
        raise SettingsError(f"the token key {file} is too short: it takes {_KEY_BYTES} random bytes")
    return key


def _make_key(file: Path) -> None:
    """Write a new key; of two processes that do so at once, one's is taken, and whole."""
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as output:
            output.write(secrets.token_bytes(_KEY_BYTES))
            os.fsync(descriptor)
        if not file.exists():
            os.link(temporary, file)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
