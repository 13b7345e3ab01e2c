"""docs/architecture.md says what has to be touched to add something; here one of each is added to a copy."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import chandlery
from tests.support.package_sets import PACKAGE_SET
from tests.support.servers import HOST_PATHS, LIMIT, free_port, plain_environment, wait_until

PROJECT = Path(chandlery.__file__).parents[2]
TABLE = (PROJECT / "docs/architecture.md").read_text().partition("## To add a ...")[2].partition("\n## ")[0]


def named_in_the_table(what: str) -> set[str]:
    """Return the files that the table says have to be touched."""
    [cell] = re.findall(rf"^\| {what} \|.*\|([^|]*)\|$", TABLE, flags=re.MULTILINE)
    return set(re.findall(r"`(\w+/[\w/]+\.\w+)`", cell))


class Copy:
    """A copy of the code, in which files are written, and touched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.touched: set[str] = set()
        for part in ("src", "docs", "tests/test_architecture.py"):
            source, target = PROJECT / part, folder / part
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)

    def write(self, file: str, text: str) -> None:
        path = self.folder / "src/chandlery" / file
        assert not path.exists()
        path.write_text(text)

    def touch(self, file: str, before: str, after: str) -> None:
        path = self.folder / "src/chandlery" / file
        text = path.read_text()
        assert text.count(before) == 1, f"{before!r} stands in {file} {text.count(before)} times"
        path.write_text(text.replace(before, after))
        self.touched.add(file)

    def environment(self, **variables: str) -> dict[str, str]:
        return {**plain_environment(**variables), "PYTHONPATH": str(self.folder / "src")}

    def chandlery(self, *arguments: str, **variables: str) -> str:
        argv = [sys.executable, "-m", "chandlery", *arguments]
        done = subprocess.run(
            argv,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def build(self, *arguments: str, **variables: str) -> dict[str, object]:
        data = str(self.folder / "data")
        source = variables.pop("source", f"path!{PACKAGE_SET}")
        told = self.chandlery(
            *("build", "hello", "--json", "--source", source, "--data-dir", data, *arguments),
            CHANDLERY_HOST_PATHS=HOST_PATHS,
            **variables,
        )
        built: dict[str, object] = json.loads(told)
        return built

    def keeps_the_rules(self) -> None:
        argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_architecture.py"]
        environment = {**os.environ, "PYTHONPATH": str(self.folder / "src")}
        done = subprocess.run(
            argv, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
        assert done.returncode == 0, done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_a_package_source(copy: Copy) -> None:
    copy.write(
        "sources/release.py",
        '''"""A folder that never changes, `release!<folder>`."""

from collections.abc import Sequence
from pathlib import Path

from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.documents import Platform


class ReleaseSource:
    """One folder."""

    kind = "release"

    def __init__(self, folder: str) -> None:
        self.location = folder
        self.text = f"release!{folder}"

    @property
    def platforms(self) -> tuple[Platform, ...]:
        return (Platform.of_host(),)

    def serves(self, location: str) -> bool:
        return location == self.location

    async def upstreams(self) -> Sequence[str]:
        return ()

    async def pin(self, reference: str, platform: Platform) -> PinnedSource:
        return PinnedSource(self.kind, self.location, "1" * 64, nix={"tree": self.location})

    def chosen_by(self, reference: str, pin: PinnedSource | None = None) -> str:
        return ""

    async def at(self, revision: str, platform: Platform) -> PinnedSource | None:
        return await self.pin("latest", platform)

    async def refresh(self, max_age: float) -> None: ...

    def keep(self, revisions: Sequence[str]) -> None: ...

    async def close(self) -> None: ...
''',
    )
    copy.touch(
        "sources/kinds.py",
        '    "path": ("path!<folder>", _path),\n',
        '    "path": ("path!<folder>", _path),\n'
        '    "release": ("release!<folder>", lambda place: ReleaseSource(place.location)),\n',
    )
    copy.touch(
        "sources/kinds.py",
        "from chandlery.sources.pins import",
        "from chandlery.sources.release import ReleaseSource\nfrom chandlery.sources.pins import",
    )
    copy.touch("nix/expressions/package_set.nix", "    path = tree;", "    path = tree;\n    release = tree;")
    assert copy.build(source=f"release!{PACKAGE_SET}")["manifest"]
    assert copy.touched == named_in_the_table("package source")
    copy.keeps_the_rules()


def test_a_storage_backend(copy: Copy) -> None:
    copy.write(
        "storage/elsewhere.py",
        '''"""Blobs as files in another folder, `elsewhere://<folder>`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from chandlery.storage.blob_store import BlobStore
from chandlery.storage.file_store import FileBlobStore


@contextmanager
def elsewhere(text: str, options: Mapping[str, str], folder: Path, redirects: bool) -> Iterator[BlobStore]:
    """Open the store."""
    with FileBlobStore(Path(text.removeprefix("elsewhere://"))) as blobs:
        yield blobs
''',
    )
    copy.touch(
        "storage/kinds.py",
        "KINDS: Mapping[str, StorageKind] = {\n",
        "KINDS: Mapping[str, StorageKind] = {\n"
        '    "elsewhere": StorageKind("elsewhere://FOLDER", str, elsewhere),\n',
    )
    copy.touch(
        "storage/kinds.py",
        "from chandlery.storage.file_store",
        "from chandlery.storage.elsewhere import elsewhere\nfrom chandlery.storage.file_store",
    )
    there = copy.folder / "there"
    copy.build(CHANDLERY_STORAGE=f"elsewhere://{there}")
    assert [path for path in there.glob("blobs/sha256/*/*") if path.is_file()]
    assert copy.touched == named_in_the_table("storage backend")
    copy.keeps_the_rules()


def test_a_layering_strategy(copy: Copy) -> None:
    copy.write(
        "plan/all_in_one.py",
        '''"""One layer for everything."""

from chandlery.nix.closure import Closure
from chandlery.plan.layer_group import LayerGroup
from chandlery.plan.popularity import Popularity


def all_in_one(closure: Closure, popularity: Popularity, budget: int) -> list[LayerGroup]:
    """Return one group."""
    return [LayerGroup(tuple(sorted(node.path for node in closure.nodes)), closure.nar_size)]
''',
    )
    copy.touch(
        "plan/strategies.py",
        '        "grouped": grouped,\n',
        '        "grouped": grouped,\n        "all-in-one": all_in_one,\n',
    )
    copy.touch(
        "plan/strategies.py",
        "from chandlery.plan.layer_group",
        "from chandlery.plan.all_in_one import all_in_one\nfrom chandlery.plan.layer_group",
    )
    built = copy.build(CHANDLERY_LAYER_STRATEGY="all-in-one")
    manifest = built["manifest"]
    assert isinstance(manifest, dict)
    assert len(manifest["layers"]) == 2  # and the root filesystem
    assert copy.touched == named_in_the_table("layering strategy")
    copy.keeps_the_rules()


def test_a_compression(copy: Copy) -> None:
    copy.touch(
        "layers/compression.py",
        "_ALL: tuple[Compression, ...] = (NoCompression(), Gzip(), Zstd())",
        '''@dataclass(frozen=True, slots=True)
class Xz:
    """As small as can be."""

    name: str = "xz"
    media_type: str = f"{OCI_LAYER}+xz"
    fingerprint: str = "xz"

    def compressor(self) -> Compressor:
        """Start a stream."""
        import lzma

        return lzma.LZMACompressor()


_ALL: tuple[Compression, ...] = (NoCompression(), Gzip(), Zstd(), Xz())''',
    )
    manifest = copy.build("--compression", "xz")["manifest"]
    assert isinstance(manifest, dict)
    assert {layer["mediaType"].rpartition("+")[2] for layer in manifest["layers"]} == {"xz"}
    assert copy.touched == named_in_the_table("compression")
    copy.keeps_the_rules()


def test_a_build_index(copy: Copy) -> None:
    copy.write(
        "builds/told_index.py",
        '''"""An index that leaves a note of itself."""

from pathlib import Path

from chandlery.builds.sqlite.index import SqliteIndex


class ToldIndex(SqliteIndex):
    """The index in a folder of its own."""

    def __init__(self, folder: Path, use_interval: float) -> None:
        super().__init__(folder / "told", use_interval=use_interval)
''',
    )
    copy.touch(
        "server/parts.py",
        "SqliteIndex(settings.data_dir, use_interval=use_interval(settings.gc_grace)) as index",
        "ToldIndex(settings.data_dir, use_interval(settings.gc_grace)) as index",
    )
    copy.touch(
        "server/parts.py",
        "from chandlery.builds.sqlite.index import SqliteIndex",
        "from chandlery.builds.told_index import ToldIndex",
    )
    copy.build()
    assert list((copy.folder / "data/told").glob("build-index-*.sqlite"))
    assert copy.touched == named_in_the_table("build index")
    copy.keeps_the_rules()


def test_a_command(copy: Copy) -> None:
    copy.write(
        "cli/hello.py",
        '''"""`chandlery hello`."""

import typer


def hello(name: str) -> None:
    """Greet somebody."""
    typer.echo(f"Hello {name}")
''',
    )
    copy.touch("cli/main.py", "for command in (serve, build,", "for command in (hello, serve, build,")
    copy.touch(
        "cli/main.py",
        "from chandlery.cli.maintenance",
        "from chandlery.cli.hello import hello\nfrom chandlery.cli.maintenance",
    )
    assert copy.chandlery("hello", "chandler") == "Hello chandler\n"
    assert copy.touched == named_in_the_table("command")
    copy.keeps_the_rules()


def test_a_page(copy: Copy) -> None:
    copy.write(
        "server/hello.py",
        '''"""A page."""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route


def routes() -> Sequence[Route]:
    """Return the routes."""
    return [Route("/hello", hello)]


async def hello(_: Request) -> Response:
    """Greet."""
    return PlainTextResponse("Hello chandler")
''',
    )
    copy.touch(
        "server/app.py",
        "                    *monitoring.routes(",
        "                    *hello.routes(),\n                    *monitoring.routes(",
    )
    copy.touch(
        "server/app.py",
        "from chandlery.server import monitoring",
        "from chandlery.server import hello, monitoring",
    )
    port = free_port()
    arguments = ["serve", "--port", str(port), "--source", f"path!{PACKAGE_SET}", "--data-dir", "data"]
    with subprocess.Popen(
        [sys.executable, "-m", "chandlery", *arguments], cwd=copy.folder, env=copy.environment()
    ) as server:
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/hello"))
        finally:
            server.terminate()
    assert copy.touched == named_in_the_table("page")
    copy.keeps_the_rules()


def answers(url: str) -> bool:
    try:
        return httpx.get(url).text == "Hello chandler"
    except httpx.TransportError:
        return False
