import json
from pathlib import Path

import pytest

from chandlery.errors import SettingsError
from chandlery.plan.popularity import Popularity
from chandlery.plan.strategies import STRATEGIES
from chandlery.telemetry import logs
from tests.support.plan_commands import APP, CLOSURE, DATA, LIB, run


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
