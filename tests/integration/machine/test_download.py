import asyncio
import base64
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from chandlery.machine.download import (
    Address,
    DownloadFailedError,
    DownloadLimits,
    fetch,
    fetch_text,
    retried,
)
from tests.support.certificates import Certificate, make_certificate
from tests.support.channel_server import ChannelServer, Fault, channel_server
from tests.support.servers import free_port

QUICK = DownloadLimits(connect=2.0, silence=0.2, total=5.0, pauses=(0.01, 0.01))
REVISION = "/nixos-unstable/git-revision"


@pytest.fixture
def server() -> Iterator[ChannelServer]:
    with channel_server() as server:
        server.channels["nixos-unstable"] = "4f0d3a9" * 5 + "00000"
        yield server


async def ask(server: ChannelServer, path: str = REVISION, limits: DownloadLimits = QUICK) -> str:
    return await fetch_text(Address.parse(f"http://{server.address}{path}"), 4096, limits)


@contextmanager
def answering(
    answer: Callable[[BaseHTTPRequestHandler], None], certificate: Certificate | None = None
) -> Iterator[str]:
    """Serve on a port of its own; give host and port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate.certificate, certificate.key)
            http.socket = context.wrap_socket(http.socket, server_side=True)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


def redirect(to: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(302)
        request.send_header("Location", to)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


@pytest.mark.parametrize(
    "text",
    ["", "nixos-unstable", "./file", "ftp://host/file", "file://elsewhere/file", "https://", "http:///x"],
)
def test_what_is_no_address_is_told(text: str) -> None:
    with pytest.raises(ValueError, match="write https://"):
        Address.parse(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:secret@host:8443/a/b?token=secret", "https://host:8443/a/b"),
        ("http://us%40er:sec%2Fret@host/", "http://host/"),
        ("file:///srv/a%20b", "/srv/a b"),
        ("/srv/a%20b", "/srv/a%20b"),
    ],
)
def test_an_address_is_shown_without_what_may_be_secret(text: str, shown: str) -> None:
    assert str(Address.parse(text)) == shown
    assert "secret" not in str(DownloadFailedError(shown, "reason"))


async def test_redirects_are_followed_to_where_things_are(server: ChannelServer) -> None:
    assert await ask(server) == "4f0d3a9" * 5 + "00000"
    assert [path.split("/")[1] for path in server.requests] == ["nixos-unstable", "releases"]


async def test_credentials_reach_the_host_that_they_are_for_and_no_other(server: ChannelServer) -> None:
    seen = []

    def elsewhere(request: BaseHTTPRequestHandler) -> None:
        seen.append(request.headers.get("Authorization"))
        request.send_error(404)

    with answering(elsewhere) as other:

        def first(request: BaseHTTPRequestHandler) -> None:
            seen.append(request.headers.get("Authorization"))
            redirect(f"http://{other}/")(request)

        with answering(first) as host, pytest.raises(DownloadFailedError) as caught:
            await fetch_text(Address.parse(f"http://us%40er:pass%3Aword@{host}/file?t=secret"), 100, QUICK)

    expected = base64.b64encode(b"us@er:pass:word").decode()
    assert seen == [f"Basic {expected}", None]
    assert str(caught.value) == f"http://{host}/file: the answer is 404 Not Found"


async def test_no_redirect_leads_from_https_to_http(
    server: ChannelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = make_certificate(tmp_path, "localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.certificate))
    to = f"http://{server.address}{REVISION}"
    with (
        answering(redirect(to), certificate) as host,
        pytest.raises(DownloadFailedError, match="redirects from https to http") as caught,
    ):
        await fetch_text(Address.parse(f"https://{host}/file"), 100, QUICK)

    assert not caught.value.transient
    assert server.requests == []


async def test_a_proxy_of_the_environment_is_used(
    server: ChannelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def proxy(request: BaseHTTPRequestHandler) -> None:
        seen.append(request.path)
        request.send_response(200)
        request.send_header("Content-Length", "2")
        request.end_headers()
        request.wfile.write(b"ok")

    with answering(proxy) as host:
        monkeypatch.setenv("HTTP_PROXY", f"http://{host}")
        monkeypatch.setenv("NO_PROXY", "")
        assert await fetch_text(Address.parse("http://nowhere.invalid/file"), 100, QUICK) == "ok"
    assert seen == ["http://nowhere.invalid/file"]


@pytest.mark.parametrize(
    ("fault", "reason", "missing", "transient"),
    [
        (Fault.NOT_FOUND, "the answer is 404 Not Found", True, False),
        (Fault.ERROR, "the answer is 500 Internal Server Error", False, True),
        (Fault.HANG_UP, "Server disconnected without sending a response", False, True),
        (Fault.HANG, "nothing came for 0.2 s", False, True),
        (Fault.STALL, "nothing came for 0.2 s", False, True),
        (Fault.CUT, "peer closed connection", False, True),
        (Fault.LOOP, "Exceeded maximum allowed redirects", False, True),
    ],
)
async def test_what_a_server_does_wrong_is_told_with_the_address(
    server: ChannelServer, fault: Fault, reason: str, missing: bool, transient: bool
) -> None:
    with server.misbehaving(fault), pytest.raises(DownloadFailedError) as caught:
        await ask(server)

    assert str(caught.value).startswith(f"http://{server.address}{REVISION}: ")
    assert reason in str(caught.value)
    assert (caught.value.missing, caught.value.transient) == (missing, transient)


async def test_a_dead_server_and_one_that_drips_have_their_limits(server: ChannelServer) -> None:
    with (
        server.misbehaving(Fault.DRIP, "git-revision"),
        pytest.raises(DownloadFailedError, match=r"not everything came within 0.3 s"),
    ):
        await ask(server, limits=replace(QUICK, total=0.3))
    server.stop()
    with pytest.raises(DownloadFailedError, match=r"All connection attempts failed|refused"):
        await ask(server)


async def test_of_a_text_no_more_is_read_than_may_be_wanted(server: ChannelServer) -> None:
    with server.misbehaving(Fault.ENDLESS):
        assert len(await ask(server)) == 4096


async def test_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "git revision"
    file.write_text("content")

    assert await fetch_text(Address.parse(str(file)), 100) == "content"
    assert await fetch_text(Address.parse(f"file://{str(file).replace(' ', '%20')}"), 3) == "con"
    with pytest.raises(DownloadFailedError, match="No such file or directory") as caught:
        await fetch_text(Address.parse(f"{file}.txt"), 100)
    assert caught.value.missing
    with pytest.raises(DownloadFailedError, match="Is a directory") as caught:
        await fetch_text(Address.parse(str(tmp_path)), 100)
    assert not caught.value.missing


async def test_a_cancelled_fetch_has_ended_when_it_is_over(server: ChannelServer) -> None:
    threads: list[bool] = []
    server.tarballs["ab"] = bytes(1 << 20)

    def consume(read: Callable[[], bytes]) -> None:
        threads.append(True)
        try:
            while read():
                pass
        finally:
            threads.append(False)

    address = Address.parse(f"http://{server.address}/codeload/ab")
    with server.misbehaving(Fault.STALL) as met:
        task = asyncio.create_task(fetch(address, consume, DownloadLimits()))
        await asyncio.to_thread(met.wait, 10)
        while not threads:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        task.cancel()
        # The server says nothing for longer than that.
        async with asyncio.timeout(10):
            with pytest.raises(asyncio.CancelledError):
                await task
        assert threads == [True, False]


async def test_what_the_consumer_raises_is_raised(server: ChannelServer) -> None:
    def consume(read: Callable[[], bytes]) -> None:
        read()
        raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        await fetch(Address.parse(f"http://{server.address}{REVISION}"), consume, QUICK)


async def test_what_may_pass_is_tried_again_and_nothing_else(server: ChannelServer) -> None:
    attempts = 0

    async def attempt() -> str:
        nonlocal attempts
        attempts += 1
        return await ask(server)

    with server.misbehaving(Fault.ERROR), pytest.raises(DownloadFailedError):
        await retried(attempt, QUICK.pauses)
    assert attempts == 3
    with server.misbehaving(Fault.NOT_FOUND), pytest.raises(DownloadFailedError):
        await retried(attempt, QUICK.pauses)
    assert attempts == 4
    server.stop()

    async def attempt_and_start() -> str:
        try:
            return await attempt()
        except DownloadFailedError:
            server.start()
            raise

    assert await retried(attempt_and_start, (0.0,)) == "4f0d3a9" * 5 + "00000"


async def test_an_address_that_nobody_listens_at_is_told() -> None:
    with pytest.raises(DownloadFailedError):
        await fetch_text(Address.parse(f"http://127.0.0.1:{free_port()}/"), 100, QUICK)
