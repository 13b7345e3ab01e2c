import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from chandlery.errors import ReferenceNotFoundError, SourceUnavailableError, TooManyReferencesError
from chandlery.image.name import LATEST
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.documents import ARCHITECTURES, Platform
from chandlery.sources.debian.index import KEPT_REVISIONS, DebianMirrors
from chandlery.sources.debian.source import DebianSource
from chandlery.sources.pins import PinLimits
from tests.support.debian_packages import Deb
from tests.support.debian_repository import SUITE, DebianRepository, Fault, debian_repository
from tests.support.debian_snapshots import packages_file, put, put_earlier

AMD64, ARM64 = Platform("linux", "amd64"), Platform("linux", "arm64")
HOST = Platform.of_host()
OTHER_SUITE = "trixie"
DEAD_MIRROR = DebianMirrors("http://127.0.0.1:1/debian", "http://127.0.0.1:1/debian-security")

# What is expired is asked for anew, and that is waited for.
EXPIRES_AT_ONCE = PinLimits(lifetime=0.0, patience=60.0, back_off=0.0)


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[DebianRepository]:
    with debian_repository(tmp_path) as repository:
        repository.publish(Deb("git", architecture="any"))
        yield repository


def keep(folder: Path, name: str, *architectures: str) -> str:
    """Keep a state of a suite with one package; give its revision."""
    return put(folder / "suites" / SUITE, packages_file(name), architectures)


def keep_earlier(folder: Path, architecture: str, name: str) -> str:
    """Keep a state of a suite with one package as version 0.1 did; give its revision."""
    return put_earlier(folder / f"{SUITE}-{architecture}", packages_file(name))


async def test_the_latest_state_of_a_suite_is_pinned_and_each_state_has_a_tag(tmp_path: Path) -> None:
    source = DebianSource(SUITE, tmp_path, DebianMirrors())
    first = keep(tmp_path, "git", "amd64")
    second = keep(tmp_path, "jq", "amd64")

    latest = await source.pin(LATEST, AMD64)
    earlier = await source.pin(first[:16], AMD64)

    assert latest == PinnedSource("debian", SUITE, second)
    assert earlier == PinnedSource("debian", SUITE, first)
    assert await source.pin(earlier.tag, AMD64) == earlier
    assert await source.at(first, AMD64) == earlier
    assert await source.at("0" * 64, AMD64) is None
    assert latest.to_nix() == {
        "kind": "debian",
        "location": SUITE,
        "lock": f"{tmp_path}/suites/{SUITE}/revisions/{second}/amd64",
        "mirrors": ["http://127.0.0.1:1/debian"],
    }


@pytest.mark.parametrize("reference", ["V1", "a" * 41, "..", "-x", "a_b", "a--b", "[signed-by=x]", "a/b", ""])
async def test_what_can_be_no_suite_is_not_found_and_the_hint_says_what_there_is(
    tmp_path: Path, reference: str
) -> None:
    keep(tmp_path, "git", "amd64")

    with pytest.raises(
        ReferenceNotFoundError, match=r"there is 'latest', other suites .* and for each state of"
    ):
        await DebianSource(SUITE, tmp_path, DebianMirrors()).pin(reference, AMD64)


def test_images_are_made_for_both_architectures_the_hosts_first(tmp_path: Path) -> None:
    platforms = DebianSource(SUITE, tmp_path, DebianMirrors()).platforms

    assert platforms[0] == HOST
    assert {each.architecture for each in platforms} == set(ARCHITECTURES)


async def test_a_state_is_one_of_all_architectures(tmp_path: Path) -> None:
    source = DebianSource(SUITE, tmp_path, DebianMirrors(), tags=())
    revision = keep(tmp_path, "git", *ARCHITECTURES)

    for architecture in ARCHITECTURES:
        platform = Platform("linux", architecture)
        for reference in (LATEST, revision, revision[:16]):
            pinned = await source.pin(reference, platform)
            assert pinned.revision == revision
            assert pinned.to_nix()["lock"] == f"{tmp_path}/suites/{SUITE}/revisions/{revision}/{architecture}"


async def test_a_state_of_version_0_1_belongs_to_an_architecture(tmp_path: Path) -> None:
    source = DebianSource(SUITE, tmp_path, DEAD_MIRROR, tags=())
    revisions = {each: keep_earlier(tmp_path, each, f"of-{each}") for each in ARCHITECTURES}

    for architecture, revision_of_it in revisions.items():
        assert (await source.pin(LATEST, Platform("linux", architecture))).revision == revision_of_it
    with pytest.raises(ReferenceNotFoundError):
        await source.pin(revisions["arm64"][:16], AMD64)


async def test_an_index_is_fetched_for_the_host_and_for_what_was_asked_for(
    tmp_path: Path, repository: DebianRepository
) -> None:
    host = HOST.architecture
    [other] = set(ARCHITECTURES) - {host}
    source = DebianSource(SUITE, tmp_path, repository.mirrors)

    def fetched() -> list[str]:
        found = [
            each for each in ARCHITECTURES if any(f"binary-{each}/" in path for path in repository.requests)
        ]
        repository.requests.clear()
        return found

    await source.refresh(max_age=3600)
    assert fetched() == [host]
    await source.pin(LATEST, Platform("linux", other))
    assert fetched() == [other]
    repository.publish(Deb("git", "2", architecture="any"))
    await source.refresh(max_age=3600)
    assert fetched() == []
    await source.refresh(max_age=0)
    assert fetched() == list(ARCHITECTURES)


# Other suites


async def test_a_tag_may_be_another_suite_which_is_followed_like_the_own(
    tmp_path: Path, repository: DebianRepository
) -> None:
    for release in (OTHER_SUITE, f"{OTHER_SUITE}-updates", f"{OTHER_SUITE}-security"):
        repository.serve(release)
    repository.publish(Deb("git", "3", architecture="any"), release=OTHER_SUITE)
    source = DebianSource(SUITE, tmp_path, repository.mirrors)
    latest = await source.pin(LATEST, HOST)

    other = await source.pin(OTHER_SUITE, HOST)

    assert (other.kind, other.location) == ("debian", OTHER_SUITE)
    assert other.revision != latest.revision
    # Its states have tags as well.
    assert await source.pin(other.tag, HOST) == await source.at(other.revision, HOST) == other
    repository.publish(Deb("jq", architecture="any"), release=OTHER_SUITE)
    await source.refresh(0)
    assert (await source.pin(OTHER_SUITE, HOST)).revision != other.revision
    assert await source.pin(LATEST, HOST) == latest


async def test_the_operator_says_which_suites_tags_may_choose(
    tmp_path: Path, repository: DebianRepository
) -> None:
    source = DebianSource(SUITE, tmp_path, repository.mirrors, tags=("book*",))

    assert await source.pin(SUITE, HOST) == await source.pin(LATEST, HOST)
    with pytest.raises(ReferenceNotFoundError, match=r"suites like book\*, and for each state"):
        await source.pin(OTHER_SUITE, HOST)
    assert not any(OTHER_SUITE in path for path in repository.requests)


async def test_a_suite_that_the_mirror_does_not_have_is_not_found_and_leaves_nothing(
    tmp_path: Path, repository: DebianRepository
) -> None:
    source = DebianSource(SUITE, tmp_path / "debian", repository.mirrors)
    await source.pin(LATEST, HOST)
    for _ in range(3):
        with pytest.raises(ReferenceNotFoundError, match="other suites that the mirror has"):
            await source.pin("bokworm", HOST)

    # Once is enough.
    assert sum(path.endswith("bokworm/InRelease") for path in repository.requests) == 1
    assert [path.name for path in (tmp_path / "debian/suites").iterdir() if path.is_dir()] == [SUITE]


async def test_a_mirror_is_not_asked_for_every_name_that_clients_think_of(
    tmp_path: Path, repository: DebianRepository
) -> None:
    source = DebianSource(SUITE, tmp_path / "debian", repository.mirrors)
    results = await asyncio.gather(
        *(source.pin(f"suite-{number}", HOST) for number in range(30)), return_exceptions=True
    )
    results += await asyncio.gather(
        *(source.pin(f"other-{number}", HOST) for number in range(30)), return_exceptions=True
    )

    assert all(isinstance(each, ReferenceNotFoundError | TooManyReferencesError) for each in results)
    assert sum(isinstance(each, TooManyReferencesError) for each in results) >= 30
    assert not list((tmp_path / "debian/suites").glob("*-*"))


async def test_a_suite_of_the_settings_that_does_not_exist_is_told_as_such(
    tmp_path: Path, repository: DebianRepository
) -> None:
    with pytest.raises(SourceUnavailableError, match="does not have a Release file"):
        await DebianSource("bokworm", tmp_path, repository.mirrors).pin(LATEST, HOST)


@pytest.mark.parametrize(
    ("suite", "releases"),
    [
        ("sid", ["sid"]),
        ("trixie", ["trixie", "trixie-updates", "trixie-security"]),
        (
            "trixie-backports",
            ["trixie-backports", "trixie", "trixie-updates", "trixie-security"],
        ),
        ("experimental", ["experimental", "sid"]),
    ],
)
async def test_a_suite_comes_with_what_it_stands_on_and_its_updates(
    tmp_path: Path, repository: DebianRepository, suite: str, releases: list[str]
) -> None:
    for release in releases:
        repository.serve(release)
        repository.publish(Deb(f"of-{release}", architecture="any"), release=release)

    pinned = await DebianSource(suite, tmp_path, repository.mirrors).pin(LATEST, HOST)

    names = (Path(pinned.to_nix()["lock"]) / "names.txt").read_text().splitlines()
    assert {f"of-{release}" for release in releases} <= set(names)
    assert len(pinned.to_nix()["mirrors"]) == len(releases)


# A mirror that is down


async def test_a_mirror_that_is_down_is_told_with_every_pin_and_logged_once(
    tmp_path: Path, repository: DebianRepository
) -> None:
    source = DebianSource(SUITE, tmp_path, repository.mirrors)
    pinned = await source.pin(LATEST, HOST)
    restarted = DebianSource(SUITE, tmp_path, repository.mirrors, limits=EXPIRES_AT_ONCE)
    with repository.misbehaving(Fault.REFUSE), capture_logs() as logs:
        for _ in range(2):
            stale = await restarted.pin(LATEST, HOST)
            assert stale == pinned
            assert stale.stale.startswith("as of 20")
            assert "apt said: E: Failed to fetch" in stale.stale
    assert [each["event"] for each in logs if each["log_level"] == "warning"] == [
        "the package source can't be asked: its last good pin is served"
    ]

    repository.publish(Deb("jq", architecture="any"))
    renewed = await restarted.pin(LATEST, HOST)
    assert renewed.stale == ""
    assert renewed.revision != pinned.revision


async def test_a_mirror_in_trouble_that_has_no_suites_is_one_that_is_down(
    tmp_path: Path, repository: DebianRepository
) -> None:
    for release in (OTHER_SUITE, f"{OTHER_SUITE}-updates", f"{OTHER_SUITE}-security"):
        repository.serve(release)
    repository.publish(Deb("git", "3", architecture="any"), release=OTHER_SUITE)
    source = DebianSource(SUITE, tmp_path, repository.mirrors, limits=EXPIRES_AT_ONCE)
    pinned = [await source.pin(each, HOST) for each in (LATEST, OTHER_SUITE)]
    with repository.misbehaving(Fault.NOT_FOUND):
        stale = [await source.pin(each, HOST) for each in (LATEST, OTHER_SUITE)]

    assert stale == pinned
    assert all(each.stale for each in stale)


async def test_a_mirror_that_was_never_reached_is_told(tmp_path: Path, repository: DebianRepository) -> None:
    with repository.misbehaving(Fault.REFUSE):
        for reference in (LATEST, OTHER_SUITE):
            with pytest.raises(SourceUnavailableError):
                await DebianSource(SUITE, tmp_path, repository.mirrors).pin(reference, HOST)


async def test_an_index_of_an_earlier_version_serves_while_the_mirror_is_down(tmp_path: Path) -> None:
    """Nobody wrote down when it was pinned."""
    revision = keep_earlier(tmp_path, HOST.architecture, "git")
    os.utime(tmp_path / f"{SUITE}-{HOST.architecture}" / "current", (60, 60))
    source = DebianSource(SUITE, tmp_path, DEAD_MIRROR)

    assert (await source.pin(LATEST, HOST)).revision == revision
    assert (await source.pin(LATEST, HOST)).stale.startswith("as of 1970-01-01")


# One revision of all architectures


async def test_architectures_that_are_asked_for_move_to_a_new_revision_together(
    tmp_path: Path, repository: DebianRepository
) -> None:
    source = DebianSource(SUITE, tmp_path, repository.mirrors, limits=EXPIRES_AT_ONCE)
    before = [await source.pin(LATEST, each) for each in source.platforms]
    # What one of them has fetched is no older than the pin of the other.
    await source.pin(LATEST, source.platforms[0])
    repository.publish(Deb("firmware", architecture="any"), architectures=["arm64"])
    with repository.misbehaving(Fault.NOT_FOUND, "binary-arm64/Packages.xz"):
        stale = [await source.pin(LATEST, each) for each in source.platforms]
    after = [await source.pin(LATEST, each) for each in source.platforms]

    assert len({each.revision for each in before}) == len({each.revision for each in after}) == 1
    assert stale == before
    assert all("404 Not Found" in each.stale for each in stale)
    assert after[0].revision != before[0].revision
    assert [each.stale for each in after] == ["", ""]


async def test_an_architecture_that_the_suite_lacks_has_no_revision_and_the_others_have(
    tmp_path: Path, repository: DebianRepository
) -> None:
    repository.architectures = ("amd64",)
    repository.publish()
    source = DebianSource(SUITE, tmp_path, repository.mirrors)
    pinned = await source.pin(LATEST, AMD64)
    for reference in (LATEST, pinned.tag):
        with pytest.raises(ReferenceNotFoundError, match=f"has no packages of {SUITE} for arm64"):
            await source.pin(reference, ARM64)


async def test_a_revision_that_was_pinned_for_one_architecture_can_be_had_for_another_later(
    tmp_path: Path, repository: DebianRepository
) -> None:
    repository.by_hash = True
    repository.publish()
    source = DebianSource(SUITE, tmp_path, repository.mirrors, limits=EXPIRES_AT_ONCE)
    first = await source.pin(LATEST, AMD64)
    repository.publish(Deb("new", architecture="any"))
    assert await source.pin(LATEST, AMD64) != first

    assert await source.at(first.revision, ARM64) == await source.pin(first.tag, ARM64) == first
    # What the mirror has dropped since is trouble, and no word that there is no such revision.
    for path in [path for path in repository.files if "/by-hash/" in path]:
        del repository.files[path]
    for kept in tmp_path.glob(f"suites/{SUITE}/packages/*"):
        kept.unlink()
    (tmp_path / f"suites/{SUITE}/revisions/{first.revision}/arm64").rename(tmp_path / "gone")
    with pytest.raises(SourceUnavailableError):
        await source.pin(first.tag, ARM64)
    assert await source.at(first.revision, ARM64) is None


async def test_the_tag_of_a_revision_that_is_not_kept_is_no_suite_to_ask_a_mirror_for(
    tmp_path: Path, repository: DebianRepository
) -> None:
    source = DebianSource(SUITE, tmp_path, repository.mirrors)
    with pytest.raises(ReferenceNotFoundError, match="for each state of an index its own tag"):
        await source.pin("0123456789abcdef", AMD64)
    assert repository.requests == []


# What version 0.1 kept


async def test_what_version_0_1_kept_serves_until_the_suite_is_fetched_anew_and_its_tags_go_on(
    tmp_path: Path, repository: DebianRepository
) -> None:
    revisions = {each: keep_earlier(tmp_path, each.architecture, "git") for each in (AMD64, ARM64)}
    with repository.misbehaving(Fault.REFUSE):
        source = DebianSource(SUITE, tmp_path, repository.mirrors, limits=EXPIRES_AT_ONCE)
        for platform, revision in revisions.items():
            pinned = await source.pin(LATEST, platform)
            assert (pinned.revision, bool(pinned.to_nix()["lock"])) == (revision, True)
    # One of them first: as with a server that is killed in between.
    anew = await source.pin(LATEST, AMD64)
    source = DebianSource(SUITE, tmp_path, repository.mirrors, limits=EXPIRES_AT_ONCE)

    assert anew.revision not in revisions.values()
    assert await source.pin(LATEST, ARM64) == anew
    for platform, revision in revisions.items():
        earlier = await source.pin(revision[:16], platform)
        assert earlier == await source.at(revision, platform) == PinnedSource("debian", SUITE, revision)
    assert not list(tmp_path.glob("*/apt"))


async def test_what_version_0_1_kept_goes_before_what_is_newer(
    tmp_path: Path, repository: DebianRepository
) -> None:
    earlier = keep_earlier(tmp_path, "amd64", "git")
    source = DebianSource(SUITE, tmp_path, repository.mirrors, limits=EXPIRES_AT_ONCE)
    for number in range(KEPT_REVISIONS):
        assert await source.at(earlier, AMD64)
        (tmp_path / f"suites/{SUITE}/revisions/{number:064x}").mkdir(parents=True)
    await source.pin(LATEST, AMD64)
    assert await source.at(earlier, AMD64) is None
