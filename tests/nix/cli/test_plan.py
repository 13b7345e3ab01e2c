import json
import lzma
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from chandlery.cli import plan as plan_commands
from chandlery.errors import SettingsError
from chandlery.plan.popularity import Popularity
from chandlery.plan.strategies import STRATEGIES
from chandlery.telemetry import logs
from tests.support.binary_cache_server import Server, narinfo, served
from tests.support.package_sets import SOURCE

APP, LIB, DATA = (
    f"/nix/store/{str(number) * 32}-{name}" for number, name in enumerate(["app-1", "lib-2", "data-3"])
)
CLOSURE = [
    {"path": APP, "narSize": 3_000_000, "references": [LIB, DATA]},
    {"path": LIB, "narSize": 5_000_000, "references": []},
    {"path": DATA, "narSize": 100_000, "references": []},
]
cli = typer.Typer(pretty_exceptions_enable=False)
cli.command()(plan_commands.plan)
cli.command()(plan_commands.popularity)


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(cli, list(map(str, arguments)), env={"COLUMNS": "200"})
    if result.exception:
        raise result.exception
    return result.stdout


@pytest.fixture(autouse=True)
def _data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The runner's stderr is closed when it is done, and loggers of other tests would still write there.
    monkeypatch.setattr(logs, "configure", lambda _: None)
    monkeypatch.setenv("CHANDLERY_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture
def closure(tmp_path: Path) -> Path:
    file = tmp_path / "closure.json"
    file.write_text(json.dumps(CLOSURE))
    return file


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "popularity.json"
    groups = {"lib": "data", "data": "data"}
    file.write_bytes(Popularity({"app": 2, "lib": 4000, "data": 50}, groups).encode())
    return file


def test_a_plan_of_a_closure_is_shown(closure: Path, table: Path) -> None:
    shown = run("plan", "--closure", closure, "--popularity", table, "--strategy", "grouped")
    rows = [line.split() for line in shown.splitlines()[1:]]
    assert rows[0] == ["1", "5.1", "50", "2", "data-3,", "lib-2"]
    assert rows[1] == ["2", "3.0", "2", "1", "app-1"]
    assert shown.endswith("2 layers, 3 store paths, 8.1 MB\n")


def test_a_plan_is_json_for_programs(closure: Path) -> None:
    shown = json.loads(
        run("plan", "--closure", closure, "--strategy", "one-per-path", "--max-layers", "3", "--json")
    )
    layers = [(layer["storePaths"], layer["narSize"], layer["inRegistry"]) for layer in shown["layers"]]
    assert layers == [([LIB], 5_000_000, None), ([APP, DATA], 3_100_000, None)]


def test_strategies_are_set_side_by_side(closure: Path) -> None:
    shown = run("plan", "--closure", closure, "--compare", "--max-layers", "3")
    assert [line.split()[0] for line in shown.splitlines()[1:]] == list(STRATEGIES)
    assert json.loads(run("plan", "--closure", closure, "--compare", "--json"))["one-per-path"]["layers"] == 3


@pytest.fixture
def workload(tmp_path: Path) -> tuple[str | Path, ...]:
    graph, pulls = tmp_path / "graph.json", tmp_path / "workload.json"
    graph.write_text(
        json.dumps({"names": ["lib", "app", "tool"], "sizes": [50, 5, 1], "refs": [[], [0], [0]]})
    )
    pulls.write_text(json.dumps({"clients": [[["app"], ["tool"]]], "updates": [["lib"]]}))
    return ("--compare", "--graph", graph, "--workload", pulls)


def test_strategies_are_played_on_a_workload(workload: tuple[str | Path, ...]) -> None:
    costs = json.loads(run("plan", *workload, "--json", "--max-layers", "2"))
    assert list(costs) == ["limit", *STRATEGIES]
    assert costs["limit"]["downloaded"] == costs["limit"]["downloadedAfterUpdates"] == 56
    assert costs["one-per-path"]["downloaded"] == 106
    rows = [line.split() for line in run("plan", *workload, "--max-layers", "2").splitlines()[1:]]
    assert rows[0][0] == "limit"
    assert all(float(row[2]) >= 1 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "name packages, or a file"),
        (["jq", "--closure", "closure.json"], "name packages, or a file"),
        (["--closure", "/nowhere.json"], r"/nowhere\.json.*No such file"),
        (["jq", "--strategy", "best"], "one of grouped"),
        (["--compare", "--graph", "graph.json"], "go together"),
        (["--closure", "/dev/null"], "/dev/null: .*the JSON of a closure"),
        (["--closure", "/dev/null", "--popularity", "/dev/null"], "/dev/null: it is no table"),
    ],
)
def test_what_is_wrong_is_told(arguments: list[str], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        run("plan", *arguments)


@pytest.mark.nix
def test_a_plan_of_an_image_is_shown() -> None:
    shown = json.loads(run("plan", "hello", "--source", SOURCE, "--json"))
    paths = [path for layer in shown["layers"] for path in layer["storePaths"]]
    assert any("-hello-" in path for path in paths)
    assert all(layer["inRegistry"] == 0 for layer in shown["layers"])


@pytest.mark.nix
def test_a_plan_of_an_image_knows_what_the_servers_table_says(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.write_bytes(Popularity({"hello": 7}).encode())
    monkeypatch.setenv("CHANDLERY_POPULARITY", str(table))
    shown = json.loads(run("plan", "hello", "--source", SOURCE, "--json"))
    assert max(layer["popularity"] for layer in shown["layers"]) == 7
    other = tmp_path / "other.json"
    other.write_bytes(Popularity({"hello": 8}).encode())
    shown = json.loads(run("plan", "hello", "--source", SOURCE, "--json", "--popularity", other))
    assert max(layer["popularity"] for layer in shown["layers"]) == 8


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
