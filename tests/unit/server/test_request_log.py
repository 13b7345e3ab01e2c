from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import pytest
import structlog
from starlette.types import Message, Receive, Scope, Send
from structlog.testing import capture_logs

from chandlery.access.client_address import Network, parse_networks
from chandlery.server.request_log import RequestLog
from tests.support.clock import Clock

# The peer of httpx's transport.
PROXIES = parse_networks(["127.0.0.1"])


async def answer(app: Any, **request: Any) -> tuple[httpx.Response, list[Any]]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://registry") as client:
        with capture_logs() as events:
            response = await client.request("GET", "/v2/git", **request)
    return response, events


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 203, "headers": []})
    await send({"type": "http.response.body", "body": b"hel", "more_body": True})
    await send({"type": "http.response.body", "body": b"lo"})


async def test_every_request_is_one_event() -> None:
    response, events = await answer(RequestLog(hello))
    assert response.text == "hello"
    (event,) = events
    assert event.pop("duration_ms") >= 0
    assert event == {
        "event": "request",
        "log_level": "info",
        "method": "GET",
        "path": "/v2/git",
        "status": 203,
        "bytes": 5,
        "request_id": response.headers["x-request-id"],
    }


async def test_the_id_of_a_trusted_proxy_is_kept() -> None:
    log = RequestLog(hello, trusted_proxies=PROXIES)
    response, events = await answer(log, headers={"x-request-id": "from-the-proxy"})
    assert response.headers["x-request-id"] == events[0]["request_id"] == "from-the-proxy"


@pytest.mark.parametrize("trusted", [(), parse_networks(["10.0.0.1"])])
async def test_the_id_of_anybody_else_is_not_kept(trusted: Sequence[Network]) -> None:
    log = RequestLog(hello, trusted_proxies=trusted)
    response, events = await answer(log, headers={"x-request-id": "another-request"})
    assert response.headers["x-request-id"] == events[0]["request_id"] != "another-request"


@pytest.mark.parametrize("given", ["", "two words", "x" * 65, "line\x0bbreak"])
async def test_an_id_that_could_confuse_the_log_is_not_kept(given: str) -> None:
    log = RequestLog(hello, trusted_proxies=PROXIES)
    response, _ = await answer(log, headers={"x-request-id": given})
    assert response.headers["x-request-id"] != given


async def warnings(app: Any, peer: str, headers: Mapping[str, str]) -> list[Any]:
    """Send a request; return the warnings that it causes."""
    transport = httpx.ASGITransport(app, client=(peer, 1234))
    async with httpx.AsyncClient(transport=transport, base_url="http://registry") as client:
        with capture_logs() as events:
            await client.get("/v2/git", headers=headers)
    return [event for event in events if event["log_level"] == "warning"]


async def test_a_proxy_that_is_not_trusted_is_told_of_once_in_a_while() -> None:
    clock = Clock()
    app = RequestLog(hello, trusted_proxies=PROXIES, clock=clock)
    forwarded = {"x-forwarded-for": "203.0.113.9"}
    (told,) = await warnings(app, "192.0.2.7", forwarded)
    assert "trusted_proxies" in told["event"]
    assert told["sender"] == "192.0.2.7"
    assert [await warnings(app, "192.0.2.7", forwarded) for _ in range(100)] == [[]] * 100
    assert len(await warnings(app, "192.0.2.8", forwarded)) == 1
    assert await warnings(app, "127.0.0.1", forwarded) == []
    assert await warnings(app, "192.0.2.9", {}) == []
    clock.now += 3600.0
    assert len(await warnings(app, "192.0.2.7", forwarded)) == 1


async def test_nobody_fills_the_log_by_telling_of_clients() -> None:
    app = RequestLog(hello, clock=Clock())
    told = [await warnings(app, f"2001:db8:0:{n:x}::1", {"x-forwarded-for": "x"}) for n in range(100)]
    assert sum(map(len, told)) == 10


async def test_the_application_can_read_the_id() -> None:
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["state"]["request_id"])
        await hello(scope, receive, send)

    response, _ = await answer(RequestLog(app))
    assert seen == [response.headers["x-request-id"]]


async def test_whatever_is_logged_meanwhile_has_the_id() -> None:
    bound = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bound.append(structlog.contextvars.get_contextvars())
        await hello(scope, receive, send)

    response, _ = await answer(RequestLog(app))
    assert bound == [{"request_id": response.headers["x-request-id"]}]
    assert structlog.contextvars.get_contextvars() == {}


async def test_a_request_that_fails_is_logged_too() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    with capture_logs() as events, pytest.raises(ZeroDivisionError):
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(RequestLog(app)), base_url="http://registry"
        ) as client:
            await client.get("/")
    assert [(event["event"], event["status"]) for event in events] == [("request", None)]


async def test_a_file_that_the_server_sends_counts_with_its_announced_size() -> None:
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-length", b"1234")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.pathsend", "path": "/a/file"})

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise NotImplementedError

    with capture_logs() as events:
        await RequestLog(app)({"type": "http", "method": "GET", "path": "/", "headers": []}, receive, send)
    assert events[0]["bytes"] == 1234
    assert sent[1] == {"type": "http.response.pathsend", "path": "/a/file"}
