"""Answers from memory: they are what they would be without it, and as new."""

import asyncio
import shutil
from functools import partial
from pathlib import Path

from chandlery.builds.sqlite.index import SqliteIndex
from chandlery.oci.digest import Digest
from tests.support.package_sets import PACKAGE_SET
from tests.support.servers import RunningServer, serving, wait_until

# The real server


def digest_of(server: RunningServer, reference: str = "latest") -> str:
    response = server.get(f"/v2/hello/manifests/{reference}")
    assert response.status_code == 200, response.text
    assert str(Digest.of(response.content)) == response.headers["docker-content-digest"]
    return str(response.headers["docker-content-digest"])


def test_a_folder_that_changes_is_pulled_as_it_is_then(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(PACKAGE_SET, folder)
    before = (folder / "default.nix").read_text()
    after = before.replace("echo ${name}", "echo another ${name}")
    with serving(tmp_path / "data", f"path!{folder}", tmp_path / "log") as server:
        first = digest_of(server)
        (folder / "default.nix").write_text(after)
        second = digest_of(server)
        assert second != first
        assert digest_of(server) == second
        (folder / "default.nix").write_text(before)
        assert digest_of(server) == first
        assert digest_of(server, first) == first


def is_made_again(server: RunningServer, reference: str, digest: str, builds: int) -> bool:
    assert digest_of(server, reference) == digest
    return server.log.read_text().count("build finished") == builds


def test_an_image_that_another_process_collects_is_made_again_for_who_pulls_it(tmp_path: Path) -> None:
    data, log = tmp_path / "data", tmp_path / "log"
    with serving(data, f"path!{PACKAGE_SET}", log) as server:
        digest = digest_of(server)
        for reference in ("latest", digest):
            builds = log.read_text().count("build finished")
            with SqliteIndex(data) as index:
                (image,) = asyncio.run(index.least_recently_used())
                assert asyncio.run(index.forget_image(image.key, float("inf")))
            for folder in (data / "blobs" / "sha256").iterdir():
                for file in folder.iterdir():
                    file.unlink()
            # For a moment it may be given from memory: whoever gets it so has its blobs made again.
            wait_until(partial(is_made_again, server, reference, digest, builds + 1))
            assert (data / "blobs" / "sha256" / digest[7:9] / digest[7:]).exists()
