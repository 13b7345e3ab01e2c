import json
import stat
from base64 import urlsafe_b64decode, urlsafe_b64encode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.access.tokens import Grant, Tokens, load_key
from chandlery.errors import CredentialsError, SettingsError
from tests.support.clock import Clock

KEY = b"k" * 32
GRANTS = st.builds(Grant, st.text(), st.text(), st.frozensets(st.text(), max_size=5))
ALICE = Grant("alice", "1", frozenset({"git"}))


@given(GRANTS)
def test_a_token_says_what_it_was_made_of(grant: Grant) -> None:
    tokens = Tokens(KEY, 60)
    assert tokens.read(tokens.issue(grant)) == grant


def test_a_token_is_what_distribution_describes() -> None:
    header, claims, _ = (
        part + "==" for part in Tokens(KEY, 300, clock=Clock(1_000_000.5)).issue(ALICE).split(".")
    )
    assert json.loads(urlsafe_b64decode(header)) == {"alg": "HS256", "typ": "JWT"}
    assert json.loads(urlsafe_b64decode(claims)) == {
        "iss": "chandlery",
        "aud": "chandlery",
        "sub": "alice",
        "iat": 1_000_000,
        "exp": 1_000_300,
        "password_version": "1",
        "access": [{"type": "repository", "name": "git", "actions": ["pull"]}],
    }


def test_a_token_ends() -> None:
    clock = Clock(1_000_000.5)
    tokens = Tokens(KEY, 60, clock=clock)
    token = tokens.issue(ALICE)
    clock.now += 59
    assert tokens.read(token) == ALICE
    clock.now += 1
    with pytest.raises(CredentialsError, match="too old") as refused:
        tokens.read(token)
    assert refused.value.code == "invalid_token"


def forged(**claims: object) -> str:
    whole = {"iss": "chandlery", "aud": "chandlery", "sub": "alice", "exp": 4e9, "access": []}
    return jwt.encode({**whole, "password_version": "1", **claims}, KEY, "HS256")


def unsigned() -> str:
    _, claims, _ = Tokens(KEY, 60).issue(ALICE).split(".")
    none = urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').decode().rstrip("=")
    return f"{none}.{claims}."


@pytest.mark.parametrize(
    "token",
    [
        "",
        "nonsense",
        "a.b.c",
        unsigned(),
        Tokens(b"other" * 7, 60).issue(ALICE),
        Tokens(KEY, 60).issue(ALICE)[:-2],
        forged(aud="another service"),
        forged(iss="another service"),
        forged(sub=7),
    ],
)
def test_a_token_that_is_not_ours_is_refused_and_not_repeated(token: str) -> None:
    with pytest.raises(CredentialsError) as refused:
        Tokens(KEY, 60).read(token)
    assert refused.value.code == "invalid_token"
    assert not token or token not in str(refused.value)
    assert refused.value.__cause__ is None


# The key


def test_a_key_is_made_once_and_only_for_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "token-key"
    key = load_key(file)
    assert len(key) == 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert load_key(file) == key
    assert list(tmp_path.iterdir()) == [file]


def test_processes_that_start_at_once_have_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        keys = set(threads.map(lambda _: load_key(tmp_path / "token-key"), range(50)))
    assert len(keys) == 1


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(KEY)
    file.chmod(0o640)
    with pytest.raises(SettingsError, match=r"chmod 600 .*key"):
        load_key(file)


def test_a_short_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"guessable")
    file.chmod(0o600)
    with pytest.raises(SettingsError, match="32 random bytes") as refused:
        load_key(file)
    assert "guessable" not in str(refused.value)


def test_a_key_that_can_not_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="can't be used"):
        load_key(tmp_path / "missing" / "key")
