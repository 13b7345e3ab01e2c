"""Who sent a request: its address, or the one that a trusted proxy says."""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Network = IPv4Network | IPv6Network


def parse_networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Read addresses and networks (`10.0.0.0/8`); `ValueError` names one that is neither."""
    return tuple(ip_network(text.strip()) for text in texts if text.strip())


def client_address(peer: str, forwarded_for: Sequence[str], trusted: Sequence[Network]) -> str:
    """Give the address of the client behind the proxies that are trusted.

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


def is_trusted(text: str, trusted: Sequence[Network]) -> bool:
    """Tell whether an address is that of a proxy that is trusted."""
    address = _parse(text)
    return address is not None and any(address in network for network in trusted)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches what listens on an address, or on `localhost`."""
    address = _parse(host)
    return host == "localhost" if address is None else address.is_loopback


def client_network(text: str) -> str:
    """Give what an address is counted under: a client with IPv6 has a whole /64 of them (RFC 4291, 2.5.4)."""
    address = _parse(text)
    if isinstance(address, IPv6Address):
        return str(ip_network((address, 64), strict=False))
    return text if address is None else str(address)


def _parse(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    # A socket for IPv6 takes IPv4 as well, and tells its addresses so (RFC 4291, 2.5.5.2).
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address
