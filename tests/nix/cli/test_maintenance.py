import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from chandlery.oci.digest import Digest
from tests.support.damage import flip
from tests.support.package_sets import SOURCE
from tests.support.servers import LIMIT, environment, serving


@dataclass(frozen=True)
class DataFolder:
    path: Path

    def run(self, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        settings = {
            "CHANDLERY_DATA_DIR": str(self.path),
            "CHANDLERY_SOURCE": SOURCE,
            "COLUMNS": "100",
            **variables,
        }
        return subprocess.run(
            [sys.executable, "-m", "chandlery", *arguments],
            env=environment(**settings),
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )

    def blobs(self) -> dict[Digest, Path]:
        files = self.path.glob("blobs/sha256/*/*")
        return {Digest(file.name): file for file in files}

    def are_whole(self) -> bool:
        return all(Digest.of(file.read_bytes()) == digest for digest, file in self.blobs().items())


@pytest.fixture(scope="module")
def used_folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """Return a data folder with two images, which every test leaves whole."""
    folder = DataFolder(tmp_path_factory.mktemp("data"))
    for package in ("hello", "greeter"):
        assert folder.run("build", package).returncode == 0
    return folder


@pytest.fixture
def folder(used_folder: DataFolder) -> Iterator[DataFolder]:
    before = set(used_folder.blobs())
    yield used_folder
    assert set(used_folder.blobs()) == before
    assert used_folder.are_whole()


def test_scrub_says_that_all_is_well(folder: DataFolder) -> None:
    finished = folder.run("scrub")
    assert finished.returncode == 0
    assert finished.stdout.startswith(f"{len(folder.blobs())} blobs with ")
    assert finished.stdout.endswith("0 damaged or missing, 0 repaired\n")


def test_scrub_finds_and_mends_beside_a_running_server(folder: DataFolder, tmp_path: Path) -> None:
    with serving(folder.path, SOURCE, tmp_path / "log", variables={"CHANDLERY_SCRUB_RATE": "0"}):
        (damaged, damaged_file), (missing, missing_file), *_ = sorted(
            folder.blobs().items(), key=lambda item: -item[1].stat().st_size
        )
        flip(damaged_file)
        missing_file.unlink()
        looked = folder.run("scrub", "--no-repair")
        assert looked.returncode == 1
        assert "2 damaged or missing, 0 repaired" in looked.stdout
        assert Digest.of(damaged_file.read_bytes()) != damaged
        mended = folder.run("scrub")
    assert mended.returncode == 0
    assert "2 damaged or missing, 2 repaired" in mended.stdout
    rows = [line.split() for line in mended.stdout.splitlines() if line.startswith("sha256:")]
    assert {(row[0], row[1], *row[3:]) for row in rows} == {
        (f"sha256:{damaged.hex[:12]}", "damaged", "made", "again"),
        (f"sha256:{missing.hex[:12]}", "missing", "made", "again"),
    }


def test_scrub_fails_over_what_can_not_be_made_again(folder: DataFolder) -> None:
    content = b"what an image needed that nobody remembers"
    digest = Digest.of(content)
    file = folder.path / "blobs" / "sha256" / digest.hex[:2] / digest.hex
    file.write_bytes(content.upper())
    finished = folder.run("scrub")
    assert finished.returncode == 1
    assert "1 damaged or missing, 0 repaired" in finished.stdout
    assert "no image is known that needs it" in " ".join(finished.stdout.split())
    assert not file.exists()


def test_collect_without_a_limit_removes_nothing_and_says_so(folder: DataFolder) -> None:
    finished = folder.run("collect")
    assert finished.returncode == 0
    assert "limit: none, so nothing has to go" in finished.stdout


def test_collect_tells_with_dry_run_what_it_would_remove_and_then_removes_it(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    for package in ("hello", "jq"):
        assert folder.run("build", package).returncode == 0
    arguments = ("collect", "--disk-limit", "1")
    before = folder.blobs()
    told = folder.run(*arguments, "--dry-run", CHANDLERY_GC_GRACE="0.001")
    assert told.returncode == 0, told.stderr
    assert [line.split()[0] for line in told.stdout.splitlines()[1:3]] == ["hello", "jq"]
    assert "would be freed" in told.stdout
    assert folder.blobs() == before
    done = folder.run(*arguments, CHANDLERY_GC_GRACE="0.001")
    assert done.stdout == told.stdout.replace("would be freed", "freed")
    assert folder.blobs() == {}


# Status


def test_status_tells_what_a_folder_holds(folder: DataFolder) -> None:
    told = folder.run("status", "--json", CHANDLERY_DISK_LIMIT="1000000")
    assert told.returncode == 0
    status = json.loads(told.stdout)
    parts = {part["name"]: part for part in status["parts"]}
    assert parts["blobs"]["number"] == len(folder.blobs())
    assert parts["Nix store"]["number"] > 2
    assert status["counts"]["images"] == 2
    assert status["counts"]["blobs"] == len(folder.blobs())
    assert status["total"] == sum(part["bytes"] for part in status["parts"])
    assert (status["exists"], status["disk_limit"], status["storage"]) == (True, 1_000_000, None)

    for_people = folder.run("status").stdout
    assert f"{folder.path}, no server runs" in for_people
    assert "images: 2, with" in for_people


def test_status_works_beside_a_server_and_counts_no_bucket(folder: DataFolder, tmp_path: Path) -> None:
    with serving(folder.path, SOURCE, tmp_path / "log"):
        told = folder.run("status", CHANDLERY_STORAGE="s3://bucket/blobs")
    assert "in use by a server" in told.stdout
    assert f"blobs: in s3://bucket/blobs, not counted; images need {len(folder.blobs())} with" in told.stdout


def test_status_of_a_folder_that_is_not_there_makes_none(tmp_path: Path) -> None:
    nowhere = DataFolder(tmp_path / "nowhere")
    assert "there is no data folder" in nowhere.run("status").stdout
    told = nowhere.run("status", "--json")
    assert (told.returncode, json.loads(told.stdout)["exists"]) == (0, False)
    assert not nowhere.path.exists()


def test_status_says_what_it_can_not_read(folder: DataFolder, tmp_path: Path) -> None:
    copy = DataFolder(tmp_path / "copy")
    copy.path.mkdir()
    index = next(folder.path.glob("build-index-*.sqlite")).name
    (copy.path / index).write_bytes(b"no database" * 1000)
    assert "images: not counted, since the build index can't be read" in copy.run("status").stdout
    assert json.loads(copy.run("status", "--json").stdout)["counts"] is None

    told = DataFolder(copy.path / index).run("status")
    assert told.returncode == 1
    assert f"{index} is no folder" in told.stderr
