"""Git repositories on loopback, over every protocol: http (smart and dumb), ssh and files.

The servers are the real ones: git's own http-backend behind a few lines of CGI, and OpenSSH's sshd as an
ordinary process. A repository moves while it is served, and a server can be made to misbehave or be stopped.
"""

import base64
import os
import shlex
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from enum import Enum, auto
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from tests.support.servers import free_port, wait_until

_WHO = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "Tests"), ("EMAIL", "tests@localhost"), ("DATE", "2024-01-01T00:00:00Z"))
}
_BACKEND = "/usr/lib/git-core/git-http-backend"


class Fault(Enum):
    """How an http server goes wrong."""

    REFUSE = auto()  # the connection is closed without an answer
    NOT_FOUND = auto()
    SILENCE = auto()  # nothing is said at all, until `resume`
    STALL = auto()  # half of a pack, and then nothing
    ERROR = auto()


class Repository:
    """A repository, in which files are committed to branches."""

    def __init__(self, folder: Path, kind: str = "sha1") -> None:
        self.folder = folder
        self.work = folder.with_name(f"{folder.name}.work")
        self._git(
            "init", "--quiet", "--bare", f"--object-format={kind}", "--initial-branch=main", str(folder)
        )
        self._git("init", "--quiet", f"--object-format={kind}", "--initial-branch=main", str(self.work))

    def commit(self, files: Mapping[str, str], branch: str = "main") -> str:
        """Add files to a branch, which is made of the current commit if it is new; give the commit."""
        known = self._work("branch", "--list", branch)
        if known or self._work("rev-list", "--all", "--max-count=1"):
            self._work("checkout", "--quiet", *(() if known else ("-b",)), branch)
        for name, content in files.items():
            file = self.work / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        return self.commit_all(branch)

    def commit_all(self, branch: str = "main") -> str:
        """Commit whatever stands in the working tree."""
        self._work("add", "--all", "--force")
        self._work("commit", "--quiet", "--allow-empty", "--message", "a change")
        commit = self._work("rev-parse", "HEAD")
        self._work("push", "--quiet", "--force", str(self.folder), f"HEAD:refs/heads/{branch}")
        return commit

    def tag(self, name: str, commit: str, *, annotated: bool = False) -> None:
        options = ("-a", "-m", "a tag") if annotated else ()
        self._work("tag", "--force", *options, name, commit)
        self._work("push", "--quiet", "--force", str(self.folder), f"refs/tags/{name}")

    def delete(self, reference: str) -> None:
        self._git("--git-dir", str(self.folder), "update-ref", "-d", reference)

    def configure(self, key: str, value: str) -> None:
        self._git("--git-dir", str(self.folder), "config", key, value)

    def prepare_for_dumb_servers(self) -> None:
        self._git("--git-dir", str(self.folder), "update-server-info")

    def keep_object(self, content: str) -> str:
        """Store a file as it is, whatever attributes say; give its id."""
        argv = ["git", "-C", str(self.work), "hash-object", "-w", "--stdin", "--no-filters"]
        made = subprocess.run(argv, input=content, check=True, stdout=subprocess.PIPE, text=True)
        return made.stdout.strip()

    def _work(self, *arguments: str) -> str:
        return self._git("-C", str(self.work), *arguments)

    def _git(self, *arguments: str) -> str:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        environment = {**clean, **_WHO, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
        return subprocess.run(
            ["git", *arguments], check=True, stdout=subprocess.PIPE, text=True, env=environment
        ).stdout.strip()


class HttpServer:
    """Repositories of a folder over http; `password` is for the user `git`, if it is not empty."""

    def __init__(
        self, folder: Path, *, password: str = "", protocol_2: bool = True, dumb: bool = False
    ) -> None:
        self.requests: list[str] = []
        self.fault: Fault | None = None
        self.met = threading.Event()
        self._over = threading.Event()
        self._folder = folder
        self._password = password
        self._protocol_2 = protocol_2
        self._dumb = dumb
        self.port = 0
        self.start()

    def url(self, name: str, credentials: str = "") -> str:
        return f"http://{credentials}127.0.0.1:{self.port}/{name}"

    def listings(self) -> int:
        """Return how often it was asked which references there are."""
        return sum("/info/refs" in each for each in self.requests)

    def start(self) -> None:
        """Serve, at the same address as before."""
        self._over.clear()
        handler = type("Handler", (_Handler,), {"server_of_git": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def resume(self) -> None:
        """End a fault: requests that wait are answered as well."""
        self.fault = None
        self._over.set()
        self._over = threading.Event()

    def stop(self) -> None:
        """Die, as a server does that is killed: nobody listens on its port any more."""
        if self._thread.is_alive():
            self._over.set()
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append(request.path)
        fault = self.fault
        if fault is not None and fault is not Fault.STALL:
            self.met.set()
        if fault is Fault.REFUSE:
            return
        if fault is Fault.SILENCE:
            self._over.wait()
            fault = self.fault
        if fault is Fault.SILENCE:
            return
        if fault is Fault.NOT_FOUND:
            request.send_error(HTTPStatus.NOT_FOUND)
            return
        if fault is Fault.ERROR:
            request.send_error(HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        expected = base64.b64encode(f"git:{self._password}".encode()).decode()
        if self._password and request.headers.get("Authorization") != f"Basic {expected}":
            request.send_response(HTTPStatus.UNAUTHORIZED)
            request.send_header("WWW-Authenticate", 'Basic realm="git"')
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if self._dumb:
            self._answer_with_file(request)
        else:
            self._answer_with_backend(request)

    def _answer_with_file(self, request: BaseHTTPRequestHandler) -> None:
        file = self._folder / urlsplit(request.path).path.lstrip("/")
        if not file.is_file():
            request.send_error(HTTPStatus.NOT_FOUND)
            return
        content = file.read_bytes()
        request.send_response(HTTPStatus.OK)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def _answer_with_backend(self, request: BaseHTTPRequestHandler) -> None:
        where = urlsplit(request.path)
        if request.headers.get("Transfer-Encoding") == "chunked":
            body = _chunks(request)
        else:
            body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        variables = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(self._folder),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "REQUEST_METHOD": request.command,
            "PATH_INFO": where.path,
            "QUERY_STRING": where.query,
            "CONTENT_TYPE": request.headers.get("Content-Type", ""),
            "HTTP_CONTENT_ENCODING": request.headers.get("Content-Encoding", ""),
            "REMOTE_ADDR": "127.0.0.1",
        }
        if self._protocol_2:
            variables["GIT_PROTOCOL"] = request.headers.get("Git-Protocol", "")
        answer = subprocess.run(
            [_BACKEND],
            input=body,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=variables,
            check=False,
        ).stdout
        head, _, content = answer.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        request.send_response(int(headers.pop("Status", "200").split()[0]))
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if self.fault is Fault.STALL and b"PACK" in content:
            request.wfile.write(content[: content.index(b"PACK") + 10])
            self.met.set()
            self._over.wait()
            return
        request.wfile.write(content)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    server_of_git: HttpServer

    def do_GET(self) -> None:
        self.server_of_git.answer(self)

    do_POST = do_GET  # noqa: N815 (http.server calls it so)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def _chunks(request: BaseHTTPRequestHandler) -> bytes:
    body = b""
    while size := int(request.rfile.readline(), 16):
        body += request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()
    return body


@contextmanager
def http_server(
    folder: Path, *, password: str = "", protocol_2: bool = True, dumb: bool = False
) -> Iterator[HttpServer]:
    server = HttpServer(folder, password=password, protocol_2=protocol_2, dumb=dumb)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def silent_server() -> Iterator[int]:
    """Return the port of somebody who takes connections and says nothing."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port: int = listener.getsockname()[1]
        yield port


class SshServer:
    """OpenSSH's server as an ordinary process, and the configuration of a client that may log in."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.port = free_port()
        for name in ("host", "client"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True
            )
        shutil.copy(folder / "client.pub", folder / "authorized_keys")
        host = (folder / "host.pub").read_text().split()[:2]
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {' '.join(host)}\n")
        self.client = folder / "ssh_config"
        self.client.write_text(
            f"IdentityFile {folder}/client\nIdentitiesOnly yes\nUserKnownHostsFile {folder}/known_hosts\n"
            "StrictHostKeyChecking yes\nGlobalKnownHostsFile /dev/null\n"
        )
        (folder / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1\nPort {self.port}\nHostKey {folder}/host\nPidFile none\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n"
            "AcceptEnv GIT_PROTOCOL\n"
        )
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def command(self) -> str:
        """What GIT_SSH_COMMAND has to be."""
        return shlex.join(["ssh", "-F", str(self.client)])

    def url(self, path: Path) -> str:
        return f"ssh://{_user()}@127.0.0.1:{self.port}{path}"

    def start(self) -> None:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
        assert sshd, "scripts/setup develop installs openssh-server"
        self._process = subprocess.Popen(
            [sshd, "-D", "-e", "-f", str(self._folder / "sshd_config")], stderr=subprocess.DEVNULL
        )
        wait_until(self._listens)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Let whoever connects wait: the kernel takes the connection, and nobody says anything."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except ConnectionRefusedError:
            return False
        return True


def _user() -> str:
    return subprocess.run(["id", "-un"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


@contextmanager
def ssh_server(folder: Path) -> Iterator[SshServer]:
    server = SshServer(folder)
    try:
        yield server
    finally:
        server.stop()
