import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.sources.git.address import GitAddress


@pytest.mark.parametrize(
    "text",
    [
        "https://example.com/team/set.git",
        "http://127.0.0.1:8000/set",
        "https://[::1]:8443/set",
        "ssh://git@example.com/set.git",
        "ssh://example.com:2222/~user/set",
        "git@example.com:team/set.git",
        "example.com:set",
        "git://example.com/set",
        "file:///srv/set.git",
        "/srv/set.git",
    ],
)
def test_each_form_of_git_is_taken_as_it_is(text: str) -> None:
    assert GitAddress.parse(text) == GitAddress(text, GitAddress.parse(text).place)


def test_credentials_stand_beside_an_address_and_are_not_shown() -> None:
    address = GitAddress.parse("https://user:p%40ss@example.com:8443/set.git")

    assert address.location == "https://example.com:8443/set.git"
    assert address.place == "https://example.com:8443"
    assert (address.user, address.password) == ("user", "p@ss")
    assert "p@ss" not in repr(address)
    assert GitAddress.parse("https://token@example.com/set").location == "https://example.com/set"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "set",
        "./set",
        "../set",
        "ext::sh -c 'touch /tmp/owned'",
        "ext::sh",
        "fd::17",
        "https::https://example.com/set",
        "ftp://example.com/set",
        "rsync://example.com/set",
        "file://host/set",
        "https://example.com",
        "https://",
        "ssh://-oProxyCommand=touch/set",
        "ssh://-o@example.com/set",
        "ssh://git:secret@example.com/set",
        "-oProxyCommand=touch:set",
        "git@-oProxyCommand=touch:set",
        "-u@example.com:set",
        "git@example.com:-set",
        "--upload-pack=touch",
        "https://example.com/a b",
        "https://example.com/a\nb",
    ],
)
def test_what_runs_programs_or_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"git takes https|no blanks|no password"):
        GitAddress.parse(text)


@given(st.text("abc:/@-.!%[]~ \n", max_size=20))
def test_whatever_is_taken_is_no_option_and_no_transport_helper(text: str) -> None:
    try:
        address = GitAddress.parse(text)
    except ValueError:
        return
    assert not address.location.startswith("-")
    assert "::" not in address.location.partition("/")[0].replace("[::", "")
    assert not any(each in address.location for each in " \n")
