import json
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from chandlery.sources.pin_file import PinFile
from tests.support.pin_store_contract import MOST_PINS, MOST_REVISIONS, NOON, Opened, PinStoreContract, pin


class TestPinFile(PinStoreContract):
    @pytest.fixture
    def opened(self, tmp_path: Path) -> Opened:
        file = tmp_path / "sources" / "pins.json"
        return lambda: PinFile(file, most_pins=MOST_PINS, most_revisions=MOST_REVISIONS)


async def test_the_file_is_as_it_always_was(tmp_path: Path) -> None:
    """Data folders have such files."""
    store = PinFile(tmp_path / "pins.json")
    await store.put("main", pin(reference="r"))
    assert json.loads((tmp_path / "pins.json").read_bytes()) == {
        "pins": {
            "main": {"revision": "a" * 40, "resolved": NOON, "used": NOON, "details": {"reference": "r"}},
        },
        "revisions": {"a" * 40: {"reference": "r"}},
    }
    (tmp_path / "pins.json").write_text('{"pins": {"old": {"revision": "b", "resolved": 1, "used": 2}}}')
    assert await store.pin("old", latest=True) == await PinFile(tmp_path / "pins.json").pin("old")


async def test_a_pin_that_is_hardly_younger_is_not_written_again(tmp_path: Path) -> None:
    store, file = PinFile(tmp_path / "pins.json"), tmp_path / "pins.json"
    await store.put("main", pin())
    before = file.stat().st_ino
    other = PinFile(file)
    assert await other.pin("main") == pin()
    for each in (store, other):
        await each.put("main", pin(resolved=NOON + 59))
    assert file.stat().st_ino == before
    # With another change it is.
    await store.put("other", pin("b"))
    assert await PinFile(file).pin("main") == pin(resolved=NOON + 59)


async def test_what_another_process_writes_is_seen_a_second_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("chandlery.sources.pin_file.time.monotonic", lambda: now)
    store, other = PinFile(tmp_path / "pins.json"), PinFile(tmp_path / "pins.json")
    await store.put("main", pin())
    assert await store.pin("main") == pin()
    await other.put("main", pin("b"))
    assert await store.pin("main") == pin()
    now += 1
    assert await store.pin("main") == pin("b")


async def test_what_can_not_be_written_is_known_here(tmp_path: Path) -> None:
    (tmp_path / "no-folder").touch()
    store = PinFile(tmp_path / "no-folder" / "pins.json")
    with capture_logs() as logs:
        await store.put("main", pin())
        await store.remember("b" * 40, {})
    assert await store.pin("main") == pin()
    assert [*await store.revisions("")] == ["a" * 40, "b" * 40]
    assert [each["event"] for each in logs] == ["pins can't be kept"] * 2
    await store.remove("main")
    assert await store.pin("main") is None
