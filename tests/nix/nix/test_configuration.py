"""What builders see of this machine, and where what they need not build comes from."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from chandlery.errors import BuildError
from chandlery.nix.configuration import NixConfiguration, Purpose, host_paths
from chandlery.nix.nix import Nix, NixLimits, NixOptions
from tests.support.nix_cache import publish, served_folder
from tests.support.nix_package_set import packages, requires_nix, resolve

pytestmark = requires_nix

LIMITS = NixLimits(build_timeout=60.0, jobs=2)
OFFLINE = NixOptions(substituters=())


@pytest.fixture(scope="module")
def nix(tmp_path_factory: pytest.TempPathFactory) -> Nix:
    return Nix(tmp_path_factory.mktemp("store"), LIMITS, OFFLINE)


async def built(nix: Nix, folder: Path, attributes: str, *, own: bool = True) -> str:
    """Build the package `p`, which makes a file; give what it holds."""
    resolution = await resolve(nix, packages(folder / "set", attributes), "p")
    assert resolution.found, resolution.message
    await nix.realise([resolution.derivation], folder / "roots", folder / "log", own=own)
    return (nix.store_root / resolution.store_path.base_name).read_text()


# Sandbox


def bare(script: str, host: str = "") -> str:
    """Return a package that asks for no more of the machine than what it takes to start its bash."""
    return f"""
      p = derivation {{
        name = "p"; system = builtins.currentSystem; builder = "/bin/bash";
        args = [ "-c" ''{script}'' ];
        # Where /lib is a link, Nix 2.26 shows it as one.
        __impureHostDeps = [ "/bin/bash" "/lib" "/usr/lib" {host} ]
          ++ (if builtins.currentSystem == "x86_64-linux" then [ "/lib64" "/usr/lib64" ] else [ ]);
      }};
    """


async def test_a_builder_sees_nothing_of_this_machine_that_it_does_not_ask_for(
    nix: Nix, tmp_path: Path
) -> None:
    script = "for each in /* /bin/* /usr/*; do echo $each; done > $out"

    seen = set((await built(nix, tmp_path, bare(script))).split())

    assert seen - {"/lib64", "/usr/lib64"} == {
        *("/bin", "/bin/bash", "/lib", "/usr", "/usr/lib"),
        *("/build", "/dev", "/etc", "/nix", "/proc", "/tmp"),
    }


async def test_a_builder_of_the_machine_is_not_there_unless_asked_for(nix: Nix, tmp_path: Path) -> None:
    package = 'p = derivation { name = "p"; system = builtins.currentSystem; builder = "/bin/bash"; };'

    with pytest.raises(BuildError, match=r"executing '/bin/bash': No such file"):
        await built(nix, tmp_path, package)


@pytest.mark.parametrize(
    "path", ["/etc", "/root", "/home", "/", "/usr/..", "/usr/../etc", "/var/lib", "/tmp"]
)
async def test_a_builder_can_not_ask_for_more_than_programs(nix: Nix, tmp_path: Path, path: str) -> None:
    with pytest.raises(BuildError, match=r"asks to see .* of this machine, which host_paths doesn't name"):
        await built(nix, tmp_path, bare("echo > $out", f'"{path}"'))


@pytest.mark.parametrize("path", ["/bin", "/usr", "/lib", "/usr/lib/ssl/private", "/etc"])
async def test_a_builder_of_another_package_set_can_ask_for_nothing(
    nix: Nix, tmp_path: Path, path: str
) -> None:
    package = f"""
      p = derivation {{
        name = "p"; system = builtins.currentSystem; builder = "builtin:buildenv";
        derivations = ""; manifest = "/"; __impureHostDeps = [ "{path}" ];
      }};
      meanwhile = build (builtins.readFile "${{p}}/manifest.nix") "";
    """

    told = rf"^p could not be built: its builder asks to see {path} of this machine, which host_paths"
    with pytest.raises(BuildError, match=told):
        await built(nix, tmp_path, package, own=False)
    resolution = await resolve(nix, packages(tmp_path / "set", package), "meanwhile")
    assert "was not in allowed-impure-host-deps" in resolution.message


async def test_what_the_operator_names_a_builder_may_ask_for(nix: Nix, tmp_path: Path) -> None:
    named = NixOptions(substituters=(), host_paths=tuple(host_paths()))
    willing = Nix(nix.store_root.parent.parent, LIMITS, named)

    assert await built(willing, tmp_path, bare("echo built > $out"), own=False) == "built\n"


async def test_a_builder_can_not_do_without_a_sandbox(nix: Nix, tmp_path: Path) -> None:
    package = bare("echo > $out").replace("args =", "__noChroot = true; args =")

    with pytest.raises(BuildError, match="__noChroot"):
        await built(nix, tmp_path, package)


async def test_a_builder_sees_neither_the_operators_files_nor_the_network_nor_other_processes(
    nix: Nix, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    script = f"""
      [ ! -e {secret} ] && [ ! -e /root ] && [ ! -e /etc/shadow ] && [ ! -e {nix.store_root} ]
      (( $(set -- /proc/[0-9]*; echo $#) < 4 ))
      ! read < /dev/tcp/1.1.1.1/53
      echo kept > $out
    """

    package = bare("set -e; " + script).replace('"-c"', '"-ec"')

    assert await built(nix, tmp_path, package) == "kept\n"


async def test_a_download_has_no_more_of_the_environment_than_it_needs(
    nix: Nix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["OPERATORS_TOKEN", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK", "HTTPS_PROXY"]
    for name in names:
        monkeypatch.setenv(name, f"{name} of the operator")
    package = f"""
      p = derivation {{
        name = "p"; system = builtins.currentSystem; builder = "/bin/bash";
        args = [ "-c" "printf %s \\"${" $".join(names)}\\" > $out" ];
        impureEnvVars = [ {" ".join(f'"{name}"' for name in names)} ];
        outputHash = builtins.hashString "sha256" "   HTTPS_PROXY of the operator"; outputHashAlgo = "sha256";
        __impureHostDeps = hostPaths;
      }};
    """

    assert await built(nix, tmp_path, package) == "   HTTPS_PROXY of the operator"


@pytest.mark.parametrize("purpose", Purpose)
@pytest.mark.parametrize("folder", [Path("/data/nix"), None])
def test_only_what_fetches_has_the_operators_credentials(
    monkeypatch: pytest.MonkeyPatch, purpose: Purpose, folder: Path | None
) -> None:
    for name in ("SSH_AUTH_SOCK", "TOKEN", "GIT_SSH_COMMAND", "HOME", "NIX_PATH", "NIX_CONFIG", "NIX_REMOTE"):
        monkeypatch.setenv(name, "the operator's")

    environment = NixConfiguration(folder, LIMITS, NixOptions(), Path("/data/etc")).environment(purpose)

    fetches = purpose is Purpose.FETCH
    expected = {"SSH_AUTH_SOCK", "TOKEN", "GIT_SSH_COMMAND", "HOME"} if fetches else set()
    expected |= {"NIX_REMOTE"} if folder is None else set()
    assert {name for name, value in environment.items() if value == "the operator's"} == expected


def test_host_paths_are_those_that_are_there() -> None:
    assert {"/bin", "/usr"} <= set(host_paths())
    assert all(os.path.lexists(path) for path in host_paths())


# Binary caches


@dataclass(frozen=True)
class Cache:
    """A binary cache over HTTP, which has what the package `p` gave once: no other build gives the same."""

    address: str
    public_key: str
    content: str
    asked: list[str]


PACKAGE = 'p = build "p" "echo $EPOCHREALTIME $RANDOM $RANDOM > $out";'


@pytest.fixture
async def cache(tmp_path: Path) -> AsyncIterator[Cache]:
    builder = Nix(tmp_path / "builder", LIMITS, OFFLINE)
    content = await built(builder, tmp_path, PACKAGE)
    path = (await resolve(builder, packages(tmp_path / "set", PACKAGE), "p")).store_path
    public_key = publish(tmp_path / "builder", [path], tmp_path)

    with served_folder(tmp_path / "cache") as (address, asked):
        yield Cache(address, public_key, content, asked)


def using(folder: Path, cache: Cache, key: str | None = None) -> Nix:
    options = NixOptions(
        substituters=(cache.address,),
        trusted_public_keys=(key or cache.public_key,),
        host_paths=tuple(host_paths()),
    )
    return Nix(folder / "own", LIMITS, options)


async def test_what_a_binary_cache_has_is_not_built(cache: Cache, tmp_path: Path) -> None:
    folder = tmp_path / "other"

    assert await built(using(tmp_path, cache), folder, PACKAGE, own=False) == cache.content
    assert "copying path" in (folder / "log").read_text()
    assert "building" not in (folder / "log").read_text()


async def test_a_binary_cache_is_not_asked_without_need(cache: Cache, tmp_path: Path) -> None:
    nix = using(tmp_path, cache)
    await nix.check()
    await nix.check_build()

    assert await built(nix, tmp_path / "other", PACKAGE) != cache.content
    assert cache.asked == []


async def test_what_is_signed_by_nobody_who_is_trusted_is_built(cache: Cache, tmp_path: Path) -> None:
    other = "other-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="

    assert await built(using(tmp_path, cache, other), tmp_path / "o", PACKAGE, own=False) != cache.content


async def test_what_a_binary_cache_does_not_have_is_built(cache: Cache, tmp_path: Path) -> None:
    other = 'p = build "other" "echo built > $out";'

    assert await built(using(tmp_path, cache), tmp_path / "other", other, own=False) == "built\n"
    assert any(path.endswith(".narinfo") for path in cache.asked)


async def test_what_a_binary_cache_fails_to_deliver_is_built(cache: Cache, tmp_path: Path) -> None:
    for file in (tmp_path / "cache/nar").iterdir():
        file.unlink()

    assert await built(using(tmp_path, cache), tmp_path / "o", PACKAGE, own=False) != cache.content


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://binary-cache.invalid"])
async def test_a_binary_cache_that_is_dead_only_takes_some_seconds(tmp_path: Path, address: str) -> None:
    nix = Nix(tmp_path / "own", LIMITS, NixOptions(substituters=(address,), host_paths=tuple(host_paths())))

    # Only in case that it hangs.
    async with asyncio.timeout(120):
        assert await built(nix, tmp_path / "other", PACKAGE, own=False)
