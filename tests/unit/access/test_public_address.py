import pytest
from starlette.requests import Request

from chandlery.access.client_address import parse_networks
from chandlery.access.public_address import PublicAddress

PROXY = parse_networks(["10.0.0.0/8"])


def request(peer: str, scheme: str = "http", **headers: str) -> Request:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request(
        {"type": "http", "scheme": scheme, "headers": pairs, "client": (peer, 1234), "path": "/v2/"}
    )


def test_the_settings_win() -> None:
    address = PublicAddress("https://registry.example.com", PROXY)
    assert address.of(request("10.0.0.1", host="inside")) == "https://registry.example.com"


def test_with_a_certificate_of_its_own_the_server_knows_its_address() -> None:
    for host in ("registry.example.com", "localhost:8443", "[::1]:8443", "192.0.2.1"):
        assert PublicAddress().of(request("192.0.2.7", "https", host=host)) == f"https://{host}"


def test_behind_a_trusted_proxy_the_address_is_that_of_the_proxy() -> None:
    address = PublicAddress("", PROXY)
    forwarded = request("10.1.1.1", host="registry.example.com", x_forwarded_proto="https")
    assert address.of(forwarded) == "https://registry.example.com"
    renamed = request("10.1.1.1", host="inside", x_forwarded_proto="https", x_forwarded_host="outside:8443")
    assert address.of(renamed) == "https://outside:8443"
    # What stands before the last one may be forged.
    chained = request(
        "10.1.1.1", host="here", x_forwarded_proto="http, https", x_forwarded_host="evil, outside"
    )
    assert address.of(chained) == "https://outside"


@pytest.mark.parametrize("trusted", [(), PROXY])
def test_what_nobody_vouches_for_is_not_guessed(trusted: tuple[()]) -> None:
    address = PublicAddress("", trusted)
    assert address.of(request("192.0.2.7", host="localhost:8080")) is None
    spoofed = request("192.0.2.7", host="here", x_forwarded_proto="https", x_forwarded_host="evil")
    assert address.of(spoofed) is None
    assert address.of(request("10.0.0.1", host="here")) is None


@pytest.mark.parametrize("host", ["", "two words", 'a"b', "a/b", "user@host", "a,b", "[::1", "host:port"])
def test_what_is_no_host_is_not_repeated(host: str) -> None:
    assert PublicAddress().of(request("192.0.2.7", "https", host=host)) is None
