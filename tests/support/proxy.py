"""nginx in front of a server."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.clients import Daemon
from tests.support.servers import RunningServer, free_port

_PROXY_LIMIT = 30


_START_LIMIT = 60.0


# /registry is the public address: the server knows neither it nor the port.
_NGINX = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{public};
        location / {{
            proxy_pass {private};
            proxy_read_timeout {limit}s;
            proxy_set_header Host $host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        }}
    }}
}}
"""


@contextmanager
def proxy(folder: Path, server: RunningServer, port: int | None = None) -> Iterator[int]:
    """Start nginx in front of a server; give its port."""
    public = port or free_port()
    configuration = folder / "nginx.conf"
    configuration.write_text(
        _NGINX.format(folder=folder, public=public, private=server.url, limit=_PROXY_LIMIT)
    )
    argv = ["nginx", "-c", str(configuration), "-e", str(folder / "error.log")]
    with Daemon.start(argv, os.environ, folder / "nginx.log") as daemon:
        daemon.wait_until(lambda: answers(public), _START_LIMIT)
        yield public


def answers(port: int) -> bool:
    try:
        return not httpx.get(f"http://127.0.0.1:{port}/v2/").is_server_error
    except httpx.TransportError:
        return False
