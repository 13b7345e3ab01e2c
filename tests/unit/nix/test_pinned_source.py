import pytest

from chandlery.errors import RevisionGoneError
from chandlery.nix.pinned_source import PinnedSource


@pytest.mark.parametrize(
    ("kind", "location", "public"),
    [
        ("debian", "bookworm", "debian!bookworm"),
        ("nixpkgs", "nixpkgs", "https://github.com/NixOS/nixpkgs"),
        ("path", "/srv/secret/packages", "path!packages"),
        ("git", "https://git.example.com/ours", "https://git.example.com/ours"),
        ("git", "ssh://git@git.example.com/ours", "ssh://git@git.example.com/ours"),
        ("git", "git@git.example.com:ours", "git!git@git.example.com:ours"),
        ("git", "/srv/secret/ours.git", "git!ours.git"),
        ("git", "file:///srv/secret/ours", "git!ours"),
        ("flake", "github:NixOS/nixpkgs", "flake!github:NixOS/nixpkgs"),
        ("flake", "git+https://git.example.com/ours?dir=a", "git+https://git.example.com/ours?dir=a"),
        ("flake", "path:/srv/secret/flake?dir=a", "flake!flake"),
        ("flake", "git+file:///srv/secret/flake", "flake!flake"),
    ],
)
def test_an_image_does_not_tell_where_a_folder_is(kind: str, location: str, public: str) -> None:
    assert PinnedSource(kind, location, "1" * 40).public_location == public


def test_what_is_gone_can_not_be_evaluated() -> None:
    with pytest.raises(RevisionGoneError, match=r"path!/srv/packages .* 1111111111111111 is not kept"):
        PinnedSource("path", "/srv/packages", "1" * 40, nix=None).to_nix()


def test_what_is_not_the_package_set_is_no_part_of_its_key() -> None:
    pin = PinnedSource(
        "git", "https://example.com", "1" * 40, "2" * 64, {"tree": "/a"}, stale="the server is dead"
    )
    assert pin.key_parts == ("git", "https://example.com", "1" * 40, "2" * 64)
    assert pin == PinnedSource("git", "https://example.com", "1" * 40, "2" * 64)
