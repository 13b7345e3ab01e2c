from dataclasses import fields

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.image.profile import SHIPPED, Account, Profile

texts = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=3)
lists = st.lists(texts, max_size=3).map(tuple)
attribute_paths = st.lists(st.sampled_from(["a", "ab", "a.b"]), max_size=3).map(tuple)
tables = st.dictionaries(st.from_regex(r"[A-Z_]{1,3}", fullmatch=True), texts, max_size=3)
users = st.sampled_from(["", "root", "nobody", "nonroot", "7", "7:8"])
ports = st.lists(st.sampled_from(["80", "53/udp", "8080/tcp"]), max_size=2, unique=True).map(tuple)
profiles = st.builds(
    Profile, attribute_paths, users, lists, lists, tables, st.sampled_from(["", "/", "/app"]), ports, tables
)


@given(profiles, profiles)
def test_different_profiles_have_different_keys(one: Profile, other: Profile) -> None:
    assert (one.key_parts() == other.key_parts()) == (one == other)


@given(profiles)
def test_a_profile_comes_back_from_json(profile: Profile) -> None:
    assert msgspec.json.decode(msgspec.json.encode(profile), type=Profile) == profile


@given(profiles)
def test_over_nothing_and_under_nothing_a_profile_stays_as_it_is(profile: Profile) -> None:
    once = profile.over(Profile())
    assert once == Profile().over(profile)
    assert once.over(once) == once


def test_of_two_profiles_lists_are_joined_and_the_upper_ones_values_count() -> None:
    lower = Profile(("a", "b"), "7", ("x",), ("y",), {"A": "1", "B": "1"}, "/a", ("80",), {"l": "1"})
    upper = Profile(("b", "c"), "8", (), ("z",), {"B": "2"}, "", ("81",), {"m": "2"})
    assert upper.over(lower) == Profile(
        ("a", "b", "c"),
        "8",
        ("x",),
        ("z",),
        {"A": "1", "B": "2"},
        "/a",
        ("80", "81"),
        {"l": "1", "m": "2"},
    )


@pytest.mark.parametrize(
    ("user", "numbers", "account"),
    [
        ("", "", None),
        ("root", "0:0", None),
        ("0", "0:0", None),
        ("nobody", "65534:65534", None),
        ("nonroot", "65532:65532", Account("nonroot", 65532, 65532)),
        ("65532", "65532:65532", Account("nonroot", 65532, 65532)),
        ("1000", "1000:1000", Account("user", 1000, 1000)),
        ("1000:100", "1000:100", Account("user", 1000, 100)),
    ],
)
def test_a_user_is_numbers_and_has_an_account(user: str, numbers: str, account: Account | None) -> None:
    profile = Profile(user=user)
    assert (profile.user_and_group, profile.account) == (numbers, account)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"user": "alice"}, "user 'alice': write root, nobody, nonroot, UID or UID:GID"),
        ({"user": "1:2:3"}, "user '1:2:3'"),
        ({"user": "-1"}, "user '-1'"),
        ({"user": "0\n"}, "user"),
        ({"working_directory": "app"}, "working_directory 'app': it begins with /"),
        ({"exposed_ports": ("http",)}, "exposed_ports: 'http' is no port"),
        ({"exposed_ports": ("0",)}, "exposed_ports: '0' is no port"),
        ({"exposed_ports": ("65536/tcp",)}, "exposed_ports: '65536/tcp' is no port"),
        ({"entrypoint": ("a\0b",)}, "no text may have a zero byte"),
        ({"environment": {"A": "\0"}}, "no text may have a zero byte"),
        ({"packages": ("a/b",)}, "name attribute paths"),
        ({"packages": ("",)}, "name attribute paths"),
        ({"labels": {"": "x"}}, "labels: one has no name"),
        ({"environment": {"A=B": "c"}}, "environment: 'A=B' is no name of a variable"),
    ],
)
def test_what_no_image_can_have_is_refused(arguments: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason.replace("(", ".")):
        Profile(**arguments)  # type: ignore[arg-type]


def test_nothing_of_a_profile_is_left_out_of_its_key() -> None:
    assert [part for part in Profile().key_parts() if part and not part.isdigit()] == [
        each.name for each in fields(Profile)
    ]


def test_the_profiles_that_ship() -> None:
    assert SHIPPED["nonroot"].account == Account("nonroot", 65532, 65532)
    assert SHIPPED["nonroot"].working_directory == "/home/nonroot"
    assert SHIPPED["shell"].command == ("/bin/bash",)
    assert {"bashInteractive", "coreutils"} <= set(SHIPPED["shell"].packages)
