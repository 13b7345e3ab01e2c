import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from chandlery.errors import (
    ChandleryError,
    InvalidSourceError,
    ReferenceNotFoundError,
    SettingsError,
    SourceUnavailableError,
    StorageFullError,
    TooManyReferencesError,
)
from chandlery.image.name import LATEST
from chandlery.machine.download import DownloadLimits
from chandlery.nix.pinned_source import NIXPKGS, PinnedSource
from chandlery.oci.documents import Platform
from chandlery.sources.debian.index import DebianMirrors
from chandlery.sources.kinds import parse
from chandlery.sources.nixpkgs import NixpkgsAddresses, NixpkgsSource
from chandlery.sources.package_source import SourceOptions
from chandlery.sources.pins import PinLimits
from tests.support.channel_server import ChannelServer, Fault, channel_server, tarball, tree_of_shape
from tests.support.channel_source import ALWAYS, CHANNEL, QUICK, opened

HOST = Platform.of_host()

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a small disk")


@pytest.fixture
def server() -> Iterator[ChannelServer]:
    with channel_server() as server:
        yield server


def tree(pin: PinnedSource) -> Path:
    assert pin.nix is not None
    return Path(pin.nix["tree"])


def says(pin: PinnedSource) -> str:
    """Return what the `revision` program of a pinned package set prints."""
    return (tree(pin) / "revision").read_text()


def trees(folder: Path) -> list[str]:
    """Return the revisions that are there, and what is being made."""
    return sorted(path.name for path in [*folder.glob("source/[0-9a-f]*"), *folder.glob("source/making/*")])


async def test_a_channel_is_pinned_to_the_commit_that_it_stands_at(
    server: ChannelServer, tmp_path: Path
) -> None:
    commit = server.publish(CHANNEL, "one")
    async with opened(server, tmp_path) as source:
        pin = await source.pin(LATEST, HOST)

    assert pin == PinnedSource("nixpkgs", "nixpkgs", commit)
    assert pin.public_location == NIXPKGS
    assert not pin.stale
    assert says(pin) == "one"
    assert {path.name for path in tree(pin).iterdir()} == {
        "default.nix", "flake.nix", "pkgs", "revision",
    }  # fmt: skip
    assert [path.split("/")[1] for path in server.requests] == [CHANNEL, "releases", "archive", "codeload"]


@pytest.mark.parametrize("compression", ["gz", "xz", "zst", "none"])
async def test_the_tarballs_compression_is_seen_in_its_bytes(
    server: ChannelServer, tmp_path: Path, compression: str
) -> None:
    server.publish(CHANNEL, "one", compression=compression)
    async with opened(server, tmp_path) as source:
        assert says(await source.pin(LATEST, HOST)) == "one"


async def test_a_commit_needs_no_channel(server: ChannelServer, tmp_path: Path) -> None:
    commit = server.publish(CHANNEL, "one")
    server.publish(CHANNEL, "two")
    async with opened(server, tmp_path, commit) as source:
        for reference in (LATEST, commit, commit[:16]):
            assert says(await source.pin(reference, HOST)) == "one"
    assert all("git-revision" not in path for path in server.requests)
    assert len(server.requests) == 2


async def test_a_channel_that_moves_is_followed_and_each_revision_keeps_its_tag(
    server: ChannelServer, tmp_path: Path
) -> None:
    first = server.publish(CHANNEL, "one")
    async with opened(server, tmp_path) as source:
        assert (await source.pin(LATEST, HOST)).revision == first
        second = server.publish(CHANNEL, "two")

        latest = await source.pin(LATEST, HOST)
        assert (latest.revision, says(latest)) == (second, "two")
        assert (await source.pin(CHANNEL, HOST)) == latest
        server.requests.clear()
        for reference in (first[:16], first):
            assert says(await source.pin(reference, HOST)) == "one"
        assert says(found) == "one" if (found := await source.at(first, HOST)) else False
        assert server.requests == []

    # Another process knows them too.
    server.stop()
    async with opened(server, tmp_path) as source:
        assert says(await source.pin(first[:16], HOST)) == "one"


async def test_a_pin_lives_and_is_renewed_in_the_background(server: ChannelServer, tmp_path: Path) -> None:
    server.publish(CHANNEL, "one")
    async with opened(server, tmp_path, limits=PinLimits(lifetime=3600)) as source:
        await source.refresh(3600)
        asked = len(server.requests)
        server.publish(CHANNEL, "two")
        assert says(await source.pin(LATEST, HOST)) == "one"
        assert len(server.requests) == asked
        await source.refresh(0)
        asked = len(server.requests)
        assert says(await source.pin(LATEST, HOST)) == "two"
        assert len(server.requests) == asked


async def test_many_who_ask_at_once_share_one_download(server: ChannelServer, tmp_path: Path) -> None:
    server.publish(CHANNEL, "one")
    async with opened(server, tmp_path) as source:
        pins = await asyncio.gather(*(source.pin(LATEST, HOST) for _ in range(20)))
    assert len({pin.revision for pin in pins}) == 1
    assert sum(path.startswith("/codeload/") for path in server.requests) == 1


async def test_config_and_overlays_make_another_package_set_of_the_same_revision(
    server: ChannelServer, tmp_path: Path
) -> None:
    server.publish(CHANNEL, "one")
    async with (
        opened(server, tmp_path) as plain,
        opened(server, tmp_path, config={"allowUnfree": True}) as free,
    ):
        one, other = await plain.pin(LATEST, HOST), await free.pin(LATEST, HOST)
    assert one.revision == other.revision
    assert one != other
    assert other.to_nix()["config"] == {"allowUnfree": True}


# Other channels and commits


async def test_other_channels_and_commits_are_off_until_the_operator_allows_them(
    server: ChannelServer, tmp_path: Path
) -> None:
    server.publish(CHANNEL, "one")
    other = server.publish("nixos-24.05", "stable")
    async with opened(server, tmp_path) as source:
        await source.pin(LATEST, HOST)
        asked = len(server.requests)
        for reference in ("nixos-24.05", other, other[:16], "0" * 40, "v1", "a_b", "NIXOS"):
            with pytest.raises(ReferenceNotFoundError, match="this server's settings allow none"):
                await source.pin(reference, HOST)
        assert len(server.requests) == asked
    async with opened(server, tmp_path, tags=("nixos-*", other)) as source:
        assert says(await source.pin("nixos-24.05", HOST)) == "stable"
        assert says(await source.pin(other, HOST)) == "stable"
        with pytest.raises(ReferenceNotFoundError, match=r"allow those that match nixos-\*"):
            await source.pin("nixpkgs-unstable", HOST)


@pytest.mark.parametrize(
    "reference",
    ["..", ".", "-", "nixos-", "nixos..", "a/b", "%2e%2e", "a?b", "a#b", "{channel}", "a b", "a\n"],
)
async def test_a_tag_leads_nowhere_else_in_an_address(
    server: ChannelServer, tmp_path: Path, reference: str
) -> None:
    async with opened(server, tmp_path, tags=("*",)) as source:
        with pytest.raises(ReferenceNotFoundError):
            await source.pin(reference, HOST)
    assert all(path == f"/{reference}/git-revision" for path in server.requests)


async def test_a_channel_or_a_commit_that_is_not_there_is_told(server: ChannelServer, tmp_path: Path) -> None:
    async with opened(server, tmp_path, tags=("*",)) as source:
        with pytest.raises(
            ReferenceNotFoundError, match=r"there is no such channel: .*/nixos-99.99/git-revision: .* 404"
        ):
            await source.pin("nixos-99.99", HOST)
        with pytest.raises(ReferenceNotFoundError, match=r"nixpkgs has no such commit: .*404"):
            await source.pin("0" * 40, HOST)
        asked = len(server.requests)
        with pytest.raises(ReferenceNotFoundError):
            await source.pin("nixos-99.99", HOST)
        assert len(server.requests) == asked
        with pytest.raises(SourceUnavailableError, match="the setting nixpkgs_channel_url"):
            await source.pin(LATEST, HOST)


async def refusal(source: NixpkgsSource, reference: str) -> type[ChandleryError]:
    with pytest.raises(ChandleryError) as caught:
        await source.pin(reference, HOST)
    return type(caught.value)


async def test_a_client_that_tries_names_is_stopped_before_upstream_is(
    server: ChannelServer, tmp_path: Path
) -> None:
    async with opened(server, tmp_path, tags=("*",)) as source:
        answers = [await refusal(source, f"nixos-{number}") for number in range(50)]
    assert answers[:10] == [ReferenceNotFoundError] * 10
    assert answers[-1] is TooManyReferencesError
    assert len(server.requests) < 50


async def test_a_channel_that_ends_is_gone_for_clients_and_its_revisions_are_not(
    server: ChannelServer, tmp_path: Path
) -> None:
    old = server.publish("nixos-20.03", "old")
    server.publish(CHANNEL, "one")
    async with opened(server, tmp_path, tags=("nixos-*",)) as source:
        await source.pin("nixos-20.03", HOST)
        await source.pin(LATEST, HOST)
        server.channels.clear()
        with pytest.raises(ReferenceNotFoundError):
            await source.pin("nixos-20.03", HOST)
        assert says(await source.pin(old[:16], HOST)) == "old"
        stale = await source.pin(LATEST, HOST)
        assert says(stale) == "one"
        assert "404" in stale.stale


# Trouble


@pytest.mark.parametrize(
    ("fault", "end", "reason"),
    [
        (Fault.ERROR, f"/{CHANNEL}/git-revision", "the answer is 500"),
        (Fault.NOT_FOUND, f"/{CHANNEL}/git-revision", "the answer is 404"),
        (Fault.HANG_UP, "git-revision", "disconnected"),
        (Fault.WRONG, "git-revision", "it says '<html>Log in to this network</html>', which is no commit"),
        (Fault.LOOP, "git-revision", "redirects"),
        (Fault.ENDLESS, "git-revision", r"it says '\x00"),
        (Fault.NOT_FOUND, ".tar.gz", "the answer is 404"),
        (Fault.ERROR, ".tar.gz", "the answer is 500"),
        (Fault.HANG, ".tar.gz", "nothing came for 0.5 s"),
        (Fault.CUT, "", "peer closed connection"),
        (Fault.STALL, "", "nothing came for 0.5 s"),
        (Fault.WRONG, ".tar.gz", "it can't be unpacked"),
        (Fault.ENDLESS, ".tar.gz", "there is nothing in it"),
    ],
)
async def test_whatever_upstream_does_the_last_good_pin_is_served_and_says_why(
    server: ChannelServer, tmp_path: Path, fault: Fault, end: str, reason: str
) -> None:
    first = server.publish(CHANNEL, "one")
    async with opened(server, tmp_path) as source:
        await source.pin(LATEST, HOST)
        second = server.publish(CHANNEL, "two")
        end = end or f"/codeload/{second}"
        with server.misbehaving(fault, end):
            stale = await source.pin(LATEST, HOST)
        assert (stale.revision, says(stale)) == (first, "one")
        assert reason in stale.stale
        assert stale == PinnedSource("nixpkgs", "nixpkgs", first)
        assert trees(tmp_path) == [first]

        latest = await source.pin(LATEST, HOST)
        assert (latest.revision, latest.stale) == (second, "")


async def test_a_dead_server_is_outlived_and_heard_again(server: ChannelServer, tmp_path: Path) -> None:
    server.publish(CHANNEL, "one")
    async with opened(server, tmp_path) as source:
        await source.pin(LATEST, HOST)
        server.stop()
        assert says(await source.pin(LATEST, HOST)) == "one"
    async with opened(server, tmp_path) as source:
        stale = await source.pin(LATEST, HOST)
        assert says(stale) == "one"
        assert stale.stale
        server.publish(CHANNEL, "two")
        server.start()
        latest = await source.pin(LATEST, HOST)
        assert (says(latest), latest.stale) == ("two", "")


async def test_without_a_last_good_pin_it_is_told_what_went_wrong_where(
    server: ChannelServer, tmp_path: Path
) -> None:
    server.publish(CHANNEL, "one")
    server.stop()
    async with opened(server, tmp_path) as source:
        with pytest.raises(SourceUnavailableError, match=f"http://{server.address}/{CHANNEL}/git-revision: "):
            await source.pin(LATEST, HOST)
        with pytest.raises(SourceUnavailableError):
            await source.refresh(0)


async def test_a_slow_upstream_makes_nobody_wait_who_can_be_served(
    server: ChannelServer, tmp_path: Path
) -> None:
    server.publish(CHANNEL, "one")
    async with opened(server, tmp_path, limits=replace(ALWAYS, patience=0.05)) as source:
        await source.pin(LATEST, HOST)
        server.publish(CHANNEL, "two")
        with server.misbehaving(Fault.HANG, "git-revision"):
            stale = await source.pin(LATEST, HOST)
            assert says(stale) == "one"
            assert "not answered within" in stale.stale


async def test_a_download_that_breaks_off_is_begun_again(server: ChannelServer, tmp_path: Path) -> None:
    commit = server.publish(CHANNEL, "one")
    server.tarballs[commit] = tarball({**tree_of_shape("one"), "large": os.urandom(1 << 20)}, commit)
    async with opened(server, tmp_path, downloads=replace(QUICK, pauses=(0.2, 0.2, 0.2))) as source:
        with server.misbehaving(Fault.CUT, f"/codeload/{commit}") as met:
            pinning = asyncio.create_task(source.pin(LATEST, HOST))
            await asyncio.to_thread(met.wait, 10)
        assert says(await pinning) == "one"
    assert server.requests.count(f"/codeload/{commit}") > 1


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda commit: tarball(tree_of_shape("one"), "0" * 40), "it has the commit 0000000"),
        (
            lambda commit: tarball({"README.md": b"nothing"}, commit),
            "it has no default.nix, so it isn't nixpkgs",
        ),
        (lambda commit: tarball({"../../evil": b"evil"}, commit), "leads out of it"),
        (
            lambda commit: tarball({"default.nix": b"{ }"}, commit, compression="none")[:2060],
            "it can.t be unpacked",
        ),
    ],
)
async def test_a_tarball_of_something_else_is_not_taken_for_the_revision(
    server: ChannelServer, tmp_path: Path, make: Callable[[str], bytes], reason: str
) -> None:
    commit = server.publish(CHANNEL, "one")
    server.tarballs[commit] = make(commit)
    async with opened(server, tmp_path) as source:
        with pytest.raises(SourceUnavailableError, match=reason):
            await source.pin(LATEST, HOST)
    assert trees(tmp_path) == []
    assert not list(tmp_path.rglob("evil"))


async def test_a_tree_that_is_gone_is_fetched_again(server: ChannelServer, tmp_path: Path) -> None:
    first = server.publish(CHANNEL, "one")
    async with opened(server, tmp_path, limits=PinLimits(lifetime=3600, back_off=0)) as source:
        before = await source.pin(LATEST, HOST)
        shutil.rmtree(tree(before).parent)
        for find in (source.pin(LATEST, HOST), source.pin(first[:16], HOST), source.at(first, HOST)):
            found = await find
            assert found == before
            assert says(found) == "one"
            shutil.rmtree(tree(found).parent)

        # What was resolved at it is known all the same.
        server.stop()
        for find in (source.pin(LATEST, HOST), source.pin(first[:16], HOST), source.at(first, HOST)):
            found = await find
            assert found == before
            assert found.nix is None
            assert found.stale


async def test_many_who_want_what_is_gone_ask_a_dead_upstream_once(
    server: ChannelServer, tmp_path: Path
) -> None:
    first = server.publish(CHANNEL, "one")
    async with opened(server, tmp_path, limits=PinLimits(lifetime=3600)) as source:
        shutil.rmtree(tree(await source.pin(LATEST, HOST)).parent)
        server.requests.clear()
        with server.misbehaving(Fault.NOT_FOUND):
            pins = await asyncio.gather(*(source.pin(first[:16], HOST) for _ in range(20)))
        assert [pin.nix for pin in pins] == [None] * 20
        assert len(server.requests) == 1


async def test_what_was_never_pinned_is_not_there(server: ChannelServer, tmp_path: Path) -> None:
    async with opened(server, tmp_path) as source:
        for revision in ("", "nixos-unstable", "ab" * 20, "ab" * 32, "../../etc"):
            assert await source.at(revision, HOST) is None
    assert server.requests == []


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


KILLED = """
import asyncio, sys
from pathlib import Path
from chandlery.image.name import LATEST
from chandlery.sources.nixpkgs import NixpkgsAddresses, NixpkgsSource
from chandlery.oci.documents import Platform
from chandlery.sources.arguments import SetArguments

folder, *templates = sys.argv[1:]
source = NixpkgsSource("nixos-unstable", Path(folder, "source"), NixpkgsAddresses.parse(*templates),
    SetArguments(Path(folder, "overlays")))
print(asyncio.run(source.pin(LATEST, Platform.of_host())).revision)
"""


async def test_a_kill_in_the_middle_leaves_nothing_half_done(server: ChannelServer, tmp_path: Path) -> None:
    commit = server.publish(CHANNEL, "one")
    server.tarballs[commit] = tarball({**tree_of_shape("one"), "zz": os.urandom(4 << 20)}, commit)
    with server.misbehaving(Fault.STALL, f"/codeload/{commit}"):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", KILLED, str(tmp_path), server.channel_template, server.tarball_template
        )
        while not list(tmp_path.glob("source/making/*/source/default.nix")):
            assert process.returncode is None
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        await process.wait()
    assert len(trees(tmp_path)) == 1
    async with opened(server, tmp_path) as source:
        assert says(await source.pin(LATEST, HOST)) == "one"
    assert trees(tmp_path) == [commit]


async def test_a_stop_in_the_middle_leaves_nothing_and_takes_no_time(
    server: ChannelServer, tmp_path: Path
) -> None:
    commit = server.publish(CHANNEL, "one")
    with server.misbehaving(Fault.STALL, f"/codeload/{commit}") as met:
        async with opened(server, tmp_path, downloads=DownloadLimits()) as source:
            pinning = asyncio.create_task(source.pin(LATEST, HOST))
            await asyncio.to_thread(met.wait, 10)
            async with asyncio.timeout(5):
                await source.close()
        with pytest.raises(ChandleryError):
            await pinning
    assert trees(tmp_path) == []


@needs_root
async def test_a_full_disk_is_told_and_the_last_good_pin_serves(
    server: ChannelServer, tmp_path: Path
) -> None:
    first = server.publish(CHANNEL, "one")
    with small_disk(tmp_path):
        async with opened(server, tmp_path) as source:
            await source.pin(LATEST, HOST)
            second = server.publish(CHANNEL, "two")
            server.tarballs[second] = tarball({**tree_of_shape("two"), "zz": os.urandom(2 << 20)}, second)
            stale = await source.pin(LATEST, HOST)
            assert stale.revision == first
            assert "no space left" in stale.stale
            assert trees(tmp_path) == [first]
        async with opened(server, tmp_path / "new") as source:
            with pytest.raises(StorageFullError):
                await source.pin(LATEST, HOST)


# Where things are


async def test_a_site_without_network_has_files(server: ChannelServer, tmp_path: Path) -> None:
    commit = server.publish(CHANNEL, "one")
    (tmp_path / f"nixpkgs-{commit}.tar.gz").write_bytes(server.tarballs[commit])
    (tmp_path / CHANNEL).write_text(f"{commit}\n")
    server.stop()
    for start in (f"file://{tmp_path}", str(tmp_path)):
        addresses = NixpkgsAddresses.parse(f"{start}/{{channel}}", f"{start}/nixpkgs-{{revision}}.tar.gz")
        async with opened(server, tmp_path / start.partition(":")[0], addresses=addresses) as source:
            assert says(await source.pin(LATEST, HOST)) == "one"
    gone = NixpkgsAddresses.parse(f"{tmp_path}/{{channel}}", f"{tmp_path}/gone/{{revision}}")
    async with opened(server, tmp_path / "other", addresses=gone) as source:
        with pytest.raises(SourceUnavailableError, match=f"{tmp_path}/gone/{commit}: No such file"):
            await source.pin(LATEST, HOST)


async def test_credentials_work_and_are_nowhere_to_be_seen(
    server: ChannelServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    server.publish(CHANNEL, "one")
    server.credentials = "Basic b3VyczpzM2NyZXQ="
    addresses = NixpkgsAddresses.parse(
        server.channel_template, server.tarball_template.replace("http://", "http://ours:s3cret@")
    )
    with structlog.testing.capture_logs() as logged:
        async with opened(server, tmp_path, addresses=addresses) as source:
            pin = await source.pin(LATEST, HOST)
            server.publish(CHANNEL, "two")
            server.credentials = "another"
            stale = await source.pin(LATEST, HOST)
    assert "401" in stale.stale
    seen = repr((pin, stale, logged, caplog.records, [each.getMessage() for each in caplog.records]))
    seen += "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert "s3cret" not in seen
    assert [each for each in logged if each["event"] == "nixpkgs fetched"]


@pytest.mark.parametrize(
    ("channel", "tarball", "reason"),
    [
        ("https://host/git-revision", "https://host/{revision}", "nixpkgs_channel_url has no {channel}"),
        ("https://host/{channel}", "https://host/tarball", "nixpkgs_tarball_url has no {revision}"),
        ("host/{channel}", "https://host/{revision}", "nixpkgs_channel_url is no address: write https://"),
        (
            "https://host/{channel}",
            "ftp://host/{revision}",
            "nixpkgs_tarball_url is no address: write https://",
        ),
    ],
)
def test_a_template_that_can_not_work_is_told_by_its_name(channel: str, tarball: str, reason: str) -> None:
    with pytest.raises(SettingsError) as caught:
        NixpkgsAddresses.parse(channel, tarball)
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize("location", ["NixOS", "nixos unstable", "../nixos", "https://host/x", "a/b"])
def test_what_is_neither_a_channel_nor_a_commit_is_no_source(tmp_path: Path, location: str) -> None:
    with pytest.raises(InvalidSourceError, match="neither a channel, such as nixos-unstable, nor a commit"):
        parse(f"nixpkgs!{location}", tmp_path, DebianMirrors())


async def test_the_factory_makes_one_with_the_operators_choices(
    server: ChannelServer, tmp_path: Path
) -> None:
    server.publish(CHANNEL, "one")
    server.publish("nixos-24.05", "stable")
    options = SourceOptions(tags=("nixos-*",), config={"allowUnfree": True})
    source = parse(f"nixpkgs!{CHANNEL}", tmp_path, DebianMirrors(), options, nixpkgs=server.addresses)
    try:
        assert source.text == f"nixpkgs!{CHANNEL}"
        assert says(await source.pin(LATEST, HOST)) == "one"
        pin = await source.pin("nixos-24.05", HOST)
        assert says(pin) == "stable"
        assert pin.to_nix()["config"] == {"allowUnfree": True}
    finally:
        await source.close()
