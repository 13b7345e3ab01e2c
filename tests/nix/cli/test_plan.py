import json
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from chandlery.plan.popularity import Popularity
from chandlery.telemetry import logs
from tests.support.debian_packages import PACKAGES, Deb, program
from tests.support.debian_repository import SUITE, debian_repository
from tests.support.package_sets import SOURCE
from tests.support.plan_commands import run
from tests.support.servers import HOST_PATHS


@pytest.fixture(autouse=True)
def _data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The runner's stderr is closed when it is done, and loggers of other tests would still write there.
    monkeypatch.setattr(logs, "configure", lambda _: None)
    monkeypatch.setenv("CHANDLERY_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("CHANDLERY_HOST_PATHS", HOST_PATHS)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "popularity.json"
    groups = {"lib": "data", "data": "data"}
    file.write_bytes(Popularity({"app": 2, "lib": 4000, "data": 50}, groups).encode())
    return file


def test_a_plan_of_an_image_is_shown() -> None:
    shown = json.loads(run("plan", "hello", "--source", SOURCE, "--json"))
    paths = [path for layer in shown["layers"] for path in layer["storePaths"]]
    assert any("-hello-" in path for path in paths)
    assert all(layer["inRegistry"] == 0 for layer in shown["layers"])


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


def test_a_plan_says_which_packages_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def agent(name: str) -> Deb:
        fields = {"Provides": "mail-agent", "Conflicts": "mail-agent"}
        return Deb(name, fields=fields, files={"usr/sbin/sendmail": program()})

    # Logs would stand in what is printed here, as `configure` does nothing.
    with debian_repository(tmp_path) as repository, capture_logs():
        alert = Deb("alert", fields={"Depends": "exim"})
        repository.publish(*PACKAGES, agent("exim"), agent("postfix"), alert)
        for name, value in (
            ("MIRROR", repository.mirrors.main),
            ("SECURITY_MIRROR", repository.mirrors.security),
            ("KEYRING", repository.mirrors.keyring),
        ):
            monkeypatch.setenv(f"CHANDLERY_DEBIAN_{name}", value)
        monkeypatch.setenv("CHANDLERY_SOURCE", f"debian!{SUITE}")
        shown = json.loads(run("plan", "alert", "postfix", "--json"))
        table = run("plan", "alert", "postfix")
        alone = json.loads(run("plan", "alert", "--json"))

    assert shown["collisions"] == [
        {"winner": "postfix", "loser": "exim", "reason": "it was asked for", "paths": ["/usr/sbin/sendmail"]}
    ]
    assert "here are those of postfix, since it was asked for" in table
    assert alone["collisions"] == []
