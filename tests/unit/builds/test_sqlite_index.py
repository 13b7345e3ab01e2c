import asyncio
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.builds import sqlite_index
from chandlery.builds.recipe import BuildOptions, Recipe
from chandlery.builds.sqlite_index import SCHEMA_VERSION
from chandlery.builds.sqlite_index import _Tables as BuildIndex
from chandlery.errors import StorageError, StorageFullError
from chandlery.image.name import ImageRequest
from chandlery.layers.root_layer import RootLayerOptions
from chandlery.machine.locks import exclusive
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.digest import Digest
from chandlery.oci.documents import (
    OCI_CONFIG,
    OCI_LAYER,
    OCI_MANIFEST,
    BuiltImage,
    Descriptor,
    ManifestFormat,
    PackedLayer,
    Platform,
)

NAME = f"build-index-{SCHEMA_VERSION}.sqlite"


def a_layer(text: str) -> PackedLayer:
    digest = Digest.of(text.encode())
    return PackedLayer(Descriptor(f"{OCI_LAYER}+gzip", digest, len(text), {"of": text}), digest)


def digest_of(text: str) -> Digest:
    return Digest.of(text.encode())


def an_image(text: str, *layers: str) -> BuiltImage:
    """Give an image with blobs of its own, and the layers of these names (two of its own if none)."""
    manifests = {
        each: Descriptor(OCI_MANIFEST, digest_of(f"{text} {each}"), len(text)) for each in ManifestFormat
    }
    config = Descriptor(OCI_CONFIG, digest_of(f"{text} config"), len(text))
    names = layers or (text, f"{text}2")
    return BuiltImage(manifests, config, tuple(map(a_layer, names)), 49, 123_456_789)


def an_origin(*packages: str, reference: str = "latest", revision: str = "1" * 64) -> Recipe:
    pin = PinnedSource("debian", "bookworm", revision, nix={"lock": "/locks/1", "mirrors": ["a", "b"]})
    root_layer = RootLayerOptions(1000, 100, extra_commands="touch it")
    request = ImageRequest(packages, Platform("linux", "amd64"), reference=reference)
    return Recipe(pin, request, BuildOptions(50, "zstd", root_layer=root_layer))


GIT = an_origin("git")


def test_a_layer_comes_back_equal_from_another_process(tmp_path: Path) -> None:
    with BuildIndex(tmp_path) as index:
        index.remember_layer("key", a_layer("git"))
    with BuildIndex(tmp_path) as index:
        assert index.layer("key") == a_layer("git")
        assert index.layer("other") is None


def test_an_image_comes_back_equal(tmp_path: Path) -> None:
    with BuildIndex(tmp_path) as index:
        index.remember_image(GIT, an_image("git"))
        assert index.image(GIT.key) == an_image("git")
        assert index.image("other") is None


def test_remembering_again_replaces(tmp_path: Path) -> None:
    with BuildIndex(tmp_path) as index:
        for text in ("first", "second"):
            index.remember_layer("key", a_layer(text))
            index.remember_image(GIT, an_image(text))
        assert index.layer("key") == a_layer("second")
        assert index.image(GIT.key) == an_image("second")
        assert index.blob(digest_of("first")) is None


def test_tags_are_those_of_the_name(tmp_path: Path) -> None:
    with BuildIndex(tmp_path) as index:
        for name, tag in [("git", "unstable"), ("git", "latest"), ("git", "latest"), ("jq", "other")]:
            index.remember_image(an_origin(name, reference=tag), an_image(name))
        assert index.tags("git") == ["1" * 16, "latest", "unstable"]
        assert index.tags("none") == []


def test_each_revision_that_an_image_was_made_at_has_a_tag(tmp_path: Path) -> None:
    with BuildIndex(tmp_path) as index:
        for revision in ("1" * 64, "2" * 64):
            index.remember_image(an_origin("git", revision=revision), an_image(revision))
        assert index.tags("git") == ["1" * 16, "2" * 16, "latest"]


def test_a_blob_is_needed_by_the_images_that_have_it(tmp_path: Path) -> None:
    with BuildIndex(tmp_path) as index:
        index.remember_image(an_origin("git"), an_image("git", "shared", "of git"))
        index.remember_image(an_origin("jq"), an_image("jq", "shared", "of jq"))
        assert index.needs("git", digest_of("of git"))
        assert index.needs("git", digest_of("shared"))
        assert not index.needs("git", digest_of("of jq"))
        assert not index.needs("none", digest_of("shared"))
        index.remember_image_index(b"{}")
        assert index.needs("none", Digest.of(b"{}"))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def index(tmp_path: Path, clock: Clock) -> Iterator[BuildIndex]:
    with BuildIndex(tmp_path, clock, use_interval=60.0) as opened:
        yield opened


def in_order_of_use(index: BuildIndex) -> list[tuple[str, float]]:
    return [(image.name, image.last_used) for image in index.least_recently_used()]


def test_images_are_told_in_the_order_of_their_last_use(index: BuildIndex, clock: Clock) -> None:
    old, new = an_origin("old"), an_origin("new")
    index.remember_image(old, an_image("old"))
    clock.now = 2000.0
    index.remember_image(new, an_image("new"))
    assert in_order_of_use(index) == [("old", 1000.0), ("new", 2000.0)]
    clock.now = 3000.0
    assert index.remember_use(old.key)
    assert in_order_of_use(index) == [("new", 2000.0), ("old", 3000.0)]
    clock.now = 4000.0
    index.remember_image(new, an_image("new"))
    assert in_order_of_use(index) == [("old", 3000.0), ("new", 4000.0)]
    assert [image.name for image in index.least_recently_used(3500.0)] == ["old"]


def test_a_use_is_written_once_a_minute(index: BuildIndex, clock: Clock, tmp_path: Path) -> None:
    index.remember_image(GIT, an_image("git"))
    with sqlite3.connect(tmp_path / NAME) as database:
        changes = "PRAGMA data_version"  # counts up with every commit of another connection
        for now, written in [
            (1030.0, False),
            (1059.0, False),
            (1061.0, True),
            (1062.0, False),
            (1200.0, True),
        ]:
            before = database.execute(changes).fetchone()
            clock.now = now
            assert index.remember_use(GIT.key)
            assert (database.execute(changes).fetchone() != before) == written


def test_the_use_of_an_image_that_is_not_kept_is_not_remembered(index: BuildIndex, clock: Clock) -> None:
    assert not index.remember_use(GIT.key)
    index.remember_image(GIT, an_image("git"))
    clock.now += 100
    assert index.forget_image(GIT.key, clock.now)
    assert not index.remember_use(GIT.key)


def test_an_origin_comes_back_equal_and_has_all_that_nix_needs(index: BuildIndex) -> None:
    index.remember_image(GIT, an_image("git"))
    for descriptor in an_image("git").descriptors:
        [origin] = index.recipes(descriptor.digest, limit=5)
        assert origin == GIT
        assert origin.key == GIT.key
        assert origin.pin.to_nix() == GIT.pin.to_nix()


def test_a_blob_is_known_with_its_size_and_what_it_is(index: BuildIndex) -> None:
    index.remember_image(GIT, an_image("git", "base"))
    base, manifest = index.blob(digest_of("base")), index.blob(digest_of("git oci"))
    assert base is not None
    assert (base.key, base.size, base.is_manifest, base.kept) == (GIT.key, 4, False, True)
    assert manifest is not None
    assert manifest.is_manifest
    assert index.blob(digest_of("other")) is None


def test_of_images_that_share_a_blob_the_one_used_last_answers_and_one_that_is_kept_first(
    index: BuildIndex, clock: Clock
) -> None:
    for number, name in enumerate(["a", "b", "c"]):
        clock.now = 1000.0 + number
        index.remember_image(an_origin(name), an_image(name, "base"))
    base = digest_of("base")
    names = [origin.request.name for origin in index.recipes(base, limit=2)]
    assert names == ["c", "b"]
    for name in ("c", "b"):
        assert index.forget_image(an_origin(name).key, 2000.0)
    known = index.blob(base)
    assert known is not None
    assert (known.key, known.kept) == (an_origin("a").key, True)
    assert [origin.request.name for origin in index.recipes(base, limit=5)] == ["a", "c", "b"]


def test_an_image_that_was_used_since_is_not_forgotten(index: BuildIndex, clock: Clock) -> None:
    index.remember_image(GIT, an_image("git"))
    assert not index.forget_image(GIT.key, 1000.0)
    assert index.image(GIT.key) is not None
    assert index.forget_image(GIT.key, 1000.1)
    assert not index.forget_image(GIT.key, 1000.1)


def test_an_image_that_was_forgotten_is_a_miss_with_an_origin_and_can_be_remembered_again(
    index: BuildIndex,
) -> None:
    index.remember_image(GIT, an_image("git"))
    index.forget_image(GIT.key, 2000.0)
    assert index.image(GIT.key) is None
    assert index.least_recently_used() == []
    assert index.recipes(digest_of("git"), limit=1) == [GIT]
    index.remember_image(GIT, an_image("git"))
    assert index.image(GIT.key) == an_image("git")


def test_blobs_are_needed_as_long_as_one_image_that_needs_them_is_kept(index: BuildIndex) -> None:
    for name in ("a", "b"):
        index.remember_image(an_origin(name), an_image(name, "base", name))
    base, only_a, unknown = digest_of("base"), digest_of("a"), digest_of("x")
    assert index.references()[base] == 2
    assert index.needed([base, only_a, unknown]) == {base, only_a}
    index.forget_image(an_origin("a").key, 2000.0)
    assert index.references()[base] == 1
    assert index.needed([base, only_a, unknown]) == {base}
    index.forget_image(an_origin("b").key, 2000.0)
    assert index.references()[base] == 0
    assert index.needed([base, only_a, unknown]) == set()


def test_what_an_image_needs_is_all_of_its_blobs(index: BuildIndex) -> None:
    image = an_image("git", "base", "base")
    index.remember_image(GIT, image)
    assert index.blobs_of(GIT.key) == {each.digest: each.size for each in image.descriptors}


def test_what_decides_about_deletion_is_never_guessed(index: BuildIndex, tmp_path: Path) -> None:
    index.remember_image(GIT, an_image("git"))
    with sqlite3.connect(tmp_path / NAME) as database:
        database.execute("DROP TABLE blobs")
    with pytest.raises(StorageError):
        index.needed([digest_of("git")])
    with pytest.raises(StorageError):
        index.references()


def test_layers_are_forgotten_by_their_blobs(index: BuildIndex) -> None:
    for name in ("a", "b"):
        index.remember_layer(name, a_layer(name))
    index.forget_layers([digest_of("a"), digest_of("x")])
    assert index.layer("a") is None
    assert index.layer("b") == a_layer("b")


def test_of_collected_images_those_used_last_are_remembered(index: BuildIndex, clock: Clock) -> None:
    for number, name in enumerate(["a", "b", "c", "kept"]):
        clock.now = 1000.0 + number
        index.remember_image(an_origin(name), an_image(name))
    for name in ("a", "b", "c"):
        index.forget_image(an_origin(name).key, 2000.0)
    index.forget_recipes(remembered=2)
    assert index.blob(digest_of("a")) is None
    assert all(index.blob(digest_of(name)) for name in ("b", "c", "kept"))


def test_revisions_are_those_of_images_the_last_used_first(index: BuildIndex, clock: Clock) -> None:
    for number, (name, revision) in enumerate([("a", "1"), ("b", "2"), ("c", "1"), ("d", "3")]):
        clock.now = 1000.0 + number
        index.remember_image(an_origin(name, revision=revision), an_image(name))
    assert index.revisions(10) == ["3", "1", "2"]
    assert index.revisions(2) == ["3", "1"]


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
        index.remember_image(GIT, an_image("git"))
        assert index.image(GIT.key) == an_image("git")


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
    with exclusive(tmp_path):
        opener.start()
        opener.join(timeout=0.2)
        assert opener.is_alive()
    opener.join()
    assert (tmp_path / NAME).exists()


OPEN_AND_REMEMBER = """
import sys
from pathlib import Path
from chandlery.builds.sqlite_index import _Tables as BuildIndex

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


def test_that_it_can_not_be_opened_on_a_full_disk_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(StorageError, match="choose another data folder"):
        BuildIndex(tmp_path)
    monkeypatch.setattr(sqlite_index, "is_full", lambda _: True)
    with pytest.raises(StorageFullError):
        BuildIndex(tmp_path)
