"""OpenStack Swift with its S3 API, an object store as Debian packages it (python3-swift), on loopback.

Its four servers run in Debian's own Python, and keep all in one folder that outlives them.
"""

import os
import pwd
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from secrets import token_hex

import httpx
import obstore
import pytest
from obstore.store import S3Store

from tests.support.servers import free_port, wait_until

_PYTHON = Path("/usr/bin/python3")
_SWIFT = Path("/usr/lib/python3/dist-packages/swift")

USER, KEY = "test:tester", "no-secret-at-all"

# Arguments: the folder, the server. The memory stands for memcached, of which one proxy has no need.
_SERVER = """
import sys
from swift.common import utils
folder, name = sys.argv[1:]
utils.set_swift_dir(folder)
from swift.common.wsgi import run_wsgi

class Memory:
    def __init__(self, app):
        self.app, self.items = app, {}
    def get(self, key, **_):
        return self.items.get(key)
    def set(self, key, value, **_):
        self.items[key] = value
    def delete(self, key, **_):
        self.items.pop(key, None)
    def __call__(self, environ, start_response):
        environ["swift.cache"] = self
        return self.app(environ, start_response)

def memory(_, **options):
    return Memory

sys.exit(run_wsgi(f"{folder}/{name}.conf", f"{name}-server"))
"""

# Arguments: the folder, and pairs of a server and its port.
_RINGS = """
import sys
from swift.common.ring import RingBuilder
folder, *pairs = sys.argv[1:]
for name, port in zip(pairs[::2], pairs[1::2]):
    builder = RingBuilder(2, 1, 1)
    builder.add_dev(dict(region=1, zone=1, ip="127.0.0.1", port=int(port), device="disk", weight=1))
    builder.rebalance()
    builder.get_ring().save(f"{folder}/{name}.ring.gz")
"""

_COMMON = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
disable_fallocate = true
fallocate_reserve = 0
log_address = {folder}/no-log
"""

_STORAGE = """
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""

_PROXY = f"""
[pipeline:main]
pipeline = catch_errors memory s3api tempauth slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:memory]
paste.filter_factory = __main__:memory
[filter:s3api]
use = egg:swift#s3api
[filter:slo]
use = egg:swift#slo
[filter:tempauth]
use = egg:swift#tempauth
user_{USER.replace(":", "_")} = {KEY} .admin
"""


@dataclass(frozen=True)
class Swift:
    """An object store; `stop` ends its processes as a power cut would, and `start` starts them again."""

    endpoint: str
    start: Callable[[], None]
    stop: Callable[[], None]

    @property
    def options(self) -> dict[str, str]:
        """What `storage_options` must say."""
        return {"endpoint": self.endpoint, "access_key_id": USER, "secret_access_key": KEY}

    @property
    def variables(self) -> dict[str, str]:
        """The same as the environment that programs for S3 share."""
        return {"AWS_ENDPOINT_URL": self.endpoint, "AWS_ACCESS_KEY_ID": USER, "AWS_SECRET_ACCESS_KEY": KEY}

    def make_bucket(self) -> str:
        """Make a new bucket; give its name."""
        name = f"bucket-{token_hex(4)}"
        httpx.put(obstore.sign(self.store(name), "PUT", "", timedelta(minutes=1))).raise_for_status()
        return name

    def store(self, bucket: str) -> S3Store:
        """Return a bucket as others see it that use it."""
        return S3Store(bucket, config=self.options, client_options={"allow_http": True})  # type: ignore[arg-type]

    def keys(self, bucket: str) -> dict[str, int]:
        """Return the keys in a bucket, and the sizes of their objects."""
        return {each["path"]: each["size"] for each in obstore.list(self.store(bucket)).collect()}


@contextmanager
def swift(folder: Path) -> Iterator[Swift]:
    """Start Swift in a folder; the test is skipped if there is none, which on CI is a failure."""
    if not _SWIFT.exists():
        reason = "not installed: python3-swift"
        pytest.fail(reason) if "CI" in os.environ else pytest.skip(reason)
    ports = {name: free_port() for name in ("account", "container", "object", "proxy")}
    (folder / "devices" / "disk").mkdir(parents=True)
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = test\n")
    user = pwd.getpwuid(os.geteuid()).pw_name
    for name, port in ports.items():
        own = _PROXY if name == "proxy" else _STORAGE.format(name=name)
        (folder / f"{name}.conf").write_text(_COMMON.format(port=port, user=user, folder=folder) + own)
    pairs = [str(each) for name, port in ports.items() if name != "proxy" for each in (name, port)]
    subprocess.run([_PYTHON, "-c", _RINGS, folder, *pairs], check=True, capture_output=True)
    running = ExitStack()

    def start() -> None:
        for name in ports:
            running.enter_context(_running(folder, name))
        wait_until(lambda: all(map(_listens, ports.values())))

    server = Swift(f"http://127.0.0.1:{ports['proxy']}", start, running.close)
    with running:
        start()
        yield server


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@contextmanager
def _running(folder: Path, name: str) -> Iterator[None]:
    with (
        (folder / f"{name}.log").open("ab") as log,
        subprocess.Popen(
            [_PYTHON, "-c", _SERVER, folder, name],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield
        finally:
            process.send_signal(signal.SIGKILL)
