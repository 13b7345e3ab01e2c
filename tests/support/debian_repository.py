"""A signed Debian repository on loopback, for the tests of all that reads one.

It serves a suite and its updates, and in a repository of its own the security updates, for two architectures.
It can be updated while it serves, and made to misbehave.
"""

import hashlib
import lzma
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from chandlery.sources.debian.index import DebianMirrors
from tests.support.debian_packages import ARCHITECTURES, Deb

SUITE = "bookworm"
UPDATES = f"{SUITE}-updates"
SECURITY = f"{SUITE}-security"

_START = datetime(2024, 1, 1, tzinfo=UTC)


class Fault(Enum):
    """How an answer goes wrong."""

    REFUSE = auto()  # the connection is closed without an answer
    NOT_FOUND = auto()
    HANG = auto()  # nothing is said until it is over
    STALL = auto()  # half of the body, and then nothing
    TRUNCATE = auto()  # half of the body, and the connection is closed
    CORRUPT = auto()  # the length is right, the bytes are not


class Key:
    """A key that signs a repository's index, in a GnuPG folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._gpg = ("gpg", "--homedir", str(folder), "--batch", "--quiet")
        self._run(
            "--passphrase", "", "--quick-generate-key", "repository@localhost", "ed25519", "sign", "never"
        )
        self.public = self._run("--export")

    def sign(self, text: bytes) -> bytes:
        return self._run("--clearsign", text=text)

    def _run(self, *arguments: str, text: bytes = b"") -> bytes:
        return subprocess.run([*self._gpg, *arguments], input=text, check=True, stdout=subprocess.PIPE).stdout


@contextmanager
def new_key() -> Iterator[Key]:
    # Not below a test's own folder: gpg-agent's socket is in it, and a socket's path may not be long.
    with tempfile.TemporaryDirectory(prefix="gpg-") as folder:
        try:
            yield Key(Path(folder))
        finally:
            subprocess.run(["gpgconf", "--homedir", folder, "--kill", "all"], check=True)


class DebianRepository:
    """What is served; its address is given once it is.

    Its releases have packages for `architectures`. With `by_hash` Packages files stay where their hash is.
    """

    def __init__(self, key: Key, address: str, keyring: Path) -> None:
        keyring.write_bytes(key.public)
        self.mirrors = DebianMirrors(f"{address}/debian", f"{address}/debian-security", str(keyring))
        self.requests: list[str] = []
        self.files: dict[str, bytes] = {}
        self.architectures: Sequence[str] = ARCHITECTURES
        self.by_hash = False
        self._key = key
        self._packages = {each: _no_packages() for each in (SUITE, UPDATES, SECURITY)}
        self._faults: list[tuple[str, Fault, threading.Event, threading.Event]] = []
        self._acts: list[tuple[str, Callable[[], None]]] = []
        self._updates = 0

    def publish(
        self,
        *debs: Deb,
        release: str = SUITE,
        architectures: Sequence[str] = ARCHITECTURES,
        keep_old: bool = True,
        signer: Key | None = None,
        signed: bool = True,
    ) -> None:
        """Add packages or new versions of them, for some architectures; those of the others stay as they are.

        With `keep_old` false, an old version's .deb is gone. The index is signed with the repository's own
        key, unless it is told otherwise.
        """
        for deb in debs:
            for architecture in architectures:
                packages = self._packages[release][architecture]
                if deb.name in packages and not keep_old:
                    self.files.pop(self._pool(release, packages[deb.name], architecture), None)
                self.files[self._pool(release, deb, architecture)] = deb.build(architecture)
                packages[deb.name] = deb
        self._updates += 1
        for each in self._packages:
            self._index(each, (signer or self._key) if signed else None)

    def serve(self, release: str) -> None:
        """Serve another suite, or another's updates, with no packages at first."""
        self._packages[release] = _no_packages()
        self.publish(release=release)

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

    def after(self, end: str, act: Callable[[], None]) -> None:
        """Do something once, when a path that ends like this has been answered."""
        self._acts.append((end, act))

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self._answer(request)
        for each in [each for each in self._acts if request.path.endswith(each[0])]:
            self._acts.remove(each)
            each[1]()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append(request.path)
        body = self.files.get(request.path)
        fault, over = None, threading.Event()
        for end, fault_of_path, met, over_of_path in self._faults:
            if request.path.endswith(end):
                fault, over = fault_of_path, over_of_path
                met.set()
        if fault is Fault.REFUSE:
            return
        if fault is Fault.HANG:
            over.wait()
        if body is None or fault is Fault.NOT_FOUND:
            request.send_error(HTTPStatus.NOT_FOUND)
            return
        request.send_response(HTTPStatus.OK)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        half = len(body) // 2
        if fault is Fault.CORRUPT:
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        elif fault in (Fault.STALL, Fault.TRUNCATE):
            body = body[:half]
        request.wfile.write(body)
        if fault is Fault.STALL:
            over.wait()

    def _pool(self, release: str, deb: Deb, architecture: str) -> str:
        return f"{_base(release)}/pool/main/{deb.file_name(architecture)}"

    def _index(self, release: str, signer: Key | None) -> None:
        """Write the Packages files and the Release file of a suite."""
        dists = f"{_base(release)}/dists/{release}"
        for path in [path for path in self.files if path.startswith(f"{dists}/")]:
            if "/by-hash/" not in path:
                del self.files[path]
        listed = []
        for architecture in self.architectures:
            packages = "\n".join(
                self._paragraph(release, deb, architecture)
                for deb in self._packages[release][architecture].values()
            ).encode()
            compressed = lzma.compress(packages)
            folder = f"{dists}/main/binary-{architecture}"
            self.files[f"{folder}/Packages.xz"] = compressed
            for name, content in (("Packages", packages), ("Packages.xz", compressed)):
                digest = hashlib.sha256(content).hexdigest()
                listed.append(f" {digest} {len(content)} main/binary-{architecture}/{name}\n")
                if self.by_hash:
                    self.files[f"{folder}/by-hash/SHA256/{digest}"] = content
        # apt takes no index that isn't newer than the one it has.
        date = (_START + timedelta(seconds=self._updates)).strftime("%a, %d %b %Y %H:%M:%S UTC")
        text = (
            f"Origin: Tests\nLabel: Tests\nSuite: {release}\nCodename: {release}\nDate: {date}\n"
            f"Acquire-By-Hash: {'yes' if self.by_hash else 'no'}\n"
            f"Architectures: all {' '.join(self.architectures)}\nComponents: main\n"
            f"SHA256:\n{''.join(listed)}"
        ).encode()
        if signer is None:
            self.files[f"{dists}/Release"] = text
        else:
            self.files[f"{dists}/InRelease"] = signer.sign(text)

    def _paragraph(self, release: str, deb: Deb, architecture: str) -> str:
        path = self._pool(release, deb, architecture)
        content = self.files[path]
        return (
            f"{deb.control(architecture)}Filename: {path.removeprefix(f'{_base(release)}/')}\n"
            f"Size: {len(content)}\nSHA256: {hashlib.sha256(content).hexdigest()}\n"
        )


def _no_packages() -> dict[str, dict[str, Deb]]:
    return {each: {} for each in ARCHITECTURES}


def _base(release: str) -> str:
    return "/debian-security" if release.endswith("-security") else "/debian"


@contextmanager
def debian_repository(folder: Path) -> Iterator[DebianRepository]:
    """Serve a repository that is still empty; `folder` is for its keyring."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            repository.answer(self)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ExitStack() as stack:
        server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        key = stack.enter_context(new_key())
        repository = DebianRepository(key, f"http://127.0.0.1:{server.server_port}", folder / "keyring.gpg")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        yield repository
