import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from chandlery.oci.digest import Digest
from tests.support.one_image import LAYER, MISSING

# The real server

SERVE = """
import asyncio, sys
from pathlib import Path
from granian.constants import Interfaces
from granian.server.embed import Server
from starlette.applications import Starlette
from starlette.types import Message, Scope
from starlette.middleware import Middleware
from chandlery.storage.blob_store import BlobStore
from chandlery.storage.file_store import FileBlobStore
from chandlery.nix.pinned_source import PinnedSource
from chandlery.registry.api import routes
from chandlery.server.request_log import RequestLog
from tests.support.one_image import HOST, OneImage, one_image
from tests.support.served_blobs import AsTheyAre

async def main():
    with FileBlobStore(Path(sys.argv[1])) as blobs:
        images = OneImage(await one_image(blobs))
        app = Starlette(routes=routes(images, AsTheyAre(blobs), HOST), middleware=[Middleware(RequestLog)])
        await Server(app, port=int(sys.argv[2]), interface=Interfaces.ASGI).serve()

asyncio.run(main())
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[httpx.Client]:
    """A registry in granian, and a client that connects as soon as it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [sys.executable, "-c", SERVE, str(tmp_path), str(port)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with (
        subprocess.Popen(arguments, env=environment) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=httpx.HTTPTransport(retries=7)) as client,
    ):
        yield client
        process.terminate()


def test_the_real_server_on_one_connection(server: httpx.Client) -> None:
    path = f"/v2/git/blobs/{Digest.of(LAYER)}"
    connections = set()

    def get(path: str, **headers: str) -> httpx.Response:
        with server.stream("GET", path, headers=headers) as response:
            connections.add(response.extensions["network_stream"].get_extra_info("client_addr"))
            response.read()
        return response

    whole = get(path)
    assert (whole.status_code, whole.content) == (200, LAYER)
    assert whole.headers["content-length"] == str(len(LAYER))
    assert whole.headers["etag"] == f'"{Digest.of(LAYER)}"'
    head = server.head(path)
    assert (head.content, head.headers["content-length"]) == (b"", str(len(LAYER)))
    part = get(path, range="bytes=1000-1500000")
    assert (part.status_code, part.content) == (206, LAYER[1000:1500001])
    parts = get(path, range="bytes=0-9,-10")
    assert parts.status_code == 206
    assert parts.headers["content-length"] == str(len(parts.content))
    assert get(path, range="lines=9-3").content == LAYER
    assert get(path, range="bytes=99999999-").status_code == 416
    assert get(path, **{"if-none-match": whole.headers["etag"]}).status_code == 304
    assert get(f"/v2/git/blobs/{MISSING}").status_code == 404
    manifest = get("/v2/git/manifests/latest")
    assert manifest.headers["docker-content-digest"] == str(Digest.of(manifest.content))
    assert get("/v2/").json() == {}
    assert len(connections) == 1
