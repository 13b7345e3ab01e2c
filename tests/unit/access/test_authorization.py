from base64 import b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.access.authorization import (
    MOST_SCOPES,
    BearerToken,
    Password,
    parse_authorization,
    pull_scope,
    pull_scopes,
)
from chandlery.errors import CredentialsError

# RFC 7617, section 2: no control characters, and no colon in the user's name.
PRINTABLE = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters=[*map(chr, range(32)), "\x7f"])
)
USERS = PRINTABLE.filter(lambda text: ":" not in text)
NAMES = st.lists(st.text("abc019", min_size=1, max_size=5), min_size=1, max_size=4).map("/".join)


def basic(user: str, password: str) -> str:
    return "Basic " + b64encode(f"{user}:{password}".encode()).decode()


def test_there_may_be_no_header() -> None:
    assert parse_authorization(None) is None
    assert parse_authorization("") is None


@given(USERS, PRINTABLE, st.sampled_from(["Basic", "basic", "BASIC"]))
def test_a_user_and_a_password_are_read_as_they_were_written(user: str, password: str, scheme: str) -> None:
    header = basic(user, password).replace("Basic", scheme, 1)
    expected = Password(user, password) if user or password else None
    assert parse_authorization(header) == expected


@given(st.from_regex(r"[A-Za-z0-9._~+/-]+=*", fullmatch=True))
def test_a_token_is_read_as_it_was_written(token: str) -> None:
    assert parse_authorization(f"Bearer {token}") == BearerToken(token)
    assert parse_authorization(f"bearer   {token} ") == BearerToken(token)


@pytest.mark.parametrize(
    "header",
    [
        *(
            "Basic",
            "Basic ",
            "Basic !",
            "Basic YWxpY2U=",
            "Basic YWxpY2U6eA",
            "Basic /w==",
            "Basic \xff",
            "Basic OmFcYgA==",
        ),
        *("Bearer", "Bearer ", "Bearer two words", "Bearer ü", "Digest username=alice", "alice:wonderland"),
        *(basic("alice", "a\nb"), basic("alice\0", "x")),
    ],
)
def test_a_header_that_can_not_be_read_is_refused_and_not_repeated(header: str) -> None:
    with pytest.raises(CredentialsError) as refused:
        parse_authorization(header)
    assert not set(header.split()[1:]) & set(str(refused.value).split())


@given(st.text(st.characters(max_codepoint=255)))
def test_any_header_is_read_or_refused(header: str) -> None:
    try:
        credentials = parse_authorization(header)
    except CredentialsError:
        return
    assert credentials is None or isinstance(credentials, Password | BearerToken)


@given(PRINTABLE.filter(lambda text: len(text) > 3))
def test_what_is_secret_does_not_show(secret: str) -> None:
    assert repr(Password("alice", secret)) == "Password(user='alice')"
    assert repr(BearerToken(secret)) == "BearerToken()"


# Scopes


@given(st.lists(NAMES, max_size=MOST_SCOPES, unique=True), st.booleans())
def test_scopes_name_repositories_in_one_parameter_or_in_many(names: list[str], joined: bool) -> None:
    scopes = [pull_scope(name) for name in names]
    assert pull_scopes([" ".join(scopes)] if joined else scopes) == tuple(names)


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        ("repository:shell/git:pull", ("shell/git",)),
        ("repository:git:pull,push repository:jq:push,pull", ("git", "jq")),
        ("repository:git:pull repository:git:pull", ("git",)),
        # "hostname[:port]" may stand before a name.
        ("repository:example.com:5000/git:pull", ("example.com:5000/git",)),
        ("repository:git:push", ()),
        ("repository:git:*", ()),
        ("repository:git:", ()),
        ("repository:git", ()),
        ("repository::pull", ()),
        ("registry:catalog:*", ()),
        ("", ()),
    ],
)
def test_only_scopes_to_pull_from_repositories_count(scope: str, names: tuple[str, ...]) -> None:
    assert pull_scopes([scope]) == names


@given(st.lists(st.text(), max_size=5))
def test_any_scopes_give_names_that_were_in_them(scopes: list[str]) -> None:
    names = pull_scopes(scopes)
    assert all(name and name in " ".join(scopes) for name in names)


def test_a_token_is_for_a_limited_number_of_repositories() -> None:
    assert len(pull_scopes([pull_scope(f"package-{number}") for number in range(1000)])) == MOST_SCOPES
