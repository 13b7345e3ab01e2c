"""The token endpoint: a token for a password, or for nothing if who has not logged in may pull.

GET is distribution's "Token Authentication Specification", POST its "Oauth2 Token Authentication", which
containerd tries first. There are no refresh tokens: clients keep the password.
"""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from chandlery.access.authorization import Credentials, Password, parse_authorization, pull_scope, pull_scopes
from chandlery.access.control import AccessControl, Accounts
from chandlery.errors import CredentialsError
from chandlery.image.name import NamePrefixes

# Passwords and scopes are short.
_LARGEST_FORM = 16 << 10
_FORM_TIMEOUT = 10.0  # seconds
_NO_STORE = {"cache-control": "no-store"}


class TokenEndpoint:
    """Answers GET and POST; `name_prefixes` is that of image names."""

    def __init__(self, control: AccessControl, accounts: Accounts, name_prefixes: NamePrefixes) -> None:
        self._control = control
        self._accounts = accounts
        self._name_prefixes = name_prefixes

    async def __call__(self, request: Request) -> Response:
        """Return a token. Raises `CredentialsError` and `RateLimitError`."""
        credentials = parse_authorization(request.headers.get("authorization"))
        if request.method == "POST":
            form = parse_qs((await _body(request)).decode("latin-1"), encoding="utf-8", errors="replace")
            credentials = _form_credentials(form) or credentials
            scopes: Sequence[str] = form.get("scope", [])
        else:
            scopes = request.query_params.getlist("scope")
        if credentials is None and not self._accounts.anonymous:
            raise CredentialsError("log in first: this server has users")
        client = await self._control.identify(request, credentials)
        grant = self._control.grant(client, pull_scopes(scopes), self._name_prefixes)
        token = self._accounts.tokens.issue(grant)
        answer = {
            "token": token,
            "access_token": token,
            "scope": " ".join(pull_scope(name) for name in sorted(grant.repositories)),
            "expires_in": self._accounts.tokens.lifetime,
            "issued_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return JSONResponse(answer, headers=_NO_STORE)


def _form_credentials(form: Mapping[str, Sequence[str]]) -> Credentials | None:
    """Return what the form of a POST says, of which `grant_type=password` is the only kind."""
    if form.get("grant_type", ["password"]) != ["password"]:
        raise CredentialsError("there are no refresh tokens here: log in with a password")
    user, password = form.get("username", [""])[0], form.get("password", [""])[0]
    return Password(user, password) if user else None


async def _body(request: Request, timeout: float = _FORM_TIMEOUT) -> bytes:
    """Return the form of a request; a client that stops sending it holds no connection for long."""
    body = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for part in request.stream():
                body += part
                if len(body) > _LARGEST_FORM:
                    raise CredentialsError("the form is too large")
    except TimeoutError:
        raise CredentialsError("the form has not come in time") from None
    return bytes(body)
