"""Who sent a request: its address, or the one that a trusted proxy says.

It is found out once, by the request log, which comes first (`note`); whoever handles the request reads what
was noted (`noted`).
"""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from starlette.requests import HTTPConnection
from starlette.types import Scope

Network = IPv4Network | IPv6Network

FORWARDED_FOR = b"x-forwarded-for"
_NOTED = "client_address"  # in the state of a request


def parse_networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Read addresses and networks (`10.0.0.0/8`); `ValueError` names one that is neither."""
    return tuple(ip_network(text.strip()) for text in texts if text.strip())


def client_address(peer: str, forwarded_for: Sequence[str], trusted: Sequence[Network]) -> str:
    """Return the address of the client behind the proxies that are trusted.

    `forwarded_for` are the X-Forwarded-For headers. Each proxy appends the address that it was asked by, so
    they are read from the end, as long as those that wrote them are trusted: what stands further left may be
    forged.
    """
    hops = [hop.strip() for header in forwarded_for for hop in header.split(",")]
    address = peer
    while hops and is_trusted(address, trusted):
        hop = hops.pop()
        if _parse(hop) is None:
            break
        address = hop
    return address


def note(scope: Scope, trusted: Sequence[Network]) -> None:
    """Find out who sent a request, and note it in its state."""
    address = peer_of(scope)
    # Of most servers nobody is trusted.
    if trusted:
        forwarded_for = [value.decode("latin-1") for name, value in scope["headers"] if name == FORWARDED_FOR]
        address = client_address(address, forwarded_for, trusted)
    scope.setdefault("state", {})[_NOTED] = address


def noted(request: HTTPConnection) -> str:
    """Return the address of the client, as it was noted; without that, whoever has connected."""
    return str(getattr(request.state, _NOTED, "")) or peer_of(request.scope)


def peer_of(scope: Scope) -> str:
    """Return the address that has connected; empty for a Unix socket."""
    client = scope.get("client")
    return client[0] if client else ""


def is_trusted(text: str, trusted: Sequence[Network]) -> bool:
    """Return whether an address is in one of the networks that are trusted."""
    address = _parse(text)
    return address is not None and any(address in network for network in trusted)


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches what listens on an address, or on `localhost`."""
    address = _parse(host)
    return host == "localhost" if address is None else address.is_loopback


def client_network(text: str) -> str:
    """Return what an address is counted under: a client with IPv6 has a /64 of them (RFC 4291, 2.5.4)."""
    return _network(text, 64)


def client_site(text: str) -> str:
    """Return what an address takes turns under: with IPv6 a site may have a /48 (RFC 6177, section 2)."""
    return _network(text, 48)


def _network(text: str, prefix: int) -> str:
    address = _parse(text)
    if isinstance(address, IPv6Address):
        return str(ip_network((address, prefix), strict=False))
    return text if address is None else str(address)


def _parse(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    # A socket for IPv6 takes IPv4 as well, and tells its addresses so (RFC 4291, 2.5.5.2).
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address
