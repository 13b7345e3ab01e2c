import asyncio
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from chandlery.errors import (
    InvalidSourceError,
    ReferenceNotFoundError,
    SourceUnavailableError,
    TooManyReferencesError,
)
from chandlery.image.name import LATEST
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.documents import Platform
from chandlery.sources.arguments import SetArguments
from chandlery.sources.debian.index import DebianMirrors
from chandlery.sources.git.address import GitAddress
from chandlery.sources.git.repository import GitLimits
from chandlery.sources.git.source import GitSource
from chandlery.sources.kinds import parse
from chandlery.sources.package_source import SourceOptions
from chandlery.sources.pins import PinLimits
from tests.support.git_server import Fault, HttpServer, Repository, http_server, silent_server, ssh_server
from tests.support.processes import running

HOST = Platform.of_host()
PASSWORD = "s3cret"  # noqa: S105
LIVES_LONG = PinLimits(lifetime=1e9, patience=2.0, back_off=0.0)
LOOKS_EACH_TIME = PinLimits(lifetime=0.0, patience=20.0, back_off=0.0)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An operator without any configuration, whatever is on this machine."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / ".config"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for name in ("GIT_SSH_COMMAND", "GIT_ASKPASS", "SSH_AUTH_SOCK"):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture
def served(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    folder.mkdir()
    return folder


@pytest.fixture
def repository(served: Path) -> Repository:
    repository = Repository(served / "set.git")
    repository.commit({"default.nix": "1"})
    return repository


@pytest.fixture
def server(served: Path, repository: Repository) -> Iterator[HttpServer]:
    with http_server(served) as server:
        yield server


def a_source(
    tmp_path: Path,
    address: str,
    reference: str = "main",
    tags: tuple[str, ...] | None = None,
    limits: PinLimits = LOOKS_EACH_TIME,
    git_limits: GitLimits | None = None,
    fresh: float = 0.0,
) -> GitSource:
    arguments = SetArguments(tmp_path / "data/overlays")
    data = tmp_path / "data/git"
    parsed = GitAddress.parse(address)
    return GitSource(parsed, reference, data, arguments, tags, limits, git_limits, fresh)


def content(pinned: PinnedSource, file: str = "default.nix") -> str:
    return (Path(pinned.to_nix()["tree"]) / file).read_text()


async def not_found(source: GitSource, reference: str, reason: str | None = None) -> None:
    with pytest.raises(ReferenceNotFoundError, match=reason):
        await source.pin(reference, HOST)


# Every protocol


@pytest.fixture(params=["http", "http without protocol 2", "dumb http", "ssh", "file", "path"])
def address(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    served: Path,
    repository: Repository,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    match request.param:
        case "ssh":
            with ssh_server(tmp_path / "ssh") as ssh:
                monkeypatch.setenv("GIT_SSH_COMMAND", ssh.command)
                yield ssh.url(repository.folder)
        case "file":
            yield f"file://{repository.folder}"
        case "path":
            yield str(repository.folder)
        case kind:
            with http_server(served, protocol_2=kind == "http", dumb=kind == "dumb http") as server:
                yield server.url("set.git")


async def test_a_branch_is_pinned_over_every_protocol_and_followed_as_it_moves(
    tmp_path: Path, repository: Repository, address: str
) -> None:
    source = a_source(tmp_path, address)
    pinned = []
    for number in range(3):
        commit = repository.commit({"default.nix": str(number), "pkgs/a.nix": "same"})
        repository.tag(f"v{number}", commit, annotated=True)
        repository.prepare_for_dumb_servers()
        latest = await source.pin(LATEST, HOST)
        assert latest == PinnedSource("git", address, commit)
        assert content(latest) == str(number)
        assert (await source.pin(f"v{number}", HOST)).revision == commit
        pinned.append(latest)

    # Earlier revisions stay what they are, also for the next server.
    for each in pinned:
        assert await a_source(tmp_path, address).pin(each.tag, HOST) == each
        assert await source.at(each.revision, HOST) == each
    assert [content(each) for each in pinned] == ["0", "1", "2"]


async def test_a_commit_that_no_reference_has_is_fetched_over_every_protocol(
    tmp_path: Path, repository: Repository, address: str
) -> None:
    old = repository.commit({"default.nix": "old"})
    repository.commit({"default.nix": "new"})
    repository.prepare_for_dumb_servers()
    source = a_source(tmp_path, address)
    assert content(await source.pin(LATEST, HOST)) == "new"

    assert content(await source.pin(old, HOST)) == "old"
    assert (await source.pin(old[:16], HOST)).revision == old
    await not_found(source, "0" * 40, "has no such commit")


async def test_without_a_reference_latest_is_the_remotes_head(tmp_path: Path, repository: Repository) -> None:
    repository.commit({"default.nix": "other"}, branch="other")
    repository._git("--git-dir", str(repository.folder), "symbolic-ref", "HEAD", "refs/heads/other")

    assert content(await a_source(tmp_path, str(repository.folder), "").pin(LATEST, HOST)) == "other"


async def test_a_repository_with_sha256_ids_works_as_well(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "sha256.git", kind="sha256")
    commit = repository.commit({"default.nix": "256"})

    pinned = await a_source(tmp_path, str(repository.folder)).pin(LATEST, HOST)

    assert len(commit) == 64
    assert pinned.revision == commit
    assert content(pinned) == "256"


async def test_a_commit_can_be_what_latest_means(tmp_path: Path, repository: Repository) -> None:
    old = repository.commit({"default.nix": "old"})
    repository.commit({"default.nix": "new"})
    source = a_source(tmp_path, str(repository.folder), old)

    await source.refresh(0)
    assert content(await source.pin(LATEST, HOST)) == "old"


# What a tag means


async def test_a_tag_is_a_tag_before_it_is_a_branch(tmp_path: Path, repository: Repository) -> None:
    first = repository.commit({"default.nix": "tagged"})
    repository.tag("both", first)
    repository.commit({"default.nix": "branched"}, branch="both")
    source = a_source(tmp_path, str(repository.folder))

    assert content(await source.pin("both", HOST)) == "tagged"
    repository.delete("refs/tags/both")
    assert content(await source.pin("both", HOST)) == "branched"


async def test_what_a_tag_cannot_hold_is_written_as_a_hyphen_where_only_one_name_fits(
    tmp_path: Path, repository: Repository
) -> None:
    repository.commit({"default.nix": "slash"}, branch="feature/x")
    source = a_source(tmp_path, str(repository.folder))
    assert content(await source.pin("feature-x", HOST)) == "slash"

    repository.commit({"default.nix": "plus"}, branch="feature+x")
    await not_found(source, "feature-x", r"any of feature\+x, feature/x; name one by its revision")

    repository.commit({"default.nix": "exact"}, branch="feature-x")
    assert content(await source.pin("feature-x", HOST)) == "exact"


async def test_the_tag_of_a_revision_means_it_whatever_branches_are_called(
    tmp_path: Path, repository: Repository
) -> None:
    source = a_source(tmp_path, str(repository.folder))
    pinned = await source.pin(LATEST, HOST)
    repository.commit({"default.nix": "an impostor"}, branch=pinned.tag)
    repository.commit({"default.nix": "short"}, branch=pinned.revision[:7])

    assert await source.pin(pinned.tag, HOST) == pinned
    assert content(await source.pin(pinned.revision[:7], HOST)) == "short"
    assert await source.pin(pinned.revision[:8], HOST) == pinned


async def test_a_branch_that_is_deleted_is_not_found_and_its_revision_keeps_its_tag(
    tmp_path: Path, repository: Repository
) -> None:
    repository.commit({"default.nix": "gone"}, branch="gone")
    source = a_source(tmp_path, str(repository.folder))
    pinned = await source.pin("gone", HOST)
    repository.delete("refs/heads/gone")

    await not_found(source, "gone", "'latest' .main., the branches and tags of the repository, and revisions")
    assert await source.pin(pinned.tag, HOST) == pinned


async def test_a_branch_that_was_rewritten_is_followed(tmp_path: Path, repository: Repository) -> None:
    source = a_source(tmp_path, str(repository.folder))
    await source.pin(LATEST, HOST)
    repository._work("checkout", "--quiet", "--orphan", "anew")
    (repository.work / "default.nix").write_text("rewritten")
    repository.commit_all("main")

    assert content(await source.pin(LATEST, HOST)) == "rewritten"


async def test_the_operator_says_which_references_tags_may_choose(
    tmp_path: Path, repository: Repository
) -> None:
    commits = {
        branch: repository.commit({"default.nix": branch}, branch=branch)
        for branch in ("v1", "release/2", "secret")
    }
    address = str(repository.folder)
    source = a_source(tmp_path, address, tags=("v*", "release/*"))

    for tag, wanted in (("v1", "v1"), ("release-2", "release/2"), (LATEST, "1"), ("main", "1")):
        assert content(await source.pin(tag, HOST)) == wanted
    assert (await source.pin(commits["v1"], HOST)).revision == commits["v1"]
    for tag in ("secret", commits["secret"], "unknown"):
        await not_found(source, tag, r"'latest' .main., what is like v\*, what is like release/\*, and revis")

    # What was pinned before the operator took it back has its revision's tag only.
    everything = a_source(tmp_path, address)
    secret = await everything.pin("secret", HOST)
    await not_found(a_source(tmp_path, address, tags=("v*",)), "secret")
    assert await a_source(tmp_path, address, tags=("v*",)).pin(secret.tag, HOST) == secret


HOSTILE = [
    *("--upload-pack=touch /tmp/owned", "-x", "--help", "main:refs/heads/x", "+main", "main..other", "a^{}"),
    *("refs/heads/main", "HEAD^", "main~1", "@{u}", "*", "../main", "", "main\n", ":/1", "config", "\x00"),
]


@pytest.mark.parametrize("reference", HOSTILE)
async def test_what_a_client_writes_never_means_something_to_git(
    tmp_path: Path, repository: Repository, reference: str
) -> None:
    source = a_source(tmp_path, str(repository.folder))
    if reference == "refs/heads/main":
        assert (await source.pin(reference, HOST)).revision
    else:
        await not_found(source, reference)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text("0123456789abcdef-+:^~/.@{} \nHEADmain", max_size=45))
async def test_whatever_a_client_writes_is_looked_up_or_not_found(
    tmp_path: Path, repository: Repository, reference: str
) -> None:
    source = a_source(tmp_path, str(repository.folder), fresh=1e9)
    try:
        pinned = await source.pin(reference, HOST)
    except (ReferenceNotFoundError, TooManyReferencesError):
        return
    assert pinned.revision == (await source.pin(LATEST, HOST)).revision


@pytest.mark.parametrize("reference", ["--upload-pack=x", "a b", "a:b", "a..b", "a^b", "a*", "a\\b", "a//b"])
def test_a_configured_reference_that_git_would_not_take_is_refused(tmp_path: Path, reference: str) -> None:
    with pytest.raises(InvalidSourceError, match="is no branch, tag or revision"):
        parse(f"git!https://example.com/set!{reference}", tmp_path, DebianMirrors())


def test_a_source_is_read_from_its_text_and_tells_no_password(tmp_path: Path) -> None:
    for text, location, shown in (
        ("git!https://me:secret@example.com/set!release/1", "https://example.com/set", "!release/1"),
        ("git!git@example.com:team/set", "git@example.com:team/set", ""),
        ("git!git@example.com:team/set!", "git@example.com:team/set", ""),
        ("git!/srv/set.git!v1", "/srv/set.git", "!v1"),
    ):
        source = parse(text, tmp_path, DebianMirrors(), SourceOptions())
        assert (source.kind, source.location, source.text) == ("git", location, f"git!{location}{shown}")
        assert source.platforms == (HOST,)
    with pytest.raises(InvalidSourceError, match="git takes https://host/path") as caught:
        parse("git!https://me:secret@/set!main", tmp_path, DebianMirrors())
    assert "secret" not in str(caught.value)


# What a tree holds


async def test_a_tree_holds_what_the_commit_does_whatever_attributes_and_configuration_say(
    tmp_path: Path, repository: Repository, home: Path
) -> None:
    (home / ".gitconfig").write_text(
        f'[filter "lfs"]\n\tsmudge = touch {tmp_path}/owned; cat\n\trequired = true\n'
        f"[core]\n\thooksPath = {tmp_path}/hooks\n\tautocrlf = true\n\tsymlinks = false\n"
    )
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks/post-checkout").write_text(f"#!/bin/sh\ntouch {tmp_path}/owned\n")
    (tmp_path / "hooks/post-checkout").chmod(0o755)
    work = repository.work
    (work / ".gitattributes").write_text(
        "*.bin filter=lfs\n*.txt text eol=crlf\n*.id ident\nhidden export-ignore\nsubst export-subst\n"
        "*.utf16 text working-tree-encoding=UTF-16\n"
    )
    files = {
        "a.bin": "version https://git-lfs.github.com/spec/v1\n",
        "a.txt": "one\ntwo\n",
        "a.id": "$Id$\n",
        "hidden": "here\n",
        "subst": "$Format:%H$\n",
        "a.utf16": "plain\n",
        "pkgs/deep/er.nix": "{ }\n",
    }
    # Written by git's plumbing: git add would convert them.
    for name, text in files.items():
        blob = repository.keep_object(text)
        repository._work("update-index", "--add", "--cacheinfo", f"100644,{blob},{name}")
    script = repository._work("rev-parse", "HEAD:default.nix")
    repository._work("update-index", "--add", "--cacheinfo", f"100755,{script},run")
    for name, target in (("link", "default.nix"), ("out", "/etc/passwd"), ("dangling", "../nowhere")):
        (work / name).symlink_to(target)
        repository._work("add", name)
    repository._work("add", ".gitattributes")
    commit = repository._work("rev-parse", "HEAD")
    repository._work("update-index", "--add", "--cacheinfo", f"160000,{commit},submodule")
    repository._work("commit", "--quiet", "--message", "all kinds")
    repository._work("push", "--quiet", str(repository.folder), "HEAD:refs/heads/main")

    pinned = await a_source(tmp_path, str(repository.folder)).pin(LATEST, HOST)
    tree = Path(pinned.to_nix()["tree"])

    assert {name: (tree / name).read_bytes() for name in files} == {
        name: text.encode() for name, text in files.items()
    }
    assert (tree / "link").readlink() == Path("default.nix")
    assert (tree / "out").readlink() == Path("/etc/passwd")
    assert (tree / "dangling").readlink() == Path("../nowhere")
    assert stat.S_IMODE((tree / "run").stat().st_mode) & 0o111
    assert not os.listdir(tree / "submodule")
    assert not (tree / ".git").exists()
    assert not (tmp_path / "owned").exists()
    assert tree.name == "source"


# Credentials


async def test_credentials_come_from_the_operators_own_places(
    tmp_path: Path, repository: Repository, served: Path, home: Path
) -> None:
    with http_server(served, password=PASSWORD) as server:
        address = server.url("set.git")
        with pytest.raises(
            SourceUnavailableError, match=r"could not read Username|unable to get password from user"
        ):
            await a_source(tmp_path, address).pin(LATEST, HOST)

        (home / ".netrc").write_text(f"machine 127.0.0.1 login git password {PASSWORD}\n")
        assert (await a_source(tmp_path, address).pin(LATEST, HOST)).location == address
        (home / ".netrc").unlink()

        (home / "credentials").write_text(f"{server.url('', 'git:s3cret@')}\n")
        (home / ".gitconfig").write_text(f"[credential]\n\thelper = store --file {home}/credentials\n")
        commit = repository.commit({"default.nix": "helper"})
        assert (await a_source(tmp_path, address).pin(LATEST, HOST)).revision == commit


async def test_credentials_of_an_address_are_used_and_told_to_nobody(
    tmp_path: Path, repository: Repository, served: Path, home: Path
) -> None:
    with http_server(served, password=PASSWORD) as server:
        (home / ".gitconfig").write_text(
            "[credential]\n\thelper = !echo username=git; echo password=wrong; #\n"
        )
        source = a_source(tmp_path, server.url("set.git", "git:s3cret@"))
        pinned = await source.pin(LATEST, HOST)
        told = f"{pinned} {source.text} {source.location}"

        with pytest.raises(SourceUnavailableError) as caught:
            await a_source(tmp_path / "other", server.url("set.git", "git:wr0ng@")).pin(LATEST, HOST)

        assert "s3cret" not in told
        assert "wr0ng" not in str(caught.value)
        assert "Authentication failed" in str(caught.value)
        kept = [file for file in (tmp_path / "data").rglob("*") if file.is_file()]
        assert kept
        assert not any(b"s3cret" in file.read_bytes() for file in kept)


async def test_a_key_that_the_ssh_server_does_not_take_is_told_and_nobody_is_asked(
    tmp_path: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ssh_server(tmp_path / "ssh") as ssh:
        (tmp_path / "ssh/authorized_keys").write_text("")
        monkeypatch.setenv("GIT_SSH_COMMAND", ssh.command)
        with pytest.raises(SourceUnavailableError, match="Permission denied"):
            await a_source(tmp_path, ssh.url(repository.folder)).pin(LATEST, HOST)


async def test_a_ssh_server_that_nobody_knows_is_not_trusted(
    tmp_path: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ssh_server(tmp_path / "ssh") as ssh:
        (tmp_path / "ssh/known_hosts").write_text("")
        monkeypatch.setenv("GIT_SSH_COMMAND", ssh.command)
        with pytest.raises(SourceUnavailableError, match="Host key verification failed"):
            await a_source(tmp_path, ssh.url(repository.folder)).pin(LATEST, HOST)


async def test_the_ssh_command_of_the_operators_git_configuration_counts(
    tmp_path: Path, repository: Repository, home: Path
) -> None:
    with ssh_server(tmp_path / "ssh") as ssh:
        (home / ".gitconfig").write_text(f'[core]\n\tsshCommand = "{ssh.command}"\n')
        short = f"{ssh.url(repository.folder).removeprefix('ssh://').partition(':')[0]}:{repository.folder}"
        with (tmp_path / "ssh/ssh_config").open("a") as config:
            config.write(f"Port {ssh.port}\n")

        assert (await a_source(tmp_path, short).pin(LATEST, HOST)).location == short


# Upstream in trouble


async def test_a_dead_server_leaves_what_was_pinned_and_its_recovery_is_seen(
    tmp_path: Path, repository: Repository, served: Path
) -> None:
    with http_server(served) as server:
        address = server.url("set.git")
        pinned = await a_source(tmp_path, address).pin(LATEST, HOST)
        server.stop()

    # A server that is started meanwhile serves it, too.
    source = a_source(tmp_path, address)
    with capture_logs() as logs:
        for _ in range(3):
            stale = await source.pin(LATEST, HOST)
            assert stale == pinned
            assert re.search("Connection refused|Could(n't| not) connect", stale.stale)
    assert [each["log_level"] for each in logs] == ["warning"]
    assert content(stale) == "1"
    assert await source.pin(pinned.tag, HOST) == pinned
    with pytest.raises(SourceUnavailableError):
        await source.pin("v1", HOST)


async def test_a_killed_ssh_server_leaves_what_was_pinned(
    tmp_path: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ssh_server(tmp_path / "ssh") as ssh:
        monkeypatch.setenv("GIT_SSH_COMMAND", ssh.command)
        source = a_source(tmp_path, ssh.url(repository.folder))
        pinned = await source.pin(LATEST, HOST)
        ssh.stop()
        stale = await source.pin(LATEST, HOST)
        assert (stale, "Connection refused" in stale.stale) == (pinned, True)

        commit = repository.commit({"default.nix": "2"})
        ssh.start()
        assert (await source.pin(LATEST, HOST)).revision == commit


async def test_a_repository_that_is_gone_leaves_what_was_pinned(
    tmp_path: Path, repository: Repository
) -> None:
    source = a_source(tmp_path, str(repository.folder))
    pinned = await source.pin(LATEST, HOST)
    repository.folder.rename(repository.folder.with_name("moved"))

    stale = await source.pin(LATEST, HOST)

    assert stale == pinned
    assert "does not appear to be a git repository" in stale.stale


async def test_a_server_that_says_nothing_is_left_and_no_git_stays_behind(
    tmp_path: Path, repository: Repository, server: HttpServer
) -> None:
    address = server.url("set.git")
    limits = PinLimits(lifetime=0.0, patience=0.05, back_off=60.0)
    pinned = await a_source(tmp_path, address).pin(LATEST, HOST)
    server.fault = Fault.SILENCE
    source = a_source(tmp_path, address, limits=limits, git_limits=GitLimits(silence=0.5))

    stale = await source.pin(LATEST, HOST)

    assert stale == pinned
    assert "it has not answered within 0.05 s" in stale.stale
    await asyncio.wait([each.task for each in source._pins._attempts.values()])
    assert "the server said nothing" in (await source.pin(LATEST, HOST)).stale
    assert not running(address)


async def test_one_who_takes_connections_and_says_nothing_is_told(tmp_path: Path) -> None:
    with silent_server() as port:
        for address in (f"http://127.0.0.1:{port}/set", f"git://127.0.0.1:{port}/set"):
            source = a_source(tmp_path, address, git_limits=GitLimits(silence=0.3))
            with pytest.raises(
                SourceUnavailableError, match="git ls-remote took too long, or the server said"
            ):
                await source.pin(LATEST, HOST)
            assert not running(address)


async def test_a_transfer_that_stalls_is_left_and_leaves_nothing_half_made(
    tmp_path: Path, repository: Repository, server: HttpServer
) -> None:
    source = a_source(tmp_path, server.url("set.git"), git_limits=GitLimits(silence=0.5))
    server.fault = Fault.STALL
    with pytest.raises(SourceUnavailableError, match="git fetch took too long, or the server said nothing"):
        await source.pin(LATEST, HOST)
    assert server.met.is_set()
    assert not running(server.url("set.git"))

    server.fault = None
    assert content(await source.pin(LATEST, HOST)) == "1"


@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.NOT_FOUND, Fault.ERROR])
async def test_a_server_that_errs_has_not_said_that_a_branch_is_gone(
    tmp_path: Path, repository: Repository, server: HttpServer, fault: Fault
) -> None:
    source = a_source(tmp_path, server.url("set.git"))
    pinned = await source.pin(LATEST, HOST)
    server.fault = fault

    assert (await source.pin(LATEST, HOST)).stale
    with pytest.raises(SourceUnavailableError):
        await source.pin("other", HOST)
    server.fault = None
    assert await source.pin(LATEST, HOST) == pinned


async def test_closing_stops_git(tmp_path: Path, repository: Repository, server: HttpServer) -> None:
    server.fault = Fault.SILENCE
    source = a_source(tmp_path, server.url("set.git"))
    waiting = asyncio.create_task(source.pin(LATEST, HOST))
    await asyncio.to_thread(server.met.wait)
    await source.close()

    with pytest.raises(SourceUnavailableError, match="being stopped"):
        await waiting
    assert not running(server.url("set.git"))


# How often upstream is asked


async def test_a_pin_is_used_for_its_lifetime_and_renewed_in_the_background(
    tmp_path: Path, repository: Repository, server: HttpServer
) -> None:
    source = a_source(tmp_path, server.url("set.git"), limits=LIVES_LONG)
    await source.refresh(3600)
    asked = len(server.requests)
    first = [await source.pin(LATEST, HOST) for _ in range(10)]
    assert len(server.requests) == asked

    commit = repository.commit({"default.nix": "2"})
    await source.refresh(3600)
    assert await source.pin(LATEST, HOST) == first[0]
    await source.refresh(0)
    assert (await source.pin(LATEST, HOST)).revision == commit


async def test_a_pin_is_as_old_as_the_list_that_it_comes_from(tmp_path: Path, repository: Repository) -> None:
    source = a_source(tmp_path, str(repository.folder), fresh=3600)
    ages = []
    for _ in range(2):
        await source.pin(LATEST, HOST)
        pin = await source._pins.last("main")
        assert pin is not None
        ages.append(pin.resolved)

    assert ages[1] == pytest.approx(ages[0], abs=0.005)


async def test_unknown_tags_are_not_asked_for_one_by_one(
    tmp_path: Path, repository: Repository, server: HttpServer
) -> None:
    source = a_source(tmp_path, server.url("set.git"), fresh=3600)
    for number in range(50):
        await not_found(source, f"unknown-{number}")
    assert server.listings() <= 13
    server.stop()
    other = a_source(tmp_path / "other", server.url("set.git"), fresh=3600)
    for number in range(50):
        with pytest.raises(SourceUnavailableError):
            await other.pin(f"unknown-{number}", HOST)


async def test_what_was_pushed_a_moment_ago_is_found(
    tmp_path: Path, repository: Repository, server: HttpServer
) -> None:
    source = a_source(tmp_path, server.url("set.git"), fresh=3600)
    await not_found(source, "new")
    repository.commit({"default.nix": "new"}, branch="new")

    assert content(await source.pin("new", HOST)) == "new"


async def test_unknown_commits_are_asked_for_rarely(
    tmp_path: Path, repository: Repository, server: HttpServer
) -> None:
    source = a_source(tmp_path, server.url("set.git"), fresh=3600)
    await not_found(source, f"{1:040x}")
    asked = len(server.requests)
    await not_found(source, f"{1:040x}")
    assert len(server.requests) == asked

    refused = 0
    for number in range(2, 60):
        try:
            await source.pin(f"{number:040x}", HOST)
        except TooManyReferencesError:
            refused += 1
        except ReferenceNotFoundError:
            pass
    assert refused > 20
    # Who asks for what there is isn't refused.
    assert await source.pin(LATEST, HOST)


async def test_only_what_is_new_is_transferred(
    tmp_path: Path, repository: Repository, server: HttpServer
) -> None:
    big = os.urandom(300_000).hex()
    repository.commit({"big": big})
    source = a_source(tmp_path, server.url("set.git"))
    await source.pin(LATEST, HOST)

    def size() -> int:
        packs = (tmp_path / "data/git/repository-40/objects").rglob("*")
        return sum(file.stat().st_size for file in packs if file.is_file())

    before = size()
    repository.commit({"default.nix": "2"})
    await source.pin(LATEST, HOST)

    assert before > 300_000
    assert size() - before < 10_000


# A repository in pieces


async def test_a_repository_that_a_crash_left_locked_or_damaged_is_made_anew(
    tmp_path: Path, repository: Repository
) -> None:
    source = a_source(tmp_path, str(repository.folder))
    await source.pin(LATEST, HOST)
    kept = tmp_path / "data/git/repository-40"

    (kept / "shallow.lock").touch()
    commit = repository.commit({"default.nix": "2"})
    assert (await source.pin(LATEST, HOST)).revision == commit

    for pack in kept.glob("objects/pack/*.pack"):
        pack.chmod(0o600)
        pack.write_bytes(pack.read_bytes()[:40])
    for loose in kept.glob("objects/??/*"):
        loose.chmod(0o600)
        loose.write_bytes(b"")
    commit = repository.commit({"default.nix": "3"})
    assert content(await source.pin(LATEST, HOST)) == "3"

    (kept / "HEAD").write_text("")
    commit = repository.commit({"default.nix": "4"})
    assert (await source.pin(LATEST, HOST)).revision == commit


async def test_old_commits_are_let_go_and_new_ones_still_work(tmp_path: Path, repository: Repository) -> None:
    source = a_source(tmp_path, str(repository.folder))
    source._trees._most_in_use = 10**6
    for number in range(40):
        repository.commit({"default.nix": str(number)})
        assert content(await source.pin(LATEST, HOST)) == str(number)

    kept = tmp_path / "data/git/repository-40"
    assert len(list(kept.glob("objects/pack/*.pack"))) < 31
    assert len(list(kept.glob("refs/chandlery/*"))) < 40


async def test_two_servers_that_share_a_data_folder_do_not_get_in_each_others_way(
    tmp_path: Path, repository: Repository, server: HttpServer
) -> None:
    script = (
        "import asyncio, sys; from pathlib import Path\n"
        "from chandlery.sources.kinds import parse\n"
        "from chandlery.sources.debian.index import DebianMirrors\n"
        "from chandlery.oci.documents import Platform\n"
        "source = parse(sys.argv[1], Path(sys.argv[2]), DebianMirrors('', '', ''))\n"
        "print(asyncio.run(source.pin('latest', Platform.of_host())).revision)"
    )
    argv = [sys.executable, "-c", script, f"git!{server.url('set.git')}!main", str(tmp_path / "data")]
    processes = [
        await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE) for _ in range(4)
    ]
    printed = await asyncio.gather(*(each.communicate() for each in processes))

    assert {output for output, _ in printed} == {f"{repository._work('rev-parse', 'HEAD')}\n".encode()}


# ssh is stopped with git


async def test_a_silent_ssh_server_is_left_and_no_ssh_stays_behind(tmp_path: Path) -> None:
    with silent_server() as port:
        source = a_source(tmp_path, f"ssh://git@127.0.0.1:{port}/set", git_limits=GitLimits(silence=0.5))
        with pytest.raises(SourceUnavailableError, match="the server said nothing"):
            await source.pin(LATEST, HOST)
        assert not running(f"-p {port}")
