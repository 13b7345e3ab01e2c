"""Flakes: fetched once with all that they need, and then evaluated although all of that is gone."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from chandlery.errors import NixError
from chandlery.nix.configuration import host_paths
from chandlery.nix.nix import LockedFlake, Nix, NixLimits, NixOptions
from chandlery.nix.pinned_source import PinnedSource
from tests.support.flakes import lock
from tests.support.nix_package_set import NIXPKGS_SHAPE, SYSTEM, requires_nix

pytestmark = requires_nix

LIB64 = '[ "/lib64" ]' if os.path.lexists("/lib64") else "[ ]"
DERIVATION = f"""name: derivation {{
  inherit name; system = builtins.currentSystem or "{SYSTEM}"; builder = "/bin/bash";
  args = [ "-c" "echo ${{name}} > $out" ];
  __impureHostDeps = [ "/bin" "/usr" "/lib" ] ++ {LIB64};
}}"""

FLAKE = """
{
  inputs.library.url = "git+file://%(folder)s/library";
  outputs = { self, library }:
    let make = %(derivation)s; in {
      packages.%(system)s = {
        app = make "app-${library.version}";
        versioned = make "revision-${self.rev or "none"}";
        both = make "of-packages";
        generated = import (make "1");
        passwd = throw (builtins.readFile /etc/passwd);
        secret = throw (builtins.readFile %(folder)s/secret);
        environment = make "home-${builtins.getEnv "HOME"}-";
        path = { type = "path"; path = "%(folder)s"; };
        tree = throw (builtins.readFile (builtins.fetchTree self.packages.%(system)s.path + "/secret"));
        fetched = throw (builtins.readFile (builtins.fetchurl "file://%(folder)s/secret"));
        cloned = throw (builtins.readFile (builtins.fetchGit "%(folder)s/library" + "/flake.nix"));
        throws = throw "it was thrown";
        unlocked = (builtins.getFlake "path:%(folder)s/library").x;
      };
      legacyPackages.%(system)s = { both = make "of-legacyPackages"; within.Deep = make "deep"; };
      defaultPackage.%(system)s = make "default";
    };
}
"""
LIBRARY = "{ outputs = { self }: { version = builtins.readFile ./version; }; }"


def git(folder: Path, *arguments: str) -> str:
    author = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "init.defaultBranch=master")
    done = subprocess.run(
        ["git", *author, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def commit(folder: Path, **files: str) -> str:
    """Commit files to a repository, which is made where there is none; give the revision."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content)
    if not (folder / ".git").exists():
        git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "x")
    git(folder, "update-server-info")  # for plain HTTP
    return git(folder, "rev-parse", "HEAD")


@contextmanager
def over_http(folder: Path) -> Iterator[str]:
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    """Make a flake in a git repository, which needs one in another."""
    folder = tmp_path / "upstream"
    folder.mkdir()
    (folder / "secret").write_text("the operator's secret")
    commit(folder / "library", flake_nix=LIBRARY, version="1.5")
    flake = FLAKE % {"folder": folder, "system": SYSTEM, "derivation": DERIVATION}
    commit(folder / "main", flake_nix=flake)
    lock(folder / "main")
    commit(folder / "main")
    return folder


@pytest.fixture
def nix(tmp_path: Path) -> Nix:
    return Nix(
        tmp_path / "store",
        NixLimits(evaluation_memory=1 << 30),
        NixOptions(substituters=(), host_paths=tuple(host_paths())),
    )


def source(flake: LockedFlake) -> PinnedSource:
    return PinnedSource("flake", flake.location, flake.revision, nix={"flake": flake.reference})


async def names_of(nix: Nix, pin: PinnedSource, *attribute_paths: str) -> dict[str, str]:
    answers = await nix.resolve(pin, SYSTEM, attribute_paths)
    return {path: answer.name or answer.status for path, answer in answers.items()}


ADDRESSES: dict[str, Callable[[Path, str], str]] = {
    "path": lambda folder, host: f"path:{folder}/main",
    "git+file": lambda folder, host: f"git+file://{folder}/main",
    "git+http": lambda folder, host: f"git+http://{host}/main/.git",
}


@pytest.mark.parametrize("kind", ADDRESSES)
async def test_a_flake_is_evaluated_although_all_that_it_came_from_is_gone(
    nix: Nix, upstream: Path, tmp_path: Path, kind: str
) -> None:
    revision = git(upstream / "main", "rev-parse", "HEAD")
    with over_http(upstream) as host:
        flake = await nix.flake_metadata(ADDRESSES[kind](upstream, host))
        archived = await nix.flake_archive(flake, tmp_path / "roots")
    pin = source(flake)
    upstream.rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "store/cache")
    await nix.collect_garbage(1 << 60)

    found = await names_of(
        nix, pin, "app", "versioned", "both", "within.deep", "WITHIN.Deep", "generated", "nope"
    )

    assert found == {
        "app": "app-1.5",
        "versioned": "revision-none" if kind == "path" else f"revision-{revision}",
        "both": "of-packages",
        "within.deep": "deep",
        "WITHIN.Deep": "deep",
        "generated": "not_a_package",
        "nope": "not_found",
    }
    assert len(archived) == 2
    if kind != "path":
        assert flake.revision == revision
        assert flake.last_modified == int(git(tmp_path / "gone/main", "log", "-1", "--format=%ct"))
    app = (await nix.resolve(pin, SYSTEM, ["app"]))["app"]
    await nix.realise([app.derivation], tmp_path / "built", tmp_path / "log")
    assert (nix.store_root / app.store_path.base_name).read_text() == "app-1.5\n"


async def test_names_are_those_of_packages_and_legacy_packages(
    nix: Nix, upstream: Path, tmp_path: Path
) -> None:
    flake = await nix.flake_metadata(f"git+file://{upstream}/main")
    await nix.flake_archive(flake, tmp_path / "roots")

    assert {"app", "both", "within"} <= set(await nix.attribute_names(source(flake), SYSTEM, []))
    assert await nix.attribute_names(source(flake), SYSTEM, ["within"]) == ["Deep"]
    assert await nix.attribute_names(source(flake), SYSTEM, ["app"]) == ["out"]
    assert await nix.attribute_names(source(flake), "aarch64-darwin", []) == []
    assert (await nix.resolve(source(flake), "aarch64-darwin", ["app"]))["app"].status == "not_found"


async def test_a_flake_reads_nothing_but_itself(nix: Nix, upstream: Path, tmp_path: Path) -> None:
    flake = await nix.flake_metadata(f"git+file://{upstream}/main")
    await nix.flake_archive(flake, tmp_path / "roots")
    attempts = ["passwd", "secret", "tree", "fetched", "cloned", "unlocked"]

    answers = await nix.resolve(source(flake), SYSTEM, [*attempts, "environment", "throws"])

    for attempt in attempts:
        assert answers[attempt].status == "failed"
        assert "secret" not in answers[attempt].message.replace(str(upstream), "").replace("/secret", "")
        assert any(
            reason in answers[attempt].message
            for reason in ("in pure eval", "in pure evaluation mode", "on unlocked flake reference")
        ), answers[attempt].message
    assert answers["environment"].name == "home--"
    assert answers["throws"].message == "it was thrown"


async def test_a_flake_that_moves_is_another_revision(nix: Nix, upstream: Path, tmp_path: Path) -> None:
    with over_http(upstream) as host:
        before = await nix.flake_metadata(f"git+http://{host}/main/.git")
        assert await nix.flake_metadata(f"git+http://{host}/main/.git") == before
        revision = commit(upstream / "main", other="1")
        after = await nix.flake_metadata(f"git+http://{host}/main/.git")
        pinned = await nix.flake_metadata(f"git+http://{host}/main/.git?rev={before.revision}")

    assert after.revision == revision != before.revision
    assert (pinned.revision, pinned.reference) == (before.revision, before.reference)


async def test_a_folder_is_another_revision_when_its_content_is(nix: Nix, upstream: Path) -> None:
    reference = f"path:{upstream}/main"
    before = await nix.flake_metadata(reference)
    later = time.time() + 60
    os.utime(upstream / "main/flake.nix", (later, later))
    same = await nix.flake_metadata(reference)
    (upstream / "main/more").write_text("")
    after = await nix.flake_metadata(reference)

    # Only the location tells when it was changed.
    assert before == replace(same, location=before.location)
    assert len(before.revision) == len(after.revision) == 64
    assert before.revision != after.revision


async def test_a_flake_that_can_not_be_reached_is_an_error_although_it_was_before(
    nix: Nix, upstream: Path
) -> None:
    with over_http(upstream) as host:
        await nix.flake_metadata(f"git+http://{host}/main/.git")

    with pytest.raises(NixError, match=r"could not reach"):
        await nix.flake_metadata(f"git+http://{host}/main/.git")


async def test_a_flake_whose_inputs_are_not_locked_is_refused(nix: Nix, upstream: Path) -> None:
    (upstream / "main/flake.lock").unlink()
    commit(upstream / "main")

    with pytest.raises(NixError, match="requires lock file changes"):
        await nix.flake_metadata(f"git+file://{upstream}/main")


@pytest.mark.parametrize(
    "reference", ["path:/nonexistent", "git+file:///nonexistent", "no such reference", "-x"]
)
async def test_what_is_no_flake_is_an_error(nix: Nix, reference: str) -> None:
    with pytest.raises(NixError):
        await nix.flake_metadata(reference)


async def test_a_set_of_nixpkgs_shape_is_a_flake_without_a_lock(nix: Nix, tmp_path: Path) -> None:
    flake = await nix.flake_metadata(f"path:{NIXPKGS_SHAPE}")
    assert len(await nix.flake_archive(flake, tmp_path / "roots")) == 1

    assert await names_of(nix, source(flake), "sdl2", "1password", "unrar", "eats") == {
        "sdl2": "SDL2-1.0",
        "1password": "1password-1.0",
        "unrar": "unfree",
        "eats": "memory_limit",
    }
