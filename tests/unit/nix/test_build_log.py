from collections.abc import Sequence
from pathlib import Path

import pytest

from chandlery.errors import StorageError
from chandlery.nix.build_log import BuildLog
from chandlery.telemetry.build_timings import Work


async def logged(file: Path, lines: Sequence[bytes], first: int = 100, last: int = 50) -> BuildLog:
    async with BuildLog(file, first=first, last=last) as log:
        for line in lines:
            log.add(line)
            await log.flush()
    return log


def line(number: int) -> bytes:
    return b"line %4d\n" % number  # 10 bytes


async def test_a_short_log_is_told_whole_and_as_it_comes(tmp_path: Path) -> None:
    file = tmp_path / "log"
    async with BuildLog(file) as log:
        for number in range(3):
            log.add(line(number))
            await log.flush()
            assert file.read_bytes() == b"".join(map(line, range(number + 1)))
    assert file.read_bytes() == b"".join(map(line, range(3)))


async def test_of_a_long_log_the_beginning_and_the_end_are_kept_and_what_is_missing_is_told(
    tmp_path: Path,
) -> None:
    file = tmp_path / "log"
    await logged(file, list(map(line, range(1000))))
    first, note, rest = file.read_bytes().partition(b"[chandlery: this log is longer")
    assert first == b"".join(map(line, range(10)))
    assert note
    left_out, *last = rest.splitlines(keepends=True)[1:]
    assert left_out == b"[chandlery: %d bytes are left out here]\n" % (10 * (1000 - 10 - 5))
    assert last == list(map(line, range(995, 1000)))


async def test_a_log_that_is_a_little_too_long_lacks_nothing(tmp_path: Path) -> None:
    file = tmp_path / "log"
    await logged(file, list(map(line, range(13))))
    lines = file.read_bytes().splitlines(keepends=True)
    assert [each for each in lines if not each.startswith(b"[chandlery")] == list(map(line, range(13)))
    assert b"left out" not in file.read_bytes()


async def test_a_log_that_is_full_grows_no_more_until_its_end(tmp_path: Path) -> None:
    file = tmp_path / "log"
    async with BuildLog(file, first=100, last=50) as log:
        sizes = set()
        for number in range(1000):
            log.add(line(number))
            await log.flush()
            if number > 10:
                sizes.add(file.stat().st_size)
    assert len(sizes) == 1


async def test_what_a_build_says_later_counts_with_what_it_has_said(tmp_path: Path) -> None:
    file = tmp_path / "log"
    for _ in range(2):
        await logged(file, list(map(line, range(1000))))
    assert file.stat().st_size < 2 * (100 + 50 + 300)


async def test_the_last_words_are_bounded_and_long_lines_are_cut(tmp_path: Path) -> None:
    log = await logged(tmp_path / "log", list(map(line, range(1000))))
    assert log.last_words() == b"".join(map(line, range(995, 1000))).decode()
    log = await logged(tmp_path / "long", [b"x" * 100_000 + b"\n"])
    assert log.last_words() == "x" * 8192 + "\n"


async def test_a_log_that_can_not_be_opened_is_told_and_one_without_space_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError):
        async with BuildLog(tmp_path / "missing" / "log"):
            pass
    async with BuildLog(Path("/dev/full")) as log:
        log.add(b"one\n")
        await log.flush()
    assert log.last_words() == "one\n"


async def test_what_nix_says_is_told_as_it_comes_and_its_works_are_noted(tmp_path: Path) -> None:
    file, works = tmp_path / "log", list[Work]()
    said = (
        b'@nix {"action":"start","id":1,"level":3,"text":"building git","type":105,"fields":[]}\n'
        b'@nix {"action":"result","fields":["compiling \\"main.c\\""],"id":1,"type":101}\n'
        b'@nix {"action":"stop","id":1}\n'
        b"the end"
    )
    async with BuildLog(file, lambda work, *_: works.append(work)) as log:
        await log.feed(said[:100])
        assert file.read_bytes() == b"building git...\n"
        await log.feed(said[100:])
    assert file.read_text() == log.last_words() == 'building git...\ncompiling "main.c"\nthe end\n'
    assert works == [Work.BUILD]


async def test_what_hears_the_lines_can_end_the_log_while_nix_speaks_and_not_when_it_has_ended(
    tmp_path: Path,
) -> None:
    def hear(line: bytes) -> None:
        if b"too much" in line:
            raise StorageError("it is too much")

    with pytest.raises(StorageError, match="too much"):
        async with BuildLog(tmp_path / "log", on_line=hear) as log:
            await log.feed(b"a line\nit is too much\n")
    async with BuildLog(tmp_path / "log", on_line=hear) as log:
        await log.feed(b"at last too much")
    assert (tmp_path / "log").read_bytes() == b"a line\nit is too much\nat last too much\n"
