from typing import Any

import httpx
import pytest
import structlog
from starlette.types import Message, Receive, Scope, Send
from structlog.testing import capture_logs

from chandlery.server.request_log import RequestLog


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


async def test_the_id_of_a_proxy_is_kept() -> None:
    response, events = await answer(RequestLog(hello), headers={"x-request-id": "from-the-proxy"})
    assert response.headers["x-request-id"] == events[0]["request_id"] == "from-the-proxy"


@pytest.mark.parametrize("given", ["", "two words", "x" * 65, "line\x0bbreak"])
async def test_an_id_that_could_confuse_the_log_is_not_kept(given: str) -> None:
    response, _ = await answer(RequestLog(hello), headers={"x-request-id": given})
    assert response.headers["x-request-id"] != given


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
