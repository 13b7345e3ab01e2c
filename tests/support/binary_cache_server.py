"""A binary cache on loopback."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from chandlery.sources.binary_cache import NarInfo


def base_name(number: int, name: str) -> str:
    return f"{number:032}-{name}"


def narinfo(name: str, size: int, *references: str) -> str:
    fields = {
        "StorePath": f"/nix/store/{name}",
        "URL": "nar/x.nar",
        "Compression": "none",
        "NarHash": "sha256:0",
        "NarSize": str(size),
        "References": " ".join(references),
    }
    return "".join(f"{key}: {value}\n" for key, value in fields.items())


@dataclass
class Server:
    """A cache on loopback: files by their path, what was asked for, and how often each fails first."""

    files: dict[str, bytes]
    asked: list[str] = field(default_factory=list)
    failing: dict[str, int] = field(default_factory=dict)
    url: str = ""

    @property
    def asked_narinfos(self) -> list[str]:
        return [path for path in self.asked if path.endswith(".narinfo")]


APP, LIB, OUTPUT, GONE = (
    base_name(0, "app-1.0"),
    base_name(1, "lib-2"),
    base_name(2, "lib-2-dev"),
    base_name(3, "gone-1"),
)
INFOS = {APP: NarInfo(10, (APP, LIB)), LIB: NarInfo(20, ()), OUTPUT: NarInfo(30, (LIB,))}


@contextmanager
def served(server: Server) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.asked.append(self.path)
            left = server.failing.get(self.path, 0)
            server.failing[self.path] = left - 1
            content = server.files.get(self.path)
            status = 503 if left > 0 else 404 if content is None else 200
            self.send_response(status)
            body = content if status == 200 and content is not None else b"no"
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        thread = Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        server.url = f"http://127.0.0.1:{listener.server_address[1]}"
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()
