import asyncio
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from chandlery.errors import ReferenceNotFoundError, SourceUnavailableError
from chandlery.image.name import LATEST
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.documents import Platform
from chandlery.sources.arguments import SetArguments
from chandlery.sources.folder_content import FolderContent
from chandlery.sources.path import PathSource

HOST = Platform.of_host()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "default.nix").write_text("1")
    (folder / "link").symlink_to("default.nix")
    (folder / ".git").mkdir()
    return folder


def a_source(
    folder: Path, config: Mapping[str, Any] | None = None, overlays: tuple[Path, ...] = ()
) -> PathSource:
    arguments = SetArguments(folder.parent / "data/overlays", config, overlays)
    return PathSource(folder, folder.parent / "data/path", arguments)


def tree(pinned: PinnedSource) -> Path:
    return Path(pinned.to_nix()["tree"])


async def test_what_is_pinned_is_a_copy_of_what_the_folder_held(folder: Path, tmp_path: Path) -> None:
    pinned = await a_source(folder).pin(LATEST, HOST)
    (folder / "default.nix").write_text("2")

    assert pinned == PinnedSource("path", str(folder), pinned.revision)
    assert pinned.to_nix() == {
        "kind": "path",
        "location": str(folder),
        "tree": f"{tmp_path}/data/path/{pinned.revision}/source",
        "config": {},
        "overlays": [],
    }
    assert (tree(pinned) / "default.nix").read_text() == "1"
    assert sorted(os.listdir(tree(pinned))) == ["default.nix", "link"]
    assert FolderContent(tree(pinned)).snapshot().revision == pinned.revision


async def test_a_change_is_seen_by_the_next_pull(folder: Path) -> None:
    source = a_source(folder)
    for number in range(20):
        (folder / "default.nix").write_text(str(number))
        pinned = await source.pin(LATEST, HOST)
        assert (tree(pinned) / "default.nix").read_text() == str(number)


async def test_the_tag_of_an_older_revision_works_while_its_copy_is_kept(folder: Path) -> None:
    source = a_source(folder)
    first = await source.pin(LATEST, HOST)
    (folder / "default.nix").write_text("2")
    second = await source.pin(LATEST, HOST)

    for each in (source, a_source(folder)):
        assert await each.pin(first.tag, HOST) == first
        assert await each.pin(first.revision, HOST) == first
        assert await each.at(first.revision, HOST) == first
        assert await each.pin(second.tag, HOST) == second
        assert await each.at("0" * 64, HOST) is None
        assert await each.at("../../default", HOST) is None


async def test_a_tag_of_what_the_folder_holds_is_found_before_anybody_asked_for_latest(folder: Path) -> None:
    revision = FolderContent(folder).snapshot().revision

    assert (await a_source(folder).pin(revision[:16], HOST)).revision == revision


@pytest.mark.parametrize("reference", ["v1", "0" * 16, "0" * 64, "..", "source", "making"])
async def test_another_tag_is_not_found(folder: Path, reference: str) -> None:
    source = a_source(folder)
    pinned = await source.pin(LATEST, HOST)

    with pytest.raises(
        ReferenceNotFoundError, match=f"'latest', and '{pinned.tag}' for what the folder holds"
    ):
        await source.pin(reference, HOST)


async def test_many_at_once_look_at_the_folder_together(folder: Path) -> None:
    source = a_source(folder)

    assert len(set(await asyncio.gather(*(source.pin(LATEST, HOST) for _ in range(100))))) == 1


# What can't be read


async def test_a_folder_that_is_gone_is_told(folder: Path) -> None:
    source = a_source(folder)
    folder.rename(folder.with_name("moved"))

    with pytest.raises(
        SourceUnavailableError, match=f"path!{folder} can't be reached: {folder}: No such file"
    ):
        await source.pin(LATEST, HOST)


async def test_a_folder_that_is_gone_for_now_is_served_as_it_was_also_by_the_next_server(
    folder: Path,
) -> None:
    source = a_source(folder)
    pinned = await source.pin(LATEST, HOST)
    folder.rename(folder.with_name("moved"))

    for each in (source, a_source(folder)):
        with capture_logs() as logs:
            stale = await each.pin(LATEST, HOST)
            await each.pin(LATEST, HOST)
        assert stale == pinned
        assert f"{folder}: No such file or directory" in stale.stale
        assert stale.stale.startswith("as of 20")
        assert [log["log_level"] for log in logs] == ["warning"]
        assert tree(stale).is_dir()

    folder.with_name("moved").rename(folder)
    assert not (await a_source(folder).pin(LATEST, HOST)).stale


class Restless(threading.Thread):
    """Somebody who changes a folder all the time."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._over = threading.Event()

    def run(self) -> None:
        number = 0
        while not self._over.is_set():
            number += 1
            for each in ("a", "b", "c"):
                (self._folder / each).write_text(f"{number}" * 1000)

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


async def test_of_a_folder_that_changes_all_the_time_only_what_is_whole_is_pinned(folder: Path) -> None:
    for number in range(300):
        (folder / f"file-{number}").write_text(str(number))
    source = a_source(folder)
    before = await source.pin(LATEST, HOST)
    with Restless(folder):
        for _ in range(5):
            pinned = await source.pin(LATEST, HOST)
            assert FolderContent(tree(pinned)).snapshot().revision == pinned.revision
            if pinned.stale:
                assert f"{folder} changed each time that it was copied" in pinned.stale
    assert not (await a_source(folder).pin(LATEST, HOST)).stale
    assert await source.at(before.revision, HOST) == before


async def test_fifos_and_sockets_hold_nothing_up(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    async with asyncio.timeout(10):
        pinned = await a_source(folder).pin(LATEST, HOST)

    assert "fifo" not in os.listdir(tree(pinned))


async def test_a_refresh_copies_before_somebody_asks(folder: Path) -> None:
    source = a_source(folder)
    await source.refresh(0)
    folder.rename(folder.with_name("moved"))

    assert (await source.pin(LATEST, HOST)).stale


# Config and overlays


async def test_config_and_overlays_are_a_variant(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "overlay.nix").write_text("final: prev: { }")
    (tmp_path / "overlay").mkdir()
    (tmp_path / "overlay/default.nix").write_text("final: prev: { a = 1; }")
    overlays = (tmp_path / "overlay.nix", tmp_path / "overlay")
    plain = await a_source(folder).pin(LATEST, HOST)
    unfree = await a_source(folder, {"allowUnfree": True}).pin(LATEST, HOST)
    overlaid = await a_source(folder, {"allowUnfree": True}, overlays).pin(LATEST, HOST)
    reversed_order = await a_source(folder, {"allowUnfree": True}, overlays[::-1]).pin(LATEST, HOST)

    assert plain.variant == ""
    assert len({each.variant for each in (plain, unfree, overlaid, reversed_order)}) == 4
    assert len({each.revision for each in (plain, unfree, overlaid, reversed_order)}) == 1
    assert overlaid.to_nix()["config"] == {"allowUnfree": True}
    first, second = map(Path, overlaid.to_nix()["overlays"])
    assert first.read_text() == "final: prev: { }"
    assert (second / "default.nix").read_text() == "final: prev: { a = 1; }"
    assert await a_source(folder, {"allowUnfree": True}, overlays).pin(LATEST, HOST) == overlaid


async def test_an_overlay_that_changes_is_another_variant_and_what_was_pinned_stays(
    folder: Path, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay.nix"
    overlay.write_text("1")
    source = a_source(folder, overlays=(overlay,))
    first = await source.pin(LATEST, HOST)
    overlay.write_text("2")
    second = await source.pin(LATEST, HOST)

    assert first.variant != second.variant
    assert Path(first.to_nix()["overlays"][0]).read_text() == "1"
    assert Path(second.to_nix()["overlays"][0]).read_text() == "2"

    overlay.write_text("1")
    assert await source.pin(LATEST, HOST) == first


async def test_an_overlay_that_cannot_be_read_is_told_or_served_as_it_was(
    folder: Path, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay.nix"
    with pytest.raises(SourceUnavailableError, match=r"overlay .*/overlay\.nix can't be reached: .*No such"):
        await a_source(folder, overlays=(overlay,)).pin(LATEST, HOST)
    overlay.write_text("1")
    pinned = await a_source(folder, overlays=(overlay,)).pin(LATEST, HOST)
    overlay.unlink()

    stale = await a_source(folder, overlays=(overlay,)).pin(LATEST, HOST)

    assert stale == pinned
    assert "overlay.nix: No such file" in stale.stale


async def test_config_that_json_has_no_word_for_becomes_text(folder: Path) -> None:
    import datetime

    pinned = await a_source(folder, {"since": datetime.date(2024, 1, 2)}).pin(LATEST, HOST)

    assert pinned.to_nix()["config"] == {"since": "2024-01-02"}
