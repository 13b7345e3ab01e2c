from pathlib import Path

import pytest

from chandlery.nix import stores as module
from chandlery.nix.nix import Nix, NixLimits
from chandlery.nix.pinned_source import PinnedSource, trust_domain
from chandlery.nix.stores import NixStores, store_folder, store_folders

LIMITS = NixLimits()


def pin(kind: str, location: str, revision: str = "1") -> PinnedSource:
    return PinnedSource(kind, location, revision * 40)


def made(folder: Path) -> Path:
    (folder / "nix" / "store").mkdir(parents=True)
    return folder


def test_a_source_has_the_same_store_at_every_revision() -> None:
    stores = NixStores(Path("/data"), LIMITS)
    assert stores.of(pin("git", "https://a.example/x", "1")) is stores.of(
        pin("git", "https://a.example/x", "2")
    )


def test_sources_that_others_can_change_have_stores_of_their_own() -> None:
    stores = NixStores(Path("/data"), LIMITS)
    pins = [pin("git", "https://a.example/x"), pin("git", "https://a.example/y"), pin("path", "/srv/x")]
    roots = [stores.of(each).store_root for each in [*pins, pin("debian", "bookworm")]]
    assert len(set(roots)) == 4


def test_all_suites_of_debian_share_the_store_that_has_always_been_there() -> None:
    stores = NixStores(Path("/data"), LIMITS)
    assert stores.of(pin("debian", "bookworm")) is stores.of(pin("debian", "trixie")) is stores.own
    assert stores.own.store_root == Path("/data/nix/nix/store")


def test_the_machines_store_is_that_of_every_source() -> None:
    machines = Nix(None, LIMITS)
    stores = NixStores.of_one(machines)
    assert stores.own is stores.of(pin("path", "/srv/x")) is machines
    assert list(stores.existing()) == [machines]


def test_only_stores_that_are_there_are_told(tmp_path: Path) -> None:
    stores = NixStores(tmp_path, LIMITS)
    assert list(stores.existing()) == []
    gone = made(tmp_path / "nix-stores" / "git-0123456789abcdef")
    own = made(tmp_path / "nix")
    (tmp_path / "nix-stores" / "git-being-made").mkdir()
    assert store_folders(tmp_path) == [own, gone]
    assert [each.store_root for each in stores.existing()] == [own / "nix/store", gone / "nix/store"]
    assert stores.existing()[0] is stores.own


def test_a_domain_that_is_no_text_of_unicode_has_a_folder() -> None:
    assert store_folder(Path("/data"), trust_domain("path", "/srv/\udcff")).name.startswith("path-")


@pytest.mark.parametrize("as_others", [True, False])
def test_sets_are_mixed_only_in_one_store_where_nix_builds_as_its_owner(
    as_others: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "builds_as_others", lambda: as_others)
    machines = NixStores.of_one(Nix(None, LIMITS))
    assert machines.mix(["", "git!x"]) != as_others
    assert not machines.mix(["git!x", "git!x"])
    assert not NixStores(Path("/data"), LIMITS).mix(["", "git!x"])
