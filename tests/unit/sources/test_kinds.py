from pathlib import Path

import pytest

from chandlery.errors import InvalidSourceError, SourceUnavailableError
from chandlery.image.name import LATEST
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.documents import Platform
from chandlery.sources.debian.index import DebianMirrors
from chandlery.sources.kinds import parse

AMD64 = Platform("linux", "amd64")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "write debian!<suite>, "),
        ("bookworm", "write debian!<suite>, "),
        ("debian!", "write debian!<suite>, "),
        ("!bookworm", "'' is not a kind of source: write "),
        ("nix!bookworm", "'nix' is not a kind of source: write debian!<suite>, "),
        ("Debian!bookworm", "'Debian' is not a kind of source"),
        ("debian!Bookworm", "'Bookworm' is not the name of a Debian suite"),
        ("debian!../bookworm", "'../bookworm' is not the name of a Debian suite"),
        ("debian!bookworm main", "'bookworm main' is not the name of a Debian suite"),
        ("debian!bookworm\n", "is not the name of a Debian suite"),
        ("path!/nonexistent/folder", "there is no folder /nonexistent/folder"),
    ],
)
def test_what_names_no_source_is_told_with_what_would(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(InvalidSourceError) as caught:
        parse(text, tmp_path, DebianMirrors())

    assert reason in str(caught.value)
    assert caught.value.text == text


def test_a_source_keeps_the_text_that_it_was_made_of(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for text in ("debian!bookworm", "debian!bookworm-backports", f"path!{tmp_path}/set"):
        assert parse(text, tmp_path / "data", DebianMirrors()).text == text


@pytest.mark.parametrize(
    ("text", "tag", "chosen"),
    [
        ("debian!bookworm", "latest", ""),
        ("debian!bookworm", "bookworm", ""),
        ("debian!bookworm", "sid", "debian!sid"),
        ("git!https://host/set!main", "latest", ""),
        ("git!https://host/set!main", "main", ""),
        ("git!https://host/set!feature/x", "feature-x", ""),
        ("git!https://host/set!main", "feature-x", "git!https://host/set!feature-x"),
        ("git!https://user:secret@host/set!main", "v1", "git!https://host/set!v1"),
        ("git!https://host/set", "main", "git!https://host/set!main"),
        ("nixpkgs!nixos-unstable", "latest", ""),
        ("nixpkgs!nixos-unstable", "nixos-unstable", ""),
        ("nixpkgs!nixos-unstable", "nixos-25.05", "nixpkgs!nixos-25.05"),
        ("nixpkgs!nixos-unstable", "0" * 16, f"nixpkgs!{'0' * 16}"),
        ("path!/tmp", "0" * 16, ""),
    ],
)
def test_a_tag_may_choose_what_rules_call_another_source(
    tmp_path: Path, text: str, tag: str, chosen: str
) -> None:
    if text.startswith("path!"):
        (tmp_path / "set").mkdir()
        text = f"path!{tmp_path}/set"
    assert parse(text, tmp_path / "data", DebianMirrors()).chosen_by(tag) == chosen


def test_the_tag_of_a_debian_state_is_of_the_suite_that_it_is_a_state_of(tmp_path: Path) -> None:
    source = parse("debian!bookworm", tmp_path, DebianMirrors())
    tag = "0" * 16
    assert source.chosen_by(tag, PinnedSource("debian", "bookworm", tag)) == ""
    assert source.chosen_by(tag, PinnedSource("debian", "sid", tag)) == "debian!sid"


def test_a_folder_that_has_the_data_folder_in_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSourceError, match=r"the data folder .* is in it"):
        parse(f"path!{tmp_path}", tmp_path / "data", DebianMirrors())


def test_a_link_does_not_hide_that_the_data_folder_is_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "link").symlink_to("set")
    for folder, data in (("link", "set"), ("set", "link")):
        with pytest.raises(InvalidSourceError, match=r"the data folder .* is in it"):
            parse(f"path!{tmp_path / folder}", tmp_path / data / "data", DebianMirrors())


async def test_a_folder_without_a_package_set_is_told(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    source = parse(f"path!{tmp_path}/set", tmp_path / "data", DebianMirrors())

    with pytest.raises(
        SourceUnavailableError, match=r"path!.*/set can't be reached: there is no default\.nix"
    ):
        await source.pin(LATEST, AMD64)


async def test_a_folder_may_be_written_from_here_or_from_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/default.nix").write_text("{ }")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    for text in ("path!set", "path!./set", "path!~/set"):
        source = parse(text, tmp_path / "data", DebianMirrors())
        assert (await source.pin(LATEST, AMD64)).location == str(tmp_path / "set")


def test_where_a_pins_data_is_is_no_part_of_its_identity() -> None:
    here = PinnedSource("debian", "bookworm", "ab" * 32, nix={"lock": "/here"})
    there = PinnedSource("debian", "bookworm", "ab" * 32, nix={"lock": "/there"})

    assert here == there
    assert hash(here) == hash(there)
    assert here.tag == "ab" * 8
    assert here.to_nix() == {"kind": "debian", "location": "bookworm", "lock": "/here"}
