import asyncio
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.build_index import SCHEMA_VERSION, BuildIndex
from chandlery.data_folder import locked
from chandlery.digest import Digest
from chandlery.errors import StorageError
from chandlery.oci import OCI_CONFIG, OCI_LAYER, BuiltImage, Descriptor, ManifestFormat, PackedLayer

NAME = f"build-index-{SCHEMA_VERSION}.sqlite"


def a_layer(text: str) -> PackedLayer:
    digest = Digest.of(text.encode())
    return PackedLayer(Descriptor(f"{OCI_LAYER}+gzip", digest, len(text), {"of": text}), digest, "bWQ1")


def an_image(text: str) -> BuiltImage:
    descriptor = Descriptor(OCI_CONFIG, Digest.of(text.encode()), len(text))
    manifests = dict.fromkeys(ManifestFormat, descriptor)
    return BuiltImage(manifests, descriptor, (a_layer(text), a_layer(text + "2")), 49, 123_456_789)


def test_a_layer_comes_back_equal_from_another_process(tmp_path: Path) -> None:
    with BuildIndex(tmp_path) as index:
        index.remember_layer("key", a_layer("git"))
    with BuildIndex(tmp_path) as index:
        assert index.layer("key") == a_layer("git")
        assert index.layer("other") is None


def test_an_image_comes_back_equal(tmp_path: Path) -> None:
    with BuildIndex(tmp_path) as index:
        index.remember_image("key", "git/jq", "latest", an_image("git"))
        assert index.image("key") == an_image("git")
        assert index.image("other") is None


def test_remembering_again_replaces(tmp_path: Path) -> None:
    with BuildIndex(tmp_path) as index:
        for text in ("first", "second"):
            index.remember_layer("key", a_layer(text))
            index.remember_image("key", "git", "latest", an_image(text))
        assert index.layer("key") == a_layer("second")
        assert index.image("key") == an_image("second")


def test_tags_are_those_of_the_name(tmp_path: Path) -> None:
    with BuildIndex(tmp_path) as index:
        for name, tag in [("git", "unstable"), ("git", "latest"), ("git", "latest"), ("jq", "other")]:
            index.remember_image("key", name, tag, an_image(name))
        assert index.tags("git") == ["latest", "unstable"]
        assert index.tags("none") == []


def test_the_time_of_the_last_use_is_kept(tmp_path: Path) -> None:
    times = iter([10.0, 20.0, 30.0, 40.0])
    with BuildIndex(tmp_path, clock=lambda: next(times)) as index:
        index.remember_image("old", "a", "latest", an_image("a"))
        index.remember_image("new", "b", "latest", an_image("b"))
        assert list(index.last_used().items()) == [("old", 10.0), ("new", 20.0)]
        index.remember_use("old")
        assert list(index.last_used().items()) == [("new", 20.0), ("old", 30.0)]
        index.remember_image("new", "b", "unstable", an_image("b"))
        assert list(index.last_used().items()) == [("old", 30.0), ("new", 40.0)]


# No NUL: an attribute path is an argument of a program.
ATTRIBUTE_PATHS = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@given(records=st.dictionaries(ATTRIBUTE_PATHS, st.binary()), others=st.sets(ATTRIBUTE_PATHS))
def test_resolutions_are_those_that_were_remembered_at_that_pin(
    tmp_path_factory: pytest.TempPathFactory, records: dict[str, bytes], others: set[str]
) -> None:
    with BuildIndex(tmp_path_factory.mktemp("index")) as index:
        index.remember_resolutions("pin", records)
        assert index.resolutions("pin", [*records, *others]) == records
        assert index.resolutions("another pin", records) == {}


def test_more_resolutions_than_a_query_has_variables(tmp_path: Path) -> None:
    records = {f"package-{number}": b"{}" for number in range(70_000)}
    with BuildIndex(tmp_path) as index:
        index.remember_resolutions("pin", records)
        assert index.resolutions("pin", records) == records


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 1000])
def test_a_file_that_is_no_database_is_moved_aside(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    with BuildIndex(tmp_path) as index:
        index.remember_layer("key", a_layer("git"))
        assert index.layer("key") == a_layer("git")
    if content:
        assert (tmp_path / NAME).with_suffix(".broken").read_bytes() == content


def test_a_damaged_database_is_moved_aside(tmp_path: Path) -> None:
    with BuildIndex(tmp_path) as index:
        index.remember_resolutions("pin", {f"package-{number}": bytes(100) for number in range(1000)})
    damaged = bytearray((tmp_path / NAME).read_bytes())
    for page in range(2 * 4096, len(damaged), 4096):
        damaged[page : page + 64] = b"\xff" * 64
    (tmp_path / NAME).write_bytes(damaged)
    with BuildIndex(tmp_path) as index:
        assert index.resolutions("pin", ["package-7"]) == {}
        index.remember_layer("key", a_layer("git"))
        assert index.layer("key") == a_layer("git")


def test_another_schema_version_is_another_file(tmp_path: Path) -> None:
    with BuildIndex(tmp_path):
        pass
    (tmp_path / NAME).rename(tmp_path / f"build-index-{SCHEMA_VERSION + 1}.sqlite")
    with BuildIndex(tmp_path) as index:
        index.remember_layer("key", a_layer("git"))
    assert len(list(tmp_path.glob("*.sqlite"))) == 2


def test_a_record_that_can_not_be_read_is_a_miss(tmp_path: Path) -> None:
    with BuildIndex(tmp_path) as index:
        index.remember_layer("key", a_layer("git"))
        with sqlite3.connect(tmp_path / NAME) as database:
            database.execute("UPDATE layers SET record = ?", (b'{"descriptor": "\xff"}',))
        assert index.layer("key") is None


def test_what_can_not_be_written_fails_nobody(tmp_path: Path) -> None:
    with BuildIndex(tmp_path) as index:
        index.remember_layer("key", a_layer("git"))
        with sqlite3.connect(tmp_path / NAME) as database:
            database.execute("DROP TABLE layers")
        index.remember_layer("other", a_layer("jq"))
        assert index.layer("key") is None
        index.remember_image("key", "git", "latest", an_image("git"))
        assert index.image("key") == an_image("git")


def test_a_folder_that_can_not_be_written_is_one_clear_line() -> None:
    with pytest.raises(StorageError, match=r"^/sys/chandlery/.*choose another data folder$"):
        BuildIndex(Path("/sys/chandlery"))


def test_a_reader_does_not_wait_for_a_writer(tmp_path: Path) -> None:
    with BuildIndex(tmp_path) as index:
        index.remember_layer("key", a_layer("git"))
        other = sqlite3.connect(tmp_path / NAME, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        writer = threading.Thread(target=index.remember_layer, args=("other", a_layer("jq")))
        writer.start()
        assert index.layer("key") == a_layer("git")
        assert writer.is_alive()
        other.execute("COMMIT")
        other.close()
        writer.join()
        assert index.layer("other") == a_layer("jq")


async def test_threads_share_an_index(tmp_path: Path) -> None:
    with BuildIndex(tmp_path) as index:
        names = [f"layer {number}" for number in range(50)]
        await asyncio.gather(
            *(asyncio.to_thread(index.remember_layer, name, a_layer(name)) for name in names)
        )
        assert [index.layer(name) for name in names] == [a_layer(name) for name in names]


def test_one_process_at_a_time_opens_an_index(tmp_path: Path) -> None:
    opener = threading.Thread(target=lambda: BuildIndex(tmp_path).close())
    with locked(tmp_path):
        opener.start()
        opener.join(timeout=0.2)
        assert opener.is_alive()
    opener.join()
    assert (tmp_path / NAME).exists()


OPEN_AND_REMEMBER = """
import sys
from pathlib import Path
from chandlery.build_index import BuildIndex

sys.stdin.readline()
with BuildIndex(Path(sys.argv[1])) as index:
    for number in range(20):
        index.remember_resolutions("pin", {f"{sys.argv[2]} {number}": b"{}"})
"""


def test_processes_that_start_at_once_share_an_index(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN_AND_REMEMBER, str(tmp_path), name], stdin=subprocess.PIPE
        )
        for name in "abcd"
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    wanted = [f"{name} {number}" for name in "abcd" for number in range(20)]
    with BuildIndex(tmp_path) as index:
        assert sorted(index.resolutions("pin", wanted)) == sorted(wanted)
