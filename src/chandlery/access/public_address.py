"""Where clients reach this server, if that is known for sure.

A token endpoint is named by an absolute URL, and clients send passwords there. So it is never guessed: behind
a proxy that nobody has told of, a URL made of the Host header might be plain HTTP, or not exist at all.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request

from chandlery.access.client_address import Network, is_trusted

# RFC 9110, section 7.2; nothing that could end a quoted string.
_HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


@dataclass(frozen=True, slots=True)
class PublicAddress:
    """What is known beforehand: the `url` in the settings, or none, and the proxies that are trusted."""

    url: str = ""
    trusted_proxies: Sequence[Network] = ()

    def of(self, request: Request) -> str | None:
        """Return the URL at which the client of a request reached this server; None if it isn't known."""
        if self.url:
            return self.url
        headers = request.headers
        scheme, host = request.scope.get("scheme"), headers.get("host", "")
        if request.client and is_trusted(request.client.host, self.trusted_proxies):
            # The last one is the word of the proxy that asks; those before it are what it was told.
            scheme = _last(headers.getlist("x-forwarded-proto"))
            host = _last(headers.getlist("x-forwarded-host")) or host
        elif scheme != "https":
            return None
        if scheme not in ("http", "https") or _HOST.fullmatch(host) is None:
            return None
        return f"{scheme}://{host}"


def _last(values: Sequence[str]) -> str:
    return values[-1].rpartition(",")[2].strip().lower() if values else ""
