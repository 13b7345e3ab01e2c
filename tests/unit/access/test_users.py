import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import bcrypt
import pytest
from structlog.testing import capture_logs

from chandlery.access.users import Users
from chandlery.errors import SettingsError
from tests.support.clock import Clock

# Made by crypt(3) of libxcrypt, with the prefix that `htpasswd -B` writes.
WONDERLAND = "$2y$04$abcdefghijklmnopqrstuujZkTwHUiJ9XdZPwKfcfDo7dMp5DjlTu"
EIGHTY_BS = "$2y$04$abcdefghijklmnopqrstuuUJf9qAIqFFWObw4K4AvdtuO.PaE5J/W"
UMLAUTS = "$2a$04$abcdefghijklmnopqrstuuyx2n0Zzopyr9QuYTMCfOJJOj526QVoC"


def hashed(password: str, cost: int = 4) -> str:
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(cost)).decode()


class Hasher:
    """Counts what is hashed, and with which cost."""

    def __init__(self) -> None:
        self.costs: list[str] = []

    def __call__(self, password: bytes, stored: bytes) -> bool:
        self.costs.append(stored.decode()[4:6])
        return bcrypt.checkpw(password, stored)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "users"
    path.write_text(f"# the users\n\nalice:{WONDERLAND}\nbob:{hashed('builder', 5)}\n")
    return path


def rewrite(file: Path, content: str) -> None:
    """Replace the content, at another time than before however coarse the file system's clock is."""
    before = file.stat().st_mtime_ns
    file.write_text(content)
    os.utime(file, ns=(before + 10**9, before + 10**9))


@pytest.mark.parametrize(
    ("user", "password", "right"),
    [
        ("alice", "wonderland", True),
        ("alice", "Wonderland", False),
        ("alice", "", False),
        ("bob", "builder", True),
        ("bob", "wonderland", False),
        ("carol", "wonderland", False),
        ("", "wonderland", False),
        ("# the users", "", False),
        ("alice", WONDERLAND, False),
    ],
)
async def test_a_user_is_who_has_the_password(file: Path, user: str, password: str, right: bool) -> None:
    users = Users(file)
    assert await users.check(user, password) is right
    assert users.remembers(user, password) is right


async def test_passwords_are_those_of_other_programs(tmp_path: Path) -> None:
    (tmp_path / "users").write_text(f"long:{EIGHTY_BS}\numlaut:{UMLAUTS}\n")
    users = Users(tmp_path / "users")
    # bcrypt reads 72 bytes.
    assert await users.check("long", "b" * 80)
    assert await users.check("long", "b" * 72)
    assert not await users.check("long", "b" * 71)
    assert await users.check("umlaut", "pässwörd")


async def test_a_password_is_hashed_once_in_a_while(file: Path) -> None:
    hasher, clock = Hasher(), Clock(0.0)
    users = Users(file, checkpw=hasher, clock=clock)
    assert all(await asyncio.gather(*(users.check("alice", "wonderland") for _ in range(20))))
    assert all([await users.check("alice", "wonderland") for _ in range(20)])
    # Two that began at the same moment.
    assert len(hasher.costs) <= 2
    clock.now = 301.0
    assert not users.remembers("alice", "wonderland")
    assert await users.check("alice", "wonderland")


async def test_what_is_wrong_is_hashed_each_time_and_costs_the_same_whoever_it_is(file: Path) -> None:
    hasher = Hasher()
    users = Users(file, checkpw=hasher)
    for user in ("bob", "carol", "bob", "carol"):
        assert not await users.check(user, "wrong")
    assert hasher.costs == ["05"] * 4


async def test_a_cheap_hash_tells_no_user_from_others(tmp_path: Path) -> None:
    hasher = Hasher()
    content = f"cheap:{hashed('x', 4)}\nusual:{hashed('y', 6)}\ncostly:{hashed('z', 8)}\n"
    (tmp_path / "users").write_text(content)
    users = Users(tmp_path / "users", checkpw=hasher)
    rounds = {}
    for user in ("cheap", "usual", "costly", "nobody", ""):
        hasher.costs.clear()
        assert not await users.check(user, "wrong")
        rounds[user] = sum(2 ** int(cost) for cost in hasher.costs)
    assert set(rounds.values()) == {2**8}
    # What is right takes no longer than it has to.
    hasher.costs.clear()
    assert await users.check("cheap", "x")
    assert hasher.costs == ["04"]


async def test_the_loop_goes_on_while_a_password_is_hashed(tmp_path: Path) -> None:
    (tmp_path / "users").write_text(f"alice:{hashed('wonderland', 10)}\n")
    check = asyncio.create_task(Users(tmp_path / "users").check("alice", "wonderland"))
    turns = 0
    while not check.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 20


async def test_a_file_that_changes_counts_at_once(file: Path) -> None:
    users = Users(file)
    assert await users.check("alice", "wonderland")
    assert await users.check("bob", "builder")
    before = users.version("alice"), users.version("bob")
    rewrite(file, f"alice:{hashed('looking-glass')}\n")
    assert not users.remembers("alice", "wonderland")
    assert not await users.check("alice", "wonderland")
    assert await users.check("alice", "looking-glass")
    assert not await users.check("bob", "builder")
    assert users.version("alice") not in before
    assert users.version("bob") is None


def remove(file: Path) -> None:
    file.unlink()


def spoil(file: Path) -> None:
    rewrite(file, "alice:wonderland\n")


@pytest.mark.parametrize("change", [remove, spoil])
async def test_while_the_file_can_not_be_read_users_stay(file: Path, change: Callable[[Path], None]) -> None:
    users = Users(file)
    change(file)
    with capture_logs() as events:
        for _ in range(3):
            assert await users.check("alice", "wonderland")
    assert [event["log_level"] for event in events] == ["error"]
    assert "wonderland" not in str(events)
    file.write_text(f"bob:{hashed('builder')}\n")
    assert not await users.check("alice", "wonderland")


@pytest.mark.parametrize(
    "line",
    [
        "alice",
        "alice:",
        f":{WONDERLAND}",
        "alice:secret-password",
        "alice:$apr1$r31.....$HqJZimcKQFAMYayBlzkrA/",
        "alice:{SHA}VBPuJHI7uixaa6LQGWx4s+5GKNE=",
        f"alice:{WONDERLAND}x",
        f"alice:{WONDERLAND.replace('$04$', '$31$')}",
        f"alice:{WONDERLAND.replace('$04$', '$03$')}",
    ],
)
def test_a_line_that_is_none_is_told_by_its_number_alone(tmp_path: Path, line: str) -> None:
    (tmp_path / "users").write_text(f"bob:{WONDERLAND}\n{line}\n")
    with pytest.raises(SettingsError, match=r"line 2 of .*users.*htpasswd -B") as refused:
        Users(tmp_path / "users")
    assert "alice" not in str(refused.value)


def test_every_hash_that_bcrypt_writes_is_taken(tmp_path: Path) -> None:
    lines = [f"user-{number}:{hashed(str(number))}" for number in range(100)]
    (tmp_path / "users").write_text("\n".join(lines))
    assert Users(tmp_path / "users").version("user-99")


def test_a_file_that_is_not_there_or_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("missing", "binary"):
        with pytest.raises(SettingsError, match=f"users_file: .*{name} can't be read"):
            Users(tmp_path / name)


async def test_asking_again_costs_no_time(file: Path) -> None:
    users = Users(file)
    await users.check("alice", "wonderland")
    began = time.process_time()
    for _ in range(1000):
        users.remembers("alice", "wonderland")
    # A thousand hashes of the lowest cost take more than a second.
    assert time.process_time() - began < 0.5
