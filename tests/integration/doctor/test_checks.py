"""The checks of `chandlery doctor` on machines as they should be, and on others."""

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chandlery.doctor.examination import Outcome, Status
from chandlery.maintenance.run_marker import RunMarker
from chandlery.plan.popularity import Popularity
from tests.support.certificates import make_certificate
from tests.support.debian_packages import Deb
from tests.support.debian_repository import DebianRepository, debian_repository
from tests.support.doctor_checks import outcome
from tests.support.ordinary_user import run_as_ordinary_user
from tests.support.package_sets import SOURCE
from tests.support.servers import free_port

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")


@contextmanager
def mounted(mount_point: Path, *options: str) -> Iterator[None]:
    mount_point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(mount_point)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(mount_point)], check=True)


# data folder


async def test_a_data_folder_that_can_be_written(tmp_path: Path) -> None:
    assert await outcome("data folder", tmp_path) == Outcome(f"{tmp_path} can be written")


async def test_a_data_folder_that_is_not_there_yet_is_not_made(tmp_path: Path) -> None:
    found = await outcome("data folder", tmp_path / "a" / "b")
    assert found == Outcome(f"{tmp_path / 'a' / 'b'} isn't there yet, and can be made")
    assert not list(tmp_path.iterdir())


async def test_a_data_folder_that_a_server_uses(tmp_path: Path) -> None:
    marker = RunMarker(tmp_path)
    marker.begin()
    assert "a server uses it" in (await outcome("data folder", tmp_path)).text
    # Its lock is still its own.
    assert marker.is_held()
    marker.end()
    assert not marker.is_held()


async def test_a_file_where_the_data_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = await outcome("data folder", tmp_path / "file")
    assert found.status == Status.FAILURE
    assert "is no folder" in found.text
    assert "data_dir" in found.remedy


async def test_a_data_folder_that_can_not_be_made() -> None:
    found = await outcome("data folder", Path("/proc/nowhere"))
    assert found.status == Status.FAILURE
    assert "/proc can't be written" in found.text


@needs_root
async def test_a_data_folder_on_a_read_only_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "-o", "ro"):
        found = await outcome("data folder", tmp_path / "disk")
    assert found.status == Status.FAILURE
    assert "Read-only file system" in found.text


EXAMINED = """
import asyncio, sys
from pathlib import Path
from chandlery.doctor.examination import examine
from chandlery.doctor.checks import machine_checks, scratch_folder
from chandlery.settings.settings import Settings
async def main():
    settings = Settings.load(data_dir=Path(sys.argv[1]), source=sys.argv[2])
    with scratch_folder(settings.data_dir) as scratch:
        checks = [each for each in machine_checks(settings, scratch) if each.name in sys.argv[3:]]
        async for each in examine(checks):
            print(each.check, each.outcome.status, each.outcome.text)
asyncio.run(main())
"""


@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_a_data_folder_of_another_user(mode: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        others = Path(temporary)
        others.chmod(mode)
        data = others / "data"
        if mode == 0o755:
            data.mkdir()
        told = run_as_ordinary_user(EXAMINED, str(data), SOURCE, "data folder", "sandbox")
    nearest = data if mode == 0o755 else others
    assert f"data folder failure {nearest} can't be written: Permission denied" in told
    # What else can be checked is, elsewhere.
    assert "sandbox ok" in told


# disk and memory


@needs_root
async def test_a_disk_that_is_nearly_full(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "-o", "size=64m"):
        found = await outcome("disk", tmp_path / "disk")
        assert found.status == Status.FAILURE
        assert "nothing is built" in found.text
        assert "disk_limit" in found.remedy
        found = await outcome("disk", tmp_path / "disk", min_free_disk=0)
        assert found.status == Status.WARNING


@needs_root
async def test_a_disk_with_few_inodes(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "-o", "size=64m,nr_inodes=100"):
        found = await outcome("disk", tmp_path / "disk", min_free_disk=0)
    assert found.status == Status.FAILURE
    assert "more files" in found.text


async def test_a_limit_that_the_disk_can_not_reach(tmp_path: Path) -> None:
    found = await outcome("disk", tmp_path, disk_limit=1 << 60, min_free_disk=0)
    assert found.status == Status.WARNING
    assert "disk_limit is more than it holds" in found.text


async def test_memory_and_processors_are_told(tmp_path: Path) -> None:
    assert "processors" in (await outcome("memory", tmp_path)).text
    found = await outcome("memory", tmp_path, evaluation_memory=1 << 60)
    assert found.status == Status.WARNING


@pytest.mark.parametrize("check", ["nix", "sandbox"])
async def test_no_nix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = await outcome(check, tmp_path)
    assert found.status == Status.FAILURE
    assert "install Nix" in found.text


@pytest.mark.parametrize(
    ("version", "status"), [("2.3.16", Status.FAILURE), ("2.5.1", Status.WARNING), ("2.28.3", Status.OK)]
)
async def test_the_version_of_nix_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, status: Status
) -> None:
    for name in ("nix-store", "nix", "nix-instantiate", "nix-build"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho '{name} (Nix) {version}'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = await outcome("nix", tmp_path)
    assert found.status == status
    assert version in found.text


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[DebianRepository]:
    with debian_repository(tmp_path) as repository:
        repository.publish(Deb("bash"))
        yield repository


def _mirrors(repository: DebianRepository) -> dict[str, Any]:
    mirrors = repository.mirrors
    return {
        "source": "debian!bookworm",
        "debian_mirror": mirrors.main,
        "debian_security_mirror": mirrors.security,
        "debian_keyring": mirrors.keyring,
    }


async def test_a_debian_mirror_that_answers(tmp_path: Path, repository: DebianRepository) -> None:
    found = await outcome("source", tmp_path / "data", **_mirrors(repository))
    assert found.status == Status.OK
    assert found.text.startswith("debian!bookworm is at ")


async def test_a_debian_mirror_that_is_dead(tmp_path: Path) -> None:
    dead = f"http://127.0.0.1:{free_port()}/debian"
    options = {"source": "debian!bookworm", "debian_mirror": dead, "debian_security_mirror": dead}
    found = await outcome("source", tmp_path, **options)
    assert found.status == Status.FAILURE
    assert "debian!bookworm can't be reached" in found.text
    # Without a server there is nothing to compare a clock with, and that is no failure of the clock.
    assert (await outcome("clock", tmp_path, **options)).status == Status.WARNING


# clock


@pytest.mark.parametrize(
    ("offset", "status", "told"),
    [
        (0.0, Status.OK, "as that of 127.0.0.1"),
        (-120.0, Status.WARNING, "behind 127.0.0.1"),
        (86400.0, Status.FAILURE, "s ahead of 127.0.0.1"),
    ],
)
async def test_the_clock_is_compared_with_a_mirror(
    tmp_path: Path, repository: DebianRepository, offset: float, status: Status, told: str
) -> None:
    found = await outcome(
        "clock", tmp_path / "data", clock=lambda: time.time() + offset, **_mirrors(repository)
    )
    assert found.status == status
    assert told in found.text
    assert bool(found.remedy) == (status != Status.OK)


async def test_without_a_server_no_clock_is_compared(tmp_path: Path) -> None:
    assert await outcome("clock", tmp_path) == Outcome("no source has a server to compare it with")


# storage


async def test_the_storage_is_written_and_read(tmp_path: Path) -> None:
    assert (await outcome("storage", tmp_path)).status == Status.OK


async def test_a_bucket_that_can_not_be_reached(tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    options = {"endpoint": endpoint, "access_key_id": "a", "secret_access_key": "hush"}
    found = await outcome("storage", tmp_path, storage="s3://images", storage_options=options)
    assert found.status == Status.FAILURE
    assert "s3://images" in found.text
    assert "hush" not in found.text


async def test_a_table_of_popularity(tmp_path: Path) -> None:
    table, data = tmp_path / "popularity.json", tmp_path / "data"
    missing = await outcome("popularity", data, popularity=str(table))
    assert missing.status == Status.FAILURE
    assert str(table) in missing.text
    table.write_bytes(Popularity({"a": 2, "b": 1}, {"a": "a", "b": "a"}).encode())
    found = await outcome("popularity", data, popularity=str(table))
    assert found == Outcome("the table knows 2 packages, and 1 groups")


# address, access and TLS


async def test_an_address_that_is_free(tmp_path: Path) -> None:
    port = free_port()
    assert await outcome("address", tmp_path, port=port) == Outcome(f"127.0.0.1 port {port} is free")


async def test_a_port_that_another_program_has(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        # It takes a connection and says nothing.
        found = await outcome("address", tmp_path, port=port, host="127.0.0.1")
    assert found.status == Status.FAILURE
    assert "Address already in use" in found.text


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid"])
async def test_an_address_that_this_machine_does_not_have(tmp_path: Path, host: str) -> None:
    found = await outcome("address", tmp_path, host=host)
    assert found.status == Status.FAILURE
    assert host in found.text


async def test_who_may_pull(tmp_path: Path) -> None:
    assert "on this machine" in (await outcome("access", tmp_path)).text
    found = await outcome("access", tmp_path, host="0.0.0.0")  # noqa: S104
    assert found.status == Status.FAILURE
    assert "users_file" in found.text
    users = tmp_path / "users"
    users.write_text(f"alice:$2y$04${'.' * 53}\n")
    assert "may pull" in (await outcome("access", tmp_path, users_file=users)).text
    users.write_text("alice:hush\n")
    found = await outcome("access", tmp_path, users_file=users)
    assert found.status == Status.FAILURE
    assert "line 1" in found.text
    assert "hush" not in found.text


@pytest.mark.parametrize("rule", [{"deny": ["nmap"]}, {"allow": ["git"]}, {"sources": ["debian!bookworm"]}])
async def test_servers_of_one_bucket_whose_rules_hide_what_the_others_have_built(
    tmp_path: Path, rule: dict[str, list[str]]
) -> None:
    access = {"default": {"requests_per_minute": 60}, "users": {"alice": rule}}
    found = await outcome("access", tmp_path, storage="s3://images", access=access)
    assert found.status == Status.WARNING
    assert "shares the bucket" in found.text
    assert "one server" in found.remedy
    # Limits restrict nothing, and blobs on this disk are served by this server alone.
    limits = {"default": {"requests_per_minute": 60}}
    for settings in ({"storage": "s3://images", "access": limits}, {"access": access}):
        assert (await outcome("access", tmp_path, **settings)).status == Status.OK


async def test_a_key_for_tokens_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text(f"alice:$2y$04${'.' * 53}\n")
    key = tmp_path / "key"
    assert (await outcome("access", tmp_path, users_file=users, token_key_file=key)).status == Status.OK
    assert not key.exists()


async def test_a_certificate(tmp_path: Path) -> None:
    one, other = make_certificate(tmp_path, "one"), make_certificate(tmp_path, "other")
    files = {"tls_certificate": one.certificate, "tls_key": one.key}
    data = tmp_path / "data"
    found = await outcome("certificate", data, **files)
    assert (found.status, found.text) == (Status.WARNING, f"{one.certificate} ends in 2 days")
    found = await outcome("certificate", data, clock=lambda: time.time() - 90 * 86400, **files)
    assert (found.status, found.text) == (Status.OK, f"{one.certificate} is good for 92 days")
    found = await outcome("certificate", data, **files, public_url="https://registry.example.com")
    assert found.status == Status.FAILURE
    assert "registry.example.com" in found.text
    found = await outcome("certificate", data, tls_certificate=one.certificate, tls_key=other.key)
    assert found.status == Status.FAILURE
    assert "can't be used" in found.text
    found = await outcome("certificate", data, tls_certificate=one.certificate)
    assert found.status == Status.FAILURE
    assert "go together" in found.text


async def test_notices_of_the_settings_are_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHANDLERY_COLOUR", "red")
    found = await outcome("settings", tmp_path)
    assert found == Outcome("the variable CHANDLERY_COLOUR is no setting", Status.WARNING)


async def test_a_proxy_that_is_not_trusted_is_a_warning(tmp_path: Path) -> None:
    found = await outcome("settings", tmp_path, public_url="https://registry.example.com")
    assert found.status == Status.WARNING
    assert "trusted_proxies" in found.text


@pytest.mark.parametrize("check", ["nix", "sandbox"])
@pytest.mark.skipif(Path("/nix/store").exists(), reason="there is a Nix store in /nix")
async def test_a_machine_without_a_store_is_left_without(tmp_path: Path, check: str) -> None:
    found = await outcome(check, tmp_path, nix_store="machine")
    assert found.status == Status.FAILURE
    assert 'nix_store = "own"' in found.remedy
    assert not Path("/nix/store").exists()
