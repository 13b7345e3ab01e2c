import pytest

from chandlery.sources.debian import release as debian_release
from chandlery.sources.debian.release import PackagesFile, Release, SuiteState

ALIASES = {"cacert": ["ca-certificates"]}

RELEASE = """\
Origin: Debian
Suite: stable
Date: {date}
Acquire-By-Hash: yes
Architectures: all amd64 arm64 i386
MD5Sum:
 0123456789abcdef0123456789abcdef 5 main/binary-amd64/Packages
SHA256:
 {amd64} 5000 main/binary-amd64/Packages
 {gz} 700 main/binary-amd64/Packages.gz
 {xz} 600 main/binary-amd64/Packages.xz
 {arm64} 0 main/binary-arm64/Packages
 {gz} 20 main/binary-arm64/Packages.gz
 {i386} 8 main/binary-i386/Packages
 {i386} 8 contrib/binary-amd64/Packages
"""
SIGNED = """\
-----BEGIN PGP SIGNED MESSAGE-----
Hash: SHA256

{text}-----BEGIN PGP SIGNATURE-----

iQIzBAEBCAAdFiEE
-----END PGP SIGNATURE-----
"""


def text_of(**changed: str) -> str:
    digits = {"amd64": "a", "arm64": "b", "gz": "c", "xz": "d", "i386": "e"} | changed
    date = digits.pop("date", "Sat, 01 Jan 2022 00:00:00 UTC")
    return RELEASE.format(date=date, **{name: digit * 64 for name, digit in digits.items()})


def parse(text: str, name: str = "bookworm") -> Release:
    return Release.parse(name, text.encode())


def revision(*releases: Release) -> str:
    return SuiteState(releases).revision(ALIASES)


def test_the_best_form_of_each_packages_file_is_fetched() -> None:
    release = parse(SIGNED.format(text=text_of()))

    assert release.has_by_hash
    assert release.file("amd64") == PackagesFile("main/binary-amd64/Packages.xz", "d" * 64, 600)
    assert SuiteState((release,)).architectures == ("amd64", "arm64")


def test_of_an_empty_packages_file_nothing_is_fetched() -> None:
    assert parse(text_of()).file("arm64") is None
    assert parse(text_of()).file("riscv64") is None


def test_a_packages_file_has_a_name_of_its_own_and_a_place_by_its_hash() -> None:
    file = parse(text_of()).file("amd64")
    assert file is not None
    assert file.name == f"{'d' * 64}.xz"
    assert file.by_hash == f"main/binary-amd64/by-hash/SHA256/{'d' * 64}"


def test_a_revision_is_that_of_the_packages_of_all_architectures() -> None:
    before = revision(parse(text_of()))
    same = [
        parse(SIGNED.format(text=text_of())),
        # Signed anew, packed anew, and with other packages of what no image is made of.
        parse(text_of(date="Sun, 02 Jan 2022 00:00:00 UTC", xz="1", gz="2", i386="3")),
    ]
    others = [parse(text_of(amd64="1")), parse(text_of(arm64="1")), parse(text_of(), "trixie")]

    assert len(before) == 64
    assert {revision(each) for each in same} == {before}
    assert len({before, *map(revision, others)}) == 4


def test_updates_count_in_their_order() -> None:
    main, updates = parse(text_of()), parse(text_of(amd64="1"), "bookworm-updates")
    revisions = [revision(main), revision(main, updates), revision(updates, main)]
    assert len(set(revisions)) == 3


def test_another_way_to_make_snapshots_is_another_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SuiteState((parse(text_of()),))
    revisions = {state.revision(ALIASES), state.revision({})}
    for version in ("LOCK_VERSION", "MEASURE_VERSION"):
        with monkeypatch.context() as changed:
            changed.setattr(debian_release, version, "another")
            revisions.add(state.revision(ALIASES))
    assert len(revisions) == 4


def test_the_revision_of_a_state_does_not_change() -> None:
    assert revision(parse(text_of())) == "41229bda68d309a33d4132ea289ab7cbe2b740343ee404588ff922c218de533c"


def test_a_state_can_be_written_down() -> None:
    state = SuiteState((parse(text_of()), parse(text_of(), "bookworm-updates")))
    assert SuiteState.from_json(state.to_json()) == state


@pytest.mark.parametrize(
    "text",
    [
        "Suite: stable\n",
        "",
        text_of().replace("d" * 64, "../../etc"),
        text_of().replace(" 600 ", " many "),
        text_of().replace(f"{'d' * 64} 600 ", "d "),
    ],
)
def test_what_lists_no_files_as_a_release_does_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="it lists"):
        parse(text)
