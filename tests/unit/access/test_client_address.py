from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import HTTPConnection

from chandlery.access.client_address import (
    client_address,
    client_network,
    is_loopback,
    note,
    noted,
    parse_networks,
)

PROXIES = parse_networks(["127.0.0.1", "10.0.0.0/8", "fd00::/8"])


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        ("192.0.2.1", [], "192.0.2.1"),
        ("127.0.0.1", [], "127.0.0.1"),
        ("127.0.0.1", ["192.0.2.1"], "192.0.2.1"),
        ("127.0.0.1", ["192.0.2.1, 10.1.2.3"], "192.0.2.1"),
        ("127.0.0.1", ["192.0.2.1", "10.1.2.3"], "192.0.2.1"),
        ("fd00::1", ["2001:db8::1"], "2001:db8::1"),
        # Whoever isn't trusted may write what they like.
        ("192.0.2.1", ["198.51.100.7"], "192.0.2.1"),
        ("127.0.0.1", ["198.51.100.7, 192.0.2.1"], "192.0.2.1"),
        ("127.0.0.1", ["nonsense"], "127.0.0.1"),
        # As a socket for IPv6 tells of an IPv4 client.
        ("::ffff:127.0.0.1", ["192.0.2.1"], "192.0.2.1"),
        ("::ffff:192.0.2.1", ["198.51.100.7"], "::ffff:192.0.2.1"),
        ("127.0.0.1", ["192.0.2.1, "], "127.0.0.1"),
    ],
)
def test_the_client_is_the_last_address_that_a_trusted_proxy_did_not_have_itself(
    peer: str, forwarded_for: list[str], client: str
) -> None:
    assert client_address(peer, forwarded_for, PROXIES) == client


def test_it_is_noted_once_for_all_who_handle_a_request() -> None:
    headers = [(b"x-forwarded-for", b"198.51.100.7"), (b"x-forwarded-for", b"192.0.2.1, 10.1.2.3")]
    scope: dict[str, Any] = {"type": "http", "client": ("127.0.0.1", 1234), "headers": headers}
    assert noted(HTTPConnection(scope)) == "127.0.0.1"
    note(scope, ())
    assert noted(HTTPConnection(scope)) == "127.0.0.1"
    note(scope, PROXIES)
    assert noted(HTTPConnection(scope)) == "192.0.2.1"


def test_who_comes_by_a_unix_socket_has_no_address() -> None:
    scope: dict[str, Any] = {"type": "http", "client": None, "headers": []}
    note(scope, PROXIES)
    assert noted(HTTPConnection(scope)) == ""


@given(st.lists(st.text()))
def test_without_trusted_proxies_no_header_counts(forwarded_for: list[str]) -> None:
    assert client_address("127.0.0.1", forwarded_for, ()) == "127.0.0.1"


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::", "2001:db8:1:2::/64"),
        ("", ""),
        ("testclient", "testclient"),
    ],
)
def test_a_client_is_counted_by_its_address_or_by_its_network_with_ipv6(address: str, network: str) -> None:
    assert client_network(address) == network


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *(("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True)),
        *(("0.0.0.0", False), ("::", False), ("192.0.2.1", False), ("example.com", False)),  # noqa: S104
    ],
)
def test_loopback_is_what_no_other_machine_reaches(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_what_is_no_network_is_named() -> None:
    with pytest.raises(ValueError, match=r"10\.0\.0\.0/99"):
        parse_networks(["10.0.0.0/99"])
