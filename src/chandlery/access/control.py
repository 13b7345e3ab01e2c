"""Who may ask, for what, and how often: the gate in front of the distribution API.

A request is let in with a user's password (Basic) or with a token (Bearer), which the token endpoint gives
for a password: distribution's "Token Authentication Specification". Without users everybody is let in, and
only rules and limits count. With users everybody needs one or the other; clients that have not logged in can
get a token without a password if the settings say so, as at other public registries.

A challenge asks for a token if it is known where clients reach this server, since they send the password to
the address in it; else for Basic, which goes where the request went.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request

from chandlery.access import client_address
from chandlery.access.authorization import BearerToken, Credentials, Password, parse_authorization, pull_scope
from chandlery.access.client_address import client_network
from chandlery.access.known_addresses import KnownAddresses
from chandlery.access.logins import Logins
from chandlery.access.public_address import PublicAddress
from chandlery.access.rules import EVERYTHING, AccessRules, Permission, Rule
from chandlery.access.tokens import SERVICE, Grant, Tokens
from chandlery.access.users import Users
from chandlery.errors import ChandleryError, CredentialsError, RateLimitError
from chandlery.image import name as image_name
from chandlery.image.name import ImageRequest, NamePrefixes
from chandlery.machine.token_buckets import Buckets, SharedTokenBuckets, TokenBuckets

TOKEN_PATH = "/v2/token"  # noqa: S105 (a path)

_USER_PREFIX = "user:"


@dataclass(frozen=True, slots=True)
class Client:
    """Who sent a request: a user, or an address alone; `repositories` is what a token is good for."""

    user: str | None
    address: str
    repositories: frozenset[str] | None = None

    @property
    def key(self) -> str:
        """What the client is counted under; no address begins like that of a user."""
        return client_network(self.address) if self.user is None else f"{_USER_PREFIX}{self.user}"


@dataclass(frozen=True, slots=True)
class Accounts:
    """The users, and the tokens that they get; `anonymous`: who hasn't logged in gets one, too.

    `known` is from where users have logged in.
    """

    users: Users
    tokens: Tokens
    anonymous: bool = False
    known: KnownAddresses = field(default_factory=KnownAddresses)


class AccessControl:
    """Lets clients in; without accounts nobody logs in.

    `sources` are what rules may call each package source, its text first, by the name in a request. What
    `restricts` is so that a digest has to belong to the image in whose name it is asked for. In the folder
    `shared` the workers of a server count together; without it there is one.
    """

    def __init__(
        self,
        rules: AccessRules,
        sources: Mapping[str, Sequence[str]],
        address: PublicAddress,
        accounts: Accounts | None = None,
        shared: Path | None = None,
    ) -> None:
        def buckets(what: str, period: float) -> Buckets:
            return SharedTokenBuckets(shared / what, period) if shared else TokenBuckets(period)

        self.accounts = accounts
        self.restricts = rules.restrict
        self._rules = rules
        self._sources = sources
        self._address = address
        self._requests = buckets("requests", 60.0)
        self._builds = buckets("builds", 3600.0)
        self._logins = Logins(accounts.users, accounts.known, buckets) if accounts else None

    async def admit(self, request: Request) -> Client:
        """Return who sent a request. Raises `CredentialsError` and `RateLimitError`."""
        credentials = parse_authorization(request.headers.get("authorization")) if self.accounts else None
        if self.accounts and credentials is None:
            raise CredentialsError("log in first: this server has users")
        return await self.identify(request, credentials)

    def authorize(self, client: Client, name: str, image: ImageRequest) -> Permission:
        """Return what a client may have of a repository; `PullDeniedError` if it may have nothing of it.

        Raises `CredentialsError` if its token is for something else.
        """
        permission = self._permission(client, image)
        permission.check_written(image)
        if client.repositories is not None and name not in client.repositories:
            raise CredentialsError("the token is for something else", "insufficient_scope")
        return permission

    async def identify(self, request: Request, credentials: Credentials | None) -> Client:
        """Return whose credentials these are, and count the request; see `admit`."""
        address = client_address.noted(request)
        if self.accounts is None or self._logins is None or credentials is None:
            client = Client(None, address)
        elif isinstance(credentials, Password):
            await self._logins.check(credentials, address)
            client = Client(credentials.user, address)
        else:
            client = _holder(self.accounts, credentials, address)
        limit = self._rule(client).requests_per_minute
        if limit:
            _raise_if(self._requests.take(client.key, limit), "requests", limit, "minute")
        return client

    def admit_build(self, client_key: str) -> None:
        """Count a build that a client causes; `RateLimitError` if it is one too many."""
        user = client_key.removeprefix(_USER_PREFIX) if client_key.startswith(_USER_PREFIX) else None
        limit = self._rules.of(user).builds_per_hour
        if limit:
            _raise_if(self._builds.take(client_key, limit), "builds", limit, "hour")

    def grant(self, client: Client, names: tuple[str, ...], name_prefixes: NamePrefixes) -> Grant:
        """Return what a token for a client is good for: those of the repositories that it may pull from."""
        allowed = set()
        for name in names:
            try:
                image = image_name.parse(name, image_name.LATEST, name_prefixes)
                self._permission(client, image).check_written(image)
            except ChandleryError:
                continue
            allowed.add(name)
        user = client.user or ""
        version = self.accounts.users.version(user) if self.accounts and user else None
        return Grant(user, version or "", frozenset(allowed))

    def challenge(self, request: Request, error: CredentialsError) -> str:
        """Return the WWW-Authenticate header of a request that was not let in (RFC 9110, section 11.6.1)."""
        url = self._address.of(request)
        if url is None or request.scope["path"] == TOKEN_PATH:
            return f'Basic realm="{SERVICE}"'
        parameters = {"realm": f"{url}{TOKEN_PATH}", "service": SERVICE}
        name = request.path_params.get("name")
        if name:
            parameters["scope"] = pull_scope(name)
        if error.code:
            parameters["error"] = error.code
        return "Bearer " + ",".join(f'{key}="{value}"' for key, value in parameters.items())

    def _permission(self, client: Client, image: ImageRequest) -> Permission:
        if not self.restricts:
            return EVERYTHING
        return Permission(client.user or "", self._rule(client), tuple(self._sources[image.source]))

    def _rule(self, client: Client) -> Rule:
        return self._rules.of(client.user)


def _holder(accounts: Accounts, token: BearerToken, address: str) -> Client:
    """Return who sent a token; `CredentialsError` if it isn't good, or not any more."""
    grant = accounts.tokens.read(token.text)
    if not grant.user:
        good = accounts.anonymous
    else:
        good = grant.password_version == accounts.users.version(grant.user)
    if not good:
        raise CredentialsError("the token is good no more: log in again", "invalid_token")
    return Client(grant.user or None, address, grant.repositories)


def _raise_if(wait: float, what: str, limit: int, period: str) -> None:
    """Raise `RateLimitError` if there is something to wait for."""
    if wait:
        raise RateLimitError(what, limit, period, math.ceil(wait))
