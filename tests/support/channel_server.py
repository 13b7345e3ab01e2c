"""A server of nixpkgs channels, as channels.nixos.org and GitHub answer: with redirects to where things are.

    /<channel>/git-revision     302 to /releases/<channel>/<name>/git-revision, which has the commit
    /archive/<commit>.tar.gz    302 to /codeload/<commit>, which has the tarball

Channels move while it runs; it can misbehave, die, and come back at the same address.
"""

import gzip
import hashlib
import io
import lzma
import tarfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum, auto
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import zstandard

from chandlery.sources.nixpkgs import NixpkgsAddresses

SHAPE = Path(__file__).parent / "nixpkgs_shape"


class Fault(Enum):
    """What a server may do instead of answering as it should."""

    NOT_FOUND = auto()
    ERROR = auto()
    HANG_UP = auto()  # without a word
    HANG = auto()
    CUT = auto()  # in the middle of the body
    STALL = auto()  # likewise, and the connection stays
    DRIP = auto()  # a byte now and then
    WRONG = auto()  # the page of a captive portal
    ENDLESS = auto()
    LOOP = auto()  # redirects to itself


def tree_of_shape(says: str) -> dict[str, bytes]:
    """Return the package set of nixpkgs' shape, whose `revision` program prints a text."""
    files = {
        str(path.relative_to(SHAPE)): path.read_bytes() for path in sorted(SHAPE.rglob("*")) if path.is_file()
    }
    return {**files, "revision": says.encode()}


def tarball(
    files: Mapping[str, bytes], commit: str, *, top: str = "nixpkgs", compression: str = "gz"
) -> bytes:
    """Make a tarball as `git archive` does: everything in one folder, and the commit in a global header."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", pax_headers={"comment": commit}) as archive:
        for path in sorted({top, *(f"{top}/{each}" for each in _folders(files))}):
            folder = tarfile.TarInfo(path)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o775
            archive.addfile(folder)
        for path, content in files.items():
            file = tarfile.TarInfo(f"{top}/{path}")
            file.size, file.mode = len(content), 0o664
            archive.addfile(file, io.BytesIO(content))
    return compressed(buffer.getvalue(), compression)


def compressed(content: bytes, compression: str) -> bytes:
    if compression == "gz":
        return gzip.compress(content)
    if compression == "xz":
        return lzma.compress(content)
    return zstandard.compress(content) if compression == "zst" else content


def _folders(files: Mapping[str, bytes]) -> set[str]:
    return {str(parent) for path in files for parent in Path(path).parents if str(parent) != "."}


class ChannelServer:
    """What is served, and what was asked for."""

    def __init__(self) -> None:
        self.channels: dict[str, str] = {}
        self.tarballs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.credentials = ""  # as they have to be sent for tarballs, in an Authorization header
        self._faults: list[tuple[str, Fault, threading.Event, threading.Event]] = []
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def channel_template(self) -> str:
        return f"http://{self.address}/{{channel}}/git-revision"

    @property
    def tarball_template(self) -> str:
        return f"http://{self.address}/archive/{{revision}}.tar.gz"

    @property
    def addresses(self) -> NixpkgsAddresses:
        return NixpkgsAddresses.parse(self.channel_template, self.tarball_template)

    def publish(self, channel: str, says: str, *, compression: str = "gz") -> str:
        """Move a channel to a package set whose `revision` program says this; give its commit."""
        commit = hashlib.sha1(says.encode(), usedforsecurity=False).hexdigest()
        self.tarballs[commit] = tarball(
            tree_of_shape(says), commit, top=f"nixpkgs-{commit}", compression=compression
        )
        self.channels[channel] = commit
        return commit

    @contextmanager
    def misbehaving(self, fault: Fault, end: str = "") -> Iterator[threading.Event]:
        """Answer so when a path ends like this; the event says that it happened."""
        met, over = threading.Event(), threading.Event()
        record = (end, fault, met, over)
        self._faults.append(record)
        try:
            yield met
        finally:
            self._faults.remove(record)
            over.set()

    def start(self) -> None:
        """Serve, at the same address as before."""
        channel_server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with suppress(ConnectionError):
                    channel_server.answer(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        """Die: whoever connects is refused."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._server = None

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append(request.path)
        fault, over = None, threading.Event()
        for end, fault_of_path, met, over_of_path in list(self._faults):
            if request.path.endswith(end):
                fault, over = fault_of_path, over_of_path
                met.set()
        if fault is Fault.HANG:
            over.wait()
        if fault in (Fault.HANG, Fault.HANG_UP):
            return
        if fault in (Fault.NOT_FOUND, Fault.ERROR):
            missing = fault is Fault.NOT_FOUND
            request.send_error(HTTPStatus.NOT_FOUND if missing else HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        if fault is Fault.LOOP:
            self._redirect(request, request.path)
            return
        page = b"<html>Log in to this network</html>"
        body = page if fault in (Fault.WRONG, Fault.ENDLESS) else self._body(request)
        if body is None:
            return
        request.send_response(HTTPStatus.OK)
        request.send_header("Content-Length", str(1 << 40 if fault is Fault.ENDLESS else len(body)))
        request.end_headers()
        if fault is Fault.DRIP:
            for number in range(len(body)):
                request.wfile.write(body[number : number + 1])
                if over.wait(0.02):
                    return
        while fault is Fault.ENDLESS and not over.is_set():
            request.wfile.write(bytes(1 << 16))
        request.wfile.write(body[: len(body) // 2] if fault in (Fault.CUT, Fault.STALL) else body)
        if fault is Fault.STALL:
            over.wait()

    def _body(self, request: BaseHTTPRequestHandler) -> bytes | None:
        """Return what is at a path; None if something else was answered."""
        parts = request.path.strip("/").split("/")
        if len(parts) == 2 and parts[1] == "git-revision" and parts[0] in self.channels:
            commit = self.channels[parts[0]]
            self._redirect(request, f"/releases/{parts[0]}/{parts[0]}.{commit[:11]}/git-revision")
        elif parts[0] == "releases" and parts[1] in self.channels:
            return self.channels[parts[1]].encode()
        elif parts[0] == "archive" and parts[1].removesuffix(".tar.gz") in self.tarballs:
            if not self.credentials or request.headers.get("Authorization") == self.credentials:
                self._redirect(request, f"/codeload/{parts[1].removesuffix('.tar.gz')}")
            else:
                request.send_error(HTTPStatus.UNAUTHORIZED)
        elif parts[0] == "codeload" and parts[1] in self.tarballs:
            return self.tarballs[parts[1]]
        else:
            request.send_error(HTTPStatus.NOT_FOUND)
        return None

    def _redirect(self, request: BaseHTTPRequestHandler, path: str) -> None:
        request.send_response(HTTPStatus.FOUND)
        request.send_header("Location", f"http://{self.address}{path}")
        request.send_header("Content-Length", "0")
        request.end_headers()


@contextmanager
def channel_server() -> Iterator[ChannelServer]:
    """Serve channels; there is none yet."""
    server = ChannelServer()
    server.start()
    try:
        yield server
    finally:
        server.stop()
