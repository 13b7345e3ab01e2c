import lzma
from collections.abc import Iterator
from pathlib import Path

import pytest

from chandlery.plan.popularity import Popularity
from chandlery.telemetry import logs
from tests.support.binary_cache_server import Server, narinfo, served
from tests.support.plan_commands import APP, CLOSURE, DATA, LIB, run


@pytest.fixture(autouse=True)
def _data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The runner's stderr is closed when it is done, and loggers of other tests would still write there.
    monkeypatch.setattr(logs, "configure", lambda _: None)
    monkeypatch.setenv("CHANDLERY_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "popularity.json"
    groups = {"lib": "data", "data": "data"}
    file.write_bytes(Popularity({"app": 2, "lib": 4000, "data": 50}, groups).encode())
    return file


@pytest.fixture
def server() -> Iterator[Server]:
    names = {path: path.rpartition("/")[2] for path in (APP, LIB, DATA)}
    files = {
        f"/{names[each['path']][:32]}.narinfo": narinfo(  # type: ignore[index]
            names[each["path"]],  # type: ignore[index]
            int(str(each["narSize"])),
            *(names[it] for it in each["references"]),  # type: ignore[attr-defined]
        ).encode()
        for each in CLOSURE
    }
    listed = "\n".join(names).encode()
    files |= {"/store-paths.xz": lzma.compress(listed), "/my-channel/store-paths.xz": lzma.compress(listed)}
    with served(Server(files)) as running:
        yield running


def test_popularity_comes_from_a_cache(server: Server, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    shown = run("popularity", server.url, "--output", output)
    table = Popularity.parse(output.read_bytes())

    assert dict(table) == {"app": 1, "lib": 2, "data": 2}
    assert table.identity[:16] in shown
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith("out.json")] == ["out.json"]


def test_popularity_comes_from_a_channel(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHANDLERY_NIXPKGS_CHANNEL_URL", f"{server.url}/{{channel}}/git-revision")
    output = tmp_path / "out.json"
    run("popularity", "my-channel", "--cache", server.url, "--output", output)
    assert Popularity.parse(output.read_bytes()).source == "my-channel"
