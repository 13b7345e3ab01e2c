import asyncio
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from chandlery.errors import BuildError, DownloadError
from chandlery.image.name import LATEST
from chandlery.layers.store_reader import Entry, EntryKind, Layout, StoreReader
from chandlery.nix.closure import Closure, StorePath
from chandlery.nix.nix import Nix, NixLimits, Resolution
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.documents import Platform
from chandlery.sources.debian.source import DebianSource
from tests.support.debian_packages import PACKAGES, Deb, Member, directory, hard_link, program, symlink
from tests.support.debian_repository import SECURITY, SUITE, DebianRepository, Fault, debian_repository
from tests.support.nix_package_set import resolve
from tests.support.ordinary_user import ordinary_folder, run_as_ordinary_user

AMD64, ARM64 = Platform("linux", "amd64"), Platform("linux", "arm64")


@dataclass(frozen=True)
class Machine:
    """A suite's source, and a Nix store in which its packages are built."""

    folder: Path
    repository: DebianRepository
    source: DebianSource
    nix: Nix

    async def pin(self, platform: Platform = AMD64) -> PinnedSource:
        return await self.source.pin(LATEST, platform)

    async def resolve(self, name: str, platform: Platform = AMD64) -> Resolution:
        return await resolve(self.nix, await self.pin(platform), name)

    async def build(self, name: str, platform: Platform = AMD64) -> StorePath:
        found = await self.resolve(name, platform)
        assert found.found, found.message
        roots = self.folder / "roots" / f"{name}-{platform.architecture}"
        await self.nix.realise([found.derivation], roots, self.folder / "log")
        return found.store_path

    async def closure(self, name: str) -> Closure:
        return await self.nix.closure([await self.build(name)])

    def entries(self, store_path: StorePath) -> dict[str, Entry]:
        entries = StoreReader(self.nix.store_root).entries(store_path)
        return {os.fsdecode(entry.path): entry for entry in entries}

    def read(self, store_path: StorePath, path: str) -> str:
        return (self.nix.store_root / store_path.base_name / path).read_text()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("machine")
    with debian_repository(folder) as repository:
        repository.publish(*PACKAGES)
        source = DebianSource(SUITE, folder, repository.mirrors)
        yield Machine(folder, repository, source, Nix(folder / "nix", NixLimits()))


def nar(path: Path) -> bytes:
    return subprocess.run(["nix-store", "--dump", path], check=True, capture_output=True).stdout


class TestThePackageSet:
    """The embedded set, from a signed repository to what an image's layers are made of."""

    async def test_a_package_has_its_debian_name_and_version(self, machine: Machine) -> None:
        passwd, bash = await machine.resolve("passwd"), await machine.resolve("bash")

        assert (bash.pname, bash.version, bash.name) == ("bash", "5.2.15-2+b2", "bash-5.2.15-2+b2")
        # No epoch, and no character that a store path can't have.
        assert (passwd.version, passwd.store_path.name) == ("4.13_rc1", "passwd-4.13_rc1")

    async def test_what_a_deb_has_below_bin_and_lib_stands_below_usr(self, machine: Machine) -> None:
        bash, libc6 = (
            machine.entries(await machine.build("bash")),
            machine.entries(await machine.build("libc6")),
        )

        assert [path for path, entry in bash.items() if not entry.is_directory] == [
            "etc/bash.bashrc",
            "usr/bin/bash",
            "usr/bin/rbash",
            "usr/share/doc/bash/README",
        ]
        assert bash["usr/bin/bash"].mode == 0o755
        assert bash["usr/bin/rbash"].target == b"bash"
        assert bash["usr/share/doc/bash/README"].mode == 0o644
        assert libc6["usr/lib64/ld-linux.so.2"].target == b"/lib/libc.so.6"
        assert {path.partition("/")[0] for path in libc6} == {"usr"}

    async def test_every_unit_stands_at_the_root_of_an_image(self, machine: Machine) -> None:
        reader = StoreReader(machine.nix.store_root)
        for node in (await machine.closure("git")).nodes:
            assert reader.layout(node.path) is Layout.ROOT

    async def test_modes_and_owners_that_a_store_can_not_keep_are_kept_aside(self, machine: Machine) -> None:
        passwd = await machine.build("passwd")
        entries = machine.entries(passwd)

        assert {
            path: (f"{entry.mode:04o}", entry.uid, entry.gid)
            for path, entry in entries.items()
            if path not in ("etc", "usr", "usr/bin", "var", "var/lib")
        } == {
            "etc/private": ("0700", 0, 0),
            "etc/private/key": ("0600", 0, 0),
            "etc/shadow file": ("0640", 0, 42),
            "usr/bin/chage": ("2755", 0, 42),
            "usr/bin/su": ("4755", 0, 0),
            "var/lib/sessions": ("1733", 0, 0),
            "var/mail": ("2775", 0, 8),
        }
        assert machine.read(passwd, "etc/shadow file") == "secret"

    async def test_hard_links_are_files_with_the_same_content(self, machine: Machine) -> None:
        perl = await machine.build("perl")
        names = ["usr/bin/perl", "usr/bin/perl5.36", "usr/bin/perl-link"]

        assert [machine.read(perl, name) for name in names] == ["perl"] * 3
        assert {machine.entries(perl)[name].mode for name in names} == {0o755}

    async def test_the_closure_is_what_debian_says_the_package_needs(self, machine: Machine) -> None:
        closure = await machine.closure("git")

        assert {node.path.name: [path.name for path in node.references] for node in closure.nodes} == {
            "gcc-12-base-12.2.0-14": [],
            "libc6-2.36-9+deb12u1": ["gcc-12-base-12.2.0-14"],
            "mawk-1.3.4": ["libc6-2.36-9+deb12u1"],
            "perl-5.36.0-7": ["libc6-2.36-9+deb12u1"],
            "git-man-2.39.5-0+deb12u1": [],
            "git-2.39.5-0+deb12u1": [
                "git-man-2.39.5-0+deb12u1",
                "libc6-2.36-9+deb12u1",
                "mawk-1.3.4",
                "perl-5.36.0-7",
            ],
        }

    async def test_packages_that_need_each_other_are_one_store_path(self, machine: Machine) -> None:
        libc6, libgcc = await machine.resolve("libc6"), await machine.resolve("libgcc-s1")
        perl = await machine.build("perl-modules")

        assert libc6.derivation == libgcc.derivation
        assert (libgcc.pname, libgcc.version) == ("libgcc-s1", "12.2.0-14")
        assert {"usr/bin/perl", "usr/share/perl/a.pm"} <= machine.entries(perl).keys()

    async def test_what_is_missing_is_not_found_and_a_virtual_package_is_its_provider(
        self, machine: Machine
    ) -> None:
        assert (await machine.resolve("not-in-the-suite")).status == "not_found"
        assert (await machine.resolve("bash.missing")).status == "not_found"
        assert (await machine.resolve("awk")).pname == "mawk"

    async def test_the_names_of_nixpkgs_lead_to_what_debian_calls_otherwise(self, machine: Machine) -> None:
        for alias, name in {
            "gitminimal": "git",
            "cacert": "ca-certificates",
            "iana-etc": "netbase",
            "gitMinimal": "git",
        }.items():
            assert (await machine.resolve(alias)).derivation == (await machine.resolve(name)).derivation

    @pytest.mark.parametrize(
        ("name", "names"),
        [
            ("git", {"git"}),
            ("git.out", {"git.out", "git", "out"}),
            # Both are one derivation, whichever is asked for.
            ("perl", {"perl", "perl-modules"}),
            ("perl-modules", {"perl", "perl-modules"}),
            ("awk", {"awk", "mawk"}),
            ("iana-etc", {"iana-etc", "netbase"}),
            ("ncurses", {"ncurses", "ncurses-base", "ncurses-bin"}),
        ],
    )
    async def test_a_package_is_called_what_its_derivation_holds_and_what_an_alias_stands_for(
        self, machine: Machine, name: str, names: set[str]
    ) -> None:
        assert (await machine.resolve(name)).names == names

    async def test_an_alias_of_several_packages_brings_them_all(self, machine: Machine) -> None:
        closure = await machine.closure("ncurses")

        assert [node.path.name for node in closure.nodes] == [
            "ncurses",
            "ncurses-base-6.4",
            "ncurses-bin-6.4",
        ]
        assert machine.entries(closure.roots[0]) == {}

    async def test_an_interactive_bash_brings_its_locale(self, machine: Machine) -> None:
        for alias in ("bashInteractive", "bashinteractive"):
            closure = await machine.closure(alias)

            names = {node.path.name.rpartition("-")[0] for node in closure.nodes}
            assert "libc-bin" in names
            assert any(node.path.name.startswith("bash-") for node in closure.nodes)

    async def test_alternatives_are_recorded(self, machine: Machine) -> None:
        mawk, vim, bash = [await machine.build(name) for name in ("mawk", "vim-tiny", "bash")]

        assert machine.read(mawk, "nix-support/alternatives") == (
            "/usr/bin/awk\tawk\t/usr/bin/mawk\t5"
            "\t/usr/share/man/man1/awk.1.gz\tawk.1.gz\t/usr/share/man/man1/mawk.1.gz"
            "\t/usr/bin/nawk\tnawk\t/usr/bin/mawk\n"
        )
        assert machine.read(vim, "nix-support/alternatives") == (
            "/usr/bin/vi\tvi\t/usr/bin/vim.tiny\t15\n"
            "/usr/bin/view\tview\t/usr/bin/vim.tiny\t15\n"
            "/usr/bin/editor\teditor\t/usr/bin/vim.tiny\t15\n"
        )
        assert not (machine.nix.store_root / bash.base_name / "nix-support/alternatives").exists()

    async def test_the_authorities_are_one_bundle_that_programs_can_read(self, machine: Machine) -> None:
        cacert = await machine.build("cacert")

        assert machine.read(cacert, "etc/ssl/certs/ca-certificates.crt") == "one\ntwo\n"

    async def test_another_architecture_has_its_own_programs_and_shares_what_has_none(
        self, machine: Machine
    ) -> None:
        bash = await machine.build("bash", ARM64)

        assert machine.read(bash, "usr/bin/bash") == "bash of arm64\n"
        assert machine.read(await machine.build("bash"), "usr/bin/bash") == "bash of amd64\n"
        assert await machine.build("netbase", ARM64) == await machine.build("netbase")

    async def test_all_names_of_the_suite_can_be_listed(self, machine: Machine) -> None:
        pin = await machine.pin()

        names = await machine.nix.attribute_names(pin, AMD64.nix_system, [])

        assert {package.name for package in PACKAGES} | {"awk", "ncurses", "iana-etc"} <= set(names)
        assert "not-in-the-suite" not in names

    async def test_the_mirrors_are_no_part_of_a_store_path(self, machine: Machine) -> None:
        pin = await machine.pin()
        elsewhere = replace(pin, nix={**pin.to_nix(), "mirrors": ["http://127.0.0.1:1/a"] * 3})

        there = await resolve(machine.nix, elsewhere, "git")

        assert there.store_path == (await machine.resolve("git")).store_path

    async def test_two_stores_build_the_same(self, machine: Machine, tmp_path: Path) -> None:
        other = replace(machine, folder=tmp_path, nix=Nix(tmp_path / "nix", NixLimits()))

        assert await other.closure("git") == await machine.closure("git")
        for node in (await machine.closure("git")).nodes:
            roots = (machine.nix.store_root, other.nix.store_root)
            assert len({nar(root / node.path.base_name) for root in roots}) == 1

    async def test_an_ordinary_user_builds_the_same(self, machine: Machine) -> None:
        script = """
import asyncio, sys
from pathlib import Path
from chandlery.sources.debian.index import DebianMirrors
from chandlery.nix.nix import Nix, NixLimits
from chandlery.oci.documents import Platform
from chandlery.sources.debian.source import DebianSource

async def main(folder: Path, *mirrors: str) -> None:
    nix = Nix(folder / "nix", NixLimits())
    source = DebianSource("bookworm", folder, DebianMirrors(*mirrors))
    pin = await source.pin("latest", Platform("linux", "amd64"))
    found = (await nix.resolve(pin, "x86_64-linux", ["passwd"]))["passwd"]
    await nix.realise([found.derivation], folder / "roots", folder / "log")
    print(await nix.closure([found.store_path]))
    print((nix.store_root / found.store_path.base_name / "nix-support/permissions").read_text())

asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
"""
        closure = await machine.closure("passwd")
        permissions = machine.read(closure.roots[0], "nix-support/permissions")
        with ordinary_folder() as folder:
            mirrors = machine.repository.mirrors
            keyring = str(shutil.copy(mirrors.keyring, folder))
            printed = await asyncio.to_thread(
                run_as_ordinary_user, script, str(folder), mirrors.main, mirrors.security, keyring
            )

        assert printed.endswith(f"{closure}\n{permissions}\n")


class TestAMovingSuite:
    """A suite of its own, which moves and breaks."""

    @pytest.fixture
    def machine(self, tmp_path: Path) -> Iterator[Machine]:
        with debian_repository(tmp_path) as repository:
            repository.publish(
                Deb("lib", "1", "any", files={"usr/lib/lib": Member(b"lib 1")}),
                Deb("app", "1", "any", {"Depends": "lib"}, {"usr/bin/app": program(b"app")}),
            )
            source = DebianSource(SUITE, tmp_path, repository.mirrors)
            yield Machine(tmp_path, repository, source, Nix(tmp_path / "nix", NixLimits()))

    async def test_an_update_of_what_a_package_needs_is_another_store_path_of_both(
        self, machine: Machine
    ) -> None:
        before = await machine.closure("app")
        old = await machine.pin()
        machine.repository.publish(Deb("lib", "2", "any"), release=SECURITY)
        await machine.source.refresh(max_age=0.0)

        after = await machine.closure("app")

        assert [node.path.name for node in before.nodes] == ["app-1", "lib-1"]
        assert [node.path.name for node in after.nodes] == ["app-1", "lib-2"]
        assert before.roots != after.roots
        pinned = await machine.source.pin(old.tag, AMD64)
        assert (await resolve(machine.nix, pinned, "app")).store_path == before.roots[0]

    async def test_a_deb_that_the_mirror_no_longer_has_is_named(self, machine: Machine) -> None:
        await machine.pin()
        machine.repository.publish(Deb("lib", "2", "any"), keep_old=False)

        with pytest.raises(
            DownloadError, match=r"unable to download '.*/pool/main/lib_1_amd64\.deb': HTTP error 404"
        ):
            await machine.build("app")

        await machine.source.refresh(max_age=0.0)
        assert "lib-2" in [node.path.name for node in (await machine.closure("app")).nodes]

    @pytest.mark.parametrize(
        ("fault", "reason"),
        [
            (Fault.CORRUPT, "hash mismatch in fixed-output derivation '.*lib_1_amd64.deb.drv'"),
            (Fault.TRUNCATE, "unable to download '.*lib_1_amd64.deb'"),
        ],
    )
    async def test_a_deb_that_comes_wrong_is_refused_and_can_be_had_later(
        self, machine: Machine, fault: Fault, reason: str
    ) -> None:
        with machine.repository.misbehaving(fault, "lib_1_amd64.deb") as met:
            with pytest.raises(DownloadError, match=reason):
                await machine.build("app")
            assert met.is_set()

        assert machine.read(await machine.build("lib"), "usr/lib/lib") == "lib 1"

    async def test_a_deb_that_stalls_can_be_given_up_and_had_later(self, machine: Machine) -> None:
        with machine.repository.misbehaving(Fault.STALL, "lib_1_amd64.deb") as met:
            building = asyncio.create_task(machine.build("lib"))
            await asyncio.to_thread(met.wait)
            building.cancel()
            with pytest.raises(asyncio.CancelledError):
                await building

        assert machine.read(await machine.build("lib"), "usr/lib/lib") == "lib 1"


# What a maintainer script may do


class TestHostilePackages:
    """What a .deb brings is content: nothing is written where its links lead."""

    @staticmethod
    def published(folder: Path, repository: DebianRepository, *debs: Deb) -> Machine:
        repository.publish(*debs)
        source = DebianSource(SUITE, folder, repository.mirrors)
        return Machine(folder, repository, source, Nix(folder / "nix", NixLimits()))

    @pytest.fixture
    def repository(self, tmp_path: Path) -> Iterator[DebianRepository]:
        with debian_repository(tmp_path) as repository:
            yield repository

    @pytest.mark.parametrize("target", ["/usr/local/bin/victim", "../../../usr/share/doc/victim"])
    async def test_the_bundle_of_authorities_is_not_written_through_a_link(
        self, tmp_path: Path, repository: DebianRepository, target: str
    ) -> None:
        evil = Deb(
            "evil",
            files={
                "usr/share/ca-certificates/mozilla/a.crt": Member(b"evil\n"),
                "usr/share/doc/victim": Member(b"as it was"),
                "etc/ssl/certs/ca-certificates.crt": symlink(target),
            },
        )
        machine = self.published(tmp_path, repository, evil)
        entries = machine.entries(await machine.build("evil"))
        assert entries["etc/ssl/certs/ca-certificates.crt"].kind is EntryKind.FILE
        built = await machine.build("evil")
        assert machine.read(built, "etc/ssl/certs/ca-certificates.crt") == "evil\n"
        assert machine.read(built, "usr/share/doc/victim") == "as it was"

    @pytest.mark.parametrize("link", ["etc", "etc/ssl", "etc/ssl/certs"])
    async def test_no_bundle_is_made_behind_a_link(
        self, tmp_path: Path, repository: DebianRepository, link: str
    ) -> None:
        evil = Deb(
            "evil",
            files={
                "usr/share/ca-certificates/mozilla/a.crt": Member(b"evil\n"),
                link: symlink("/usr/local/bin"),
            },
        )
        machine = self.published(tmp_path, repository, evil)
        assert machine.entries(await machine.build("evil"))[link].target == b"/usr/local/bin"

    async def test_an_authority_that_is_a_link_is_not_read(
        self, tmp_path: Path, repository: DebianRepository
    ) -> None:
        folder = "usr/share/ca-certificates/mozilla"
        evil = Deb(
            "evil", files={f"{folder}/a.crt": symlink("/etc/passwd"), f"{folder}/b.crt": Member(b"b\n")}
        )
        machine = self.published(tmp_path, repository, evil)
        assert machine.read(await machine.build("evil"), "etc/ssl/certs/ca-certificates.crt") == "b\n"

    @pytest.mark.parametrize(
        "files",
        [
            {"nix-support/permissions": Member(b"4755 0 0 usr/bin/evil\n")},
            {"nix-support/permissions": symlink("/usr/local/bin/victim")},
            {"nix-support": symlink("/usr/local/bin")},
        ],
    )
    async def test_what_chandlery_must_know_does_not_come_from_a_deb(
        self, tmp_path: Path, repository: DebianRepository, files: Mapping[str, Member]
    ) -> None:
        machine = self.published(tmp_path, repository, Deb("evil", files=files))
        with pytest.raises(BuildError, match="it has files in /nix-support"):
            await machine.build("evil")

    @pytest.mark.parametrize(
        ("link", "path"),
        [
            ("srv/data", "srv/data/file"),
            ("srv/data", "srv/data/folder/file"),
            ("srv/data", "srv/data"),
        ],
    )
    async def test_a_deb_is_not_unpacked_behind_a_link_of_another(
        self, tmp_path: Path, repository: DebianRepository, link: str, path: str
    ) -> None:
        """Packages that need each other are unpacked into one output, one after the other."""
        content = Member(mode=0o700, type=tarfile.DIRTYPE) if path == link else Member(b"evil")
        first = Deb("a", fields={"Depends": "b"}, files={link: symlink("/usr/local")})
        second = Deb("b", fields={"Depends": "a"}, files={path: content})
        machine = self.published(tmp_path, repository, first, second)
        with pytest.raises(BuildError, match="lies behind a link to /usr/local"):
            await machine.build("a")

    async def test_a_deb_may_fill_a_folder_that_another_links_to(
        self, tmp_path: Path, repository: DebianRepository
    ) -> None:
        first = Deb(
            "a", fields={"Depends": "b"}, files={"opt/old": symlink("new"), "opt/new/a": Member(b"a")}
        )
        second = Deb("b", fields={"Depends": "a"}, files={"opt/old/b": Member(b"b")})
        machine = self.published(tmp_path, repository, first, second)
        built = await machine.build("a")
        assert machine.read(built, "opt/new/b") == "b"
        assert machine.entries(built)["opt/old"].target == b"new"

    @pytest.mark.parametrize("link", ["aa", "aa -> b", "lib/aa"])
    async def test_a_deb_is_not_unpacked_behind_a_link_of_its_own(
        self, tmp_path: Path, repository: DebianRepository, link: str
    ) -> None:
        """It may lead to one that an earlier .deb brought, and that out of the output."""
        first = Deb("a", fields={"Depends": "b"}, files={"esc": symlink("..")})
        second = Deb(
            "b", fields={"Depends": "a"}, files={link: symlink("esc"), f"{link}/file": Member(b"evil")}
        )
        machine = self.published(tmp_path, repository, first, second)
        with pytest.raises(BuildError, match="lies behind a link of its own"):
            await machine.build("a")

    async def test_a_hard_link_leads_to_nothing_behind_a_link(
        self, tmp_path: Path, repository: DebianRepository
    ) -> None:
        first = Deb("a", fields={"Depends": "b"}, files={"esc": symlink("..")})
        second = Deb("b", fields={"Depends": "a"}, files={"usr/file": hard_link("esc/other/file")})
        machine = self.published(tmp_path, repository, first, second)
        with pytest.raises(BuildError, match="a link leads out of the package"):
            await machine.build("a")

    async def test_a_link_that_leads_out_of_the_output_is_not_followed(
        self, tmp_path: Path, repository: DebianRepository
    ) -> None:
        first = Deb("a", fields={"Depends": "b"}, files={"opt": symlink("../../usr/local")})
        second = Deb("b", fields={"Depends": "a"}, files={"opt/file": Member(b"evil")})
        machine = self.published(tmp_path, repository, first, second)
        with pytest.raises(BuildError, match="a link leads out of the package"):
            await machine.build("a")


class TestShapesOfSuites:
    """What the essential packages of other suites look like."""

    async def test_base_files_may_bring_the_links_of_a_merged_usr(self, tmp_path: Path) -> None:
        """As it does since trixie."""
        links = {name: symlink(f"usr/{name}") for name in ("bin", "sbin", "lib", "lib64")}
        base = Deb(
            "base-files", files={**links, "usr/bin": directory(), "etc/debian_version": Member(b"13\n")}
        )
        with debian_repository(tmp_path) as repository:
            repository.publish(base)
            source = DebianSource(SUITE, tmp_path, repository.mirrors)
            machine = Machine(tmp_path, repository, source, Nix(tmp_path / "nix", NixLimits()))
            built = await machine.build("base-files")
            assert machine.read(built, "etc/debian_version") == "13\n"
            assert not {"bin", "usr/lib", "usr/bin/bin", "usr/sbin"} & machine.entries(built).keys()
