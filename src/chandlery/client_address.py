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
    while hops and _is_trusted(address, trusted):
        hop = hops.pop()
        if _parse(hop) is None:
            break
        address = hop
    return address


def _is_trusted(text: str, trusted: Sequence[Network]) -> bool:
    address = _parse(text)
    return address is not None and any(address in network for network in trusted)


def _parse(text: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None
