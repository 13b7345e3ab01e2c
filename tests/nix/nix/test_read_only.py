"""Builders of root's server see what they ask for of this machine, and can't change it."""

import os
from pathlib import Path

import pytest

from chandlery.errors import BuildError
from chandlery.nix.nix import Nix, NixLimits, NixOptions
from tests.support.nix_package_set import packages, resolve

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="is about root's server")


def machine(folder: Path) -> Path:
    """Make what stands for a part of this machine."""
    seen = folder / "machine"
    (seen / "etc").mkdir(parents=True)
    (seen / "etc" / "file").write_text("as it was")
    return seen


async def build(tmp_path: Path, seen: Path, script: str, data: Path | None = None) -> tuple[Nix, str]:
    """Build a package that asks to see a folder."""
    system = ("/bin", "/usr", "/lib", "/lib64")
    options = NixOptions(substituters=(), host_paths=(*system, str(seen)))
    nix = Nix(data or tmp_path / "nix", NixLimits(), options)
    asked = " ".join(f'"{path}"' for path in (*system, seen) if Path(path).exists())
    source = packages(
        tmp_path,
        f"""p = derivation {{
          name = "p";
          system = builtins.currentSystem;
          builder = "/bin/bash";
          args = [ "-euc" ''export PATH=/usr/bin:/bin; {script}'' ];
          __impureHostDeps = [ {asked} ];
        }};""",
    )
    found = await resolve(nix, source, "p")
    assert found.found, found.message
    await nix.realise([found.derivation], tmp_path / "roots", tmp_path / "log", own=False)
    return nix, (nix.store_root / found.store_path.base_name).read_text()


async def test_what_a_builder_sees_it_can_read(tmp_path: Path) -> None:
    seen = machine(tmp_path)
    _, made = await build(tmp_path, seen, f"cat {seen}/etc/file > $out")
    assert made == "as it was"


@pytest.mark.parametrize(
    "change",
    [
        "echo changed > {seen}/etc/file",
        "echo new > {seen}/new",
        "rm {seen}/etc/file",
        "chmod 4755 {seen}/etc/file",
        "mount -o remount,rw {seen}; echo changed > {seen}/etc/file",
    ],
)
async def test_what_a_builder_sees_it_can_not_change(tmp_path: Path, change: str) -> None:
    seen = machine(tmp_path)
    with pytest.raises(BuildError):
        await build(tmp_path, seen, change.format(seen=seen) + "; echo done > $out")
    assert (seen / "etc" / "file").read_text() == "as it was"
    assert (seen / "etc" / "file").stat().st_mode & 0o7777 == 0o644
    assert sorted(path.name for path in seen.iterdir()) == ["etc"]


async def test_a_link_to_what_it_sees_protects_where_it_leads(tmp_path: Path) -> None:
    seen = machine(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(seen)
    with pytest.raises(BuildError):
        await build(tmp_path, link, f"echo changed > {link}/etc/file; echo done > $out")
    assert (seen / "etc" / "file").read_text() == "as it was"


async def test_a_store_below_what_is_seen_can_be_built_in(tmp_path: Path) -> None:
    seen = machine(tmp_path)
    nix, made = await build(tmp_path, seen, "echo made > $out", data=seen / "nix")
    assert made == "made\n"
    assert await nix.protects_this_machine()


async def test_without_mount_namespaces_it_is_said_what_builders_could_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chandlery.nix.nix.read_only", lambda *_: ("false",))
    nix = Nix(tmp_path / "nix", NixLimits())
    assert await nix.check()
    assert not await nix.protects_this_machine()
