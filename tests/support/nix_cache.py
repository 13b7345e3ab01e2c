"""A binary cache over HTTP that Nix itself has made, with its signature."""

import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

from chandlery.nix.closure import StorePath


def publish(store: Path, paths: Iterable[StorePath], folder: Path) -> str:
    """Copy store paths, and what they need, to `folder/cache`, signed; give the key to check that with."""
    key, public_key = folder / "key", folder / "key.pub"
    texts = list(map(str, paths))
    options = ("--extra-experimental-features", "nix-command", "--store", str(store))
    for command in (
        ["nix-store", "--generate-binary-cache-key", "test-1", str(key), str(public_key)],
        ["nix", "store", "sign", *options, "--recursive", "--key-file", str(key), *texts],
        ["nix", "copy", *options, "--to", f"file://{folder}/cache", *texts],
    ):
        subprocess.run(command, check=True, capture_output=True)
    return public_key.read_text().strip()


@contextmanager
def served_folder(folder: Path, withheld: str = "\0") -> Iterator[tuple[str, list[str]]]:
    """Serve a folder, but for what is below a `withheld` path; give its address, and what is asked for."""
    asked: list[str] = []
    over = Event()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith(withheld):
                over.wait()
            super().do_GET()

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            over.set()
            server.shutdown()
            thread.join()
