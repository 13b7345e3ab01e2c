import asyncio
import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chandlery.errors import (
    BuildError,
    BuildTimeoutError,
    DownloadError,
    LowDiskError,
    NixError,
    NixMissingError,
    RevisionGoneError,
    StorageFullError,
)
from chandlery.nix.closure import StorePath
from chandlery.nix.configuration import host_paths
from chandlery.nix.nix import Nix, NixLimits, NixOptions, Resolution
from chandlery.nix.output import DerivationMissingError, build_error
from chandlery.nix.pinned_source import PinnedSource
from tests.support.nix_package_set import SYSTEM, packages, requires_nix, resolve, source_of
from tests.support.ordinary_user import ordinary_folder, run_as_ordinary_user
from tests.support.processes import running

pytestmark = requires_nix

LIMITS = NixLimits(build_timeout=60.0, evaluation_timeout=60.0, jobs=2)
# Without a binary cache that every build in an evaluation would wait for.
OFFLINE = NixOptions(substituters=(), host_paths=tuple(host_paths()))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def nix(store: Path) -> Nix:
    return Nix(store, LIMITS, OFFLINE)


# Many packages as one


@pytest.mark.parametrize("count", [1, 100, 101, 250])
async def test_one_derivation_needs_all_of_an_images(nix: Nix, tmp_path: Path, count: int) -> None:
    source = packages(
        tmp_path / "set",
        f"""
        made = builtins.listToAttrs (builtins.genList (number: {{
          name = "p${{toString number}}";
          value = derivation {{
            name = "p${{toString number}}-of-{count}"; system = builtins.currentSystem;
            builder = "builtin:buildenv"; derivations = ""; manifest = "/";
          }};
        }}) {count});
        """,
    )
    found = await nix.resolve(source, SYSTEM, [f"made.p{number}" for number in range(count)])
    described = [{"derivation": each.derivation, "output": each.output} for each in found.values()]
    arguments = {"name": "image-many", "derivations": json.dumps(described)}
    together = await nix.instantiate("together.nix", arguments, tmp_path / "roots")
    await nix.realise([together], tmp_path / "roots", tmp_path / "log", own=False)
    result = StorePath.parse(str((tmp_path / "roots/result").readlink()))
    assert {each.store_path for each in found.values()} <= {
        node.path for node in (await nix.closure([result])).nodes
    }


# Evaluation

RESOLVED = """
  hello = build "hello-2.12" "echo hello > $out" // { meta.mainProgram = "hi"; };
  plain = build "plain" "echo > $out" // { pname = "other"; version = "7"; };
  openssl = derivation {
    name = "openssl-3";
    outputs = [ "bin" "dev" ];
    system = builtins.currentSystem;
    builder = "/bin/bash";
    args = [ "-euc" "echo > $bin; echo > $dev" ];
    __impureHostDeps = hostPaths;
  };
  throws = throw "it was thrown";
  aborts = abort "it was aborted";
  asserts = assert 1 == 2; hello;
  loops = loops;
  adds = 1 + { };
  hasNoSuch = hello.name.no.such;
  number = 3;
  set = { };
  function = { a }: a;
  unfree = { type = "derivation"; name = "u"; drvPath = throw "no licence"; meta.unfree = true; };
  broken = { type = "derivation"; name = "b"; drvPath = throw "is broken"; meta = { broken = true; }; };
  insecure = { type = "derivation"; name = "i"; drvPath = throw "has holes"; meta.insecure = true; };
  python3Packages.deeper = { numpy = hello; throws = throw "deep"; };
  haskellPackages.Cabal = plain;
  OpenJDK = hello; openJDK = plain;
  Exact = hello; exact = plain;
  twice = { Same = hello; same2 = hello; SAME = plain; };
  "dotted.name" = hello;
"""


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> PinnedSource:
    return packages(tmp_path_factory.mktemp("resolved"), RESOLVED)


async def test_a_package_is_found_with_its_name_and_its_main_program(
    nix: Nix, resolved: PinnedSource
) -> None:
    hello = await resolve(nix, resolved, "hello")
    plain = await resolve(nix, resolved, "plain")

    assert hello.found
    assert (hello.name, hello.pname, hello.version, hello.main_program) == (
        "hello-2.12",
        "hello",
        "2.12",
        "hi",
    )
    assert (plain.pname, plain.version, plain.main_program) == ("other", "7", None)
    assert hello.derivation.endswith("-hello-2.12.drv")
    assert hello.store_path == StorePath.parse(hello.outputs["out"])
    assert hello.store_path.name == "hello-2.12"


async def test_an_output_can_be_asked_for_by_name_and_else_the_first_is_meant(
    nix: Nix, resolved: PinnedSource
) -> None:
    default, dev = await resolve(nix, resolved, "openssl"), await resolve(nix, resolved, "openssl.dev")

    assert (default.output, default.store_path.name) == ("bin", "openssl-3-bin")
    assert (dev.output, dev.store_path.name) == ("dev", "openssl-3-dev")
    assert default.derivation == dev.derivation
    assert default.outputs == dev.outputs


@pytest.mark.parametrize(
    ("attribute_path", "status", "message"),
    [
        ("missing", "not_found", ""),
        ("hello.missing", "not_found", ""),
        ("number.missing", "not_found", ""),
        ("python3Packages.deeper.missing", "not_found", ""),
        ("throws", "failed", "it was thrown"),
        ("throws.deeper", "failed", "it was thrown"),
        ("python3Packages.deeper.throws", "failed", "deep"),
        ("aborts", "failed", "evaluation aborted with the following error message: 'it was aborted'"),
        (
            "asserts",
            "failed",
            r"assertion '\(1 == 2\)' failed|an integer with value '1' is not equal to .*",
        ),
        ("loops", "infinite_recursion", "infinite recursion encountered"),
        ("adds", "failed", "cannot add a set to an integer"),
        (
            "hasNoSuch",
            "failed",
            'value is a string while a set was expected|expected a set but found a string: "hello-2.12"',
        ),
        ("number", "not_a_package", "it is a int"),
        ("set", "not_a_package", "it is a set"),
        ("function", "not_a_package", "it is a lambda"),
        ("unfree", "unfree", "no licence"),
        ("broken", "broken", "is broken"),
        ("insecure", "insecure", "has holes"),
    ],
)
async def test_what_is_no_package_is_an_answer_with_its_reason(
    nix: Nix, resolved: PinnedSource, attribute_path: str, status: str, message: str
) -> None:
    answer = await resolve(nix, resolved, attribute_path)

    assert answer.status == status
    # Nix 2.26 has other words for some.
    assert re.fullmatch(message, answer.message)
    assert not answer.found


async def test_bad_packages_do_not_keep_good_ones_from_being_found(nix: Nix, resolved: PinnedSource) -> None:
    answers = await nix.resolve(
        resolved, SYSTEM, ["hello", "throws", "loops", "aborts", "missing", "openssl.dev"]
    )

    assert {path: answer.status for path, answer in answers.items()} == {
        "hello": "found",
        "throws": "failed",
        "loops": "infinite_recursion",
        "aborts": "failed",
        "missing": "not_found",
        "openssl.dev": "found",
    }


@pytest.mark.parametrize(
    ("attribute_path", "name"),
    [
        ("HELLO", "hello-2.12"),
        ("python3packages.deeper.numpy", "hello-2.12"),
        ("haskellpackages.cabal", "plain"),
        ("haskellPackages.Cabal", "plain"),
        ("openjdk", "hello-2.12"),  # the first by name of two that are alike
        ("openJDK", "plain"),
        ("exact", "plain"),
        ("Exact", "hello-2.12"),
        ("twice.Same", "hello-2.12"),
        ("twice.SAME2", "hello-2.12"),
        ("twice.same", None),  # below the first part, only one that is alike will do
        ("dotted.name", "hello-2.12"),
    ],
)
async def test_an_exact_name_wins_and_else_case_does_not_matter(
    nix: Nix, resolved: PinnedSource, attribute_path: str, name: str | None
) -> None:
    answer = await resolve(nix, resolved, attribute_path)

    assert (answer.name or None) == name
    assert answer.status == ("not_found" if name is None else "found")


async def test_the_look_up_of_a_package_forces_no_other(nix: Nix, tmp_path: Path) -> None:
    source = packages(tmp_path, 'hello = build "hello" "echo > $out"; other = abort "forced";')

    assert (await resolve(nix, source, "hello")).found


@settings(max_examples=30)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), unique=True, min_size=1))
def test_a_name_is_never_read_as_nix_code(nix: Nix, empty: PinnedSource, names: list[str]) -> None:
    answers = asyncio.run(nix.resolve(empty, SYSTEM, names))

    assert answers == dict.fromkeys(names, Resolution(status="not_found"))


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> PinnedSource:
    return source_of(tmp_path_factory.mktemp("empty"), "{ }")


async def test_a_name_that_would_be_nix_code_is_just_not_found(nix: Nix, empty: PinnedSource) -> None:
    names = [
        '${throw "run"}',
        "''${throw 1}''",
        '"; throw 1; "',
        'a\\" + throw 1 + \\"',
        "$(touch /tmp/run)",
        "a\nb",
        "a\\nb",
        "--option",
        "-",
        "__functor",
        "🙂.ü",
        "..",
        ".",
        "",
        " ",
        "*",
        "%s",
        "}",
    ]

    assert await nix.resolve(empty, SYSTEM, names) == dict.fromkeys(names, Resolution(status="not_found"))


@pytest.mark.parametrize(
    ("head", "system"),
    [
        ("", '"none"'),
        ("{ system }:", "system"),
        ("{ system, config, overlays, ... }: assert config == { } && overlays == [ ];", "system"),
        ("{ system, config ? { a = 1; }, cross ? null }: assert config == { };", "system"),
        ("{ system ? builtins.currentSystem, ... }@args:", "args.system"),
        ("args: assert args.config == { };", "args.system"),
        ("{ ... }@args: assert args.overlays == [ ];", "args.system"),
        ("{ }:", '"none"'),
        ("{ ... }:", '"none"'),
        ("{ lib ? 1 }:", '"none"'),
    ],
)
async def test_a_package_set_is_an_attribute_set_or_a_function_of_what_it_takes(
    nix: Nix, tmp_path: Path, head: str, system: str
) -> None:
    body = f'p = derivation {{ name = "p-on-${{{system}}}"; system = "s"; builder = "b"; }};'
    source = source_of(tmp_path, f"{head} {{ {body} }}")

    answers = await nix.resolve(source, "aarch64-linux", ["p"])

    assert answers["p"].message == ""
    assert answers["p"].name == ("p-on-none" if "none" in system else "p-on-aarch64-linux")


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("{ syntax error", "syntax error, unexpected"),
        ('throw "the whole set"', "the whole set"),
        ("{ pkgs }: { }", "without required argument 'pkgs'"),
        ("import ./missing.nix", "No such file or directory|missing.nix' does not exist"),
    ],
)
async def test_a_package_set_that_can_not_be_read_is_why_nothing_is_found(
    nix: Nix, tmp_path: Path, expression: str, message: str
) -> None:
    answers = await nix.resolve(source_of(tmp_path, expression), SYSTEM, ["a", "b"])

    assert {answer.status for answer in answers.values()} == {"failed"}
    assert all(re.search(message, answer.message) for answer in answers.values())
    assert await nix.attribute_names(source_of(tmp_path, expression), SYSTEM, []) == []


async def test_the_names_of_a_package_set_can_be_listed_at_any_depth(
    nix: Nix, resolved: PinnedSource
) -> None:
    assert {"hello", "throws", "OpenJDK"} <= set(await nix.attribute_names(resolved, SYSTEM, []))
    assert await nix.attribute_names(resolved, SYSTEM, ["python3packages", "deeper"]) == ["numpy", "throws"]
    assert await nix.attribute_names(resolved, SYSTEM, ["missing"]) == []
    assert await nix.attribute_names(resolved, SYSTEM, ["number"]) == []
    assert await nix.attribute_names(resolved, SYSTEM, ["throws"]) == []


async def test_an_evaluation_may_say_much_on_stderr_and_on_stdout(nix: Nix, tmp_path: Path) -> None:
    names = 'map (n: { name = "${long}${toString n}"; value = 1; }) (builtins.genList (n: n) 5000)'
    source = source_of(
        tmp_path,
        f"""
        let long = builtins.concatStringsSep "" (builtins.genList (_: "x") 1000);
        in builtins.listToAttrs (map (each: builtins.trace each.name each) ({names}))
        """,
    )

    assert len(await nix.attribute_names(source, SYSTEM, [])) == 5000


# Building


@dataclass(frozen=True)
class Build:
    """Where one build keeps its protection and its log."""

    nix: Nix
    roots: Path
    log: Path

    async def realise(self, *derivations: str) -> list[StorePath]:
        await self.nix.realise(derivations, self.roots, self.log)
        return [StorePath.parse(str(link.readlink())) for link in sorted(self.roots.iterdir())]

    async def of(self, source: PinnedSource, attribute_path: str) -> StorePath:
        """Resolve and build one package."""
        resolution = await resolve(self.nix, source, attribute_path)
        assert resolution.found, resolution.message
        [store_path] = await self.realise(f"{resolution.derivation}!{resolution.output}")
        return store_path


@pytest.fixture
def build(nix: Nix, tmp_path: Path) -> Build:
    return Build(nix, tmp_path / "roots", tmp_path / "log")


def collect_garbage(store: Path) -> None:
    subprocess.run(["nix-store", "--store", store, "--gc"], check=True, capture_output=True)


def nar_size(path: Path) -> int:
    return len(subprocess.run(["nix-store", "--dump", path], check=True, capture_output=True).stdout)


def exists(nix: Nix, store_path: StorePath) -> bool:
    return os.path.lexists(nix.store_root / store_path.base_name)


class Gate:
    """A port where a builder waits; only builders of fixed outputs have the network that it takes."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    def package(self, script: str) -> str:
        """Return an attribute `waits`, a package whose builder runs a script and then waits."""
        return f"""
          waits = derivation {{
            name = "waits-{self.port}";
            system = builtins.currentSystem;
            builder = "/bin/bash";
            args = [ "-euc" ''PATH=/bin; {script}; read < /dev/tcp/127.0.0.1/{self.port}; printf x > $out'' ];
            outputHash = builtins.hashString "sha256" "x";
            outputHashAlgo = "sha256";
            __impureHostDeps = hostPaths;
          }};
        """


@asynccontextmanager
async def new_gate() -> AsyncIterator[Gate]:
    async def wait(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        gate.reached.set()
        await gate.open.wait()
        writer.write(b"\n")
        writer.close()

    async with await asyncio.start_server(wait, "127.0.0.1", 0) as server:
        gate = Gate(server.sockets[0].getsockname()[1])
        try:
            yield gate
        finally:
            gate.open.set()


async def test_the_log_grows_while_the_build_runs(build: Build, tmp_path: Path) -> None:
    async with new_gate() as gate:
        source = packages(tmp_path / "set", gate.package("echo said before"))
        building = asyncio.create_task(build.of(source, "waits"))
        await gate.reached.wait()
        while b"said before\n" not in build.log.read_bytes():
            assert not building.done()
            await asyncio.sleep(0)
        gate.open.set()
        await building


async def test_what_is_built_is_kept_from_the_garbage_collector_until_its_roots_are_removed(
    build: Build, nix: Nix, store: Path, tmp_path: Path
) -> None:
    source = packages(
        tmp_path / "set",
        """
        lib = build "kept-lib" "echo lib > $out";
        app = build "kept-app" "echo ${lib} > $out";
        other = build "other" "echo other > $out";
        """,
    )
    app = await build.of(source, "app")
    lib = (await resolve(nix, source, "lib")).store_path
    other = await Build(nix, tmp_path / "other-roots", build.log).of(source, "other")
    shutil.rmtree(tmp_path / "other-roots")

    collect_garbage(store)
    assert exists(nix, app)
    assert exists(nix, lib)
    assert not exists(nix, other)

    shutil.rmtree(build.roots)
    collect_garbage(store)
    assert not exists(nix, app)
    assert not exists(nix, lib)


async def test_only_the_output_that_was_asked_for_is_kept(
    build: Build, nix: Nix, store: Path, resolved: PinnedSource
) -> None:
    dev = await build.of(resolved, "openssl.dev")
    other = StorePath.parse((await resolve(nix, resolved, "openssl")).outputs["bin"])

    collect_garbage(store)

    assert (dev.name, other.name) == ("openssl-3-dev", "openssl-3-bin")
    assert exists(nix, dev)
    assert not exists(nix, other)


async def test_all_derivations_of_a_build_are_kept(build: Build, nix: Nix, resolved: PinnedSource) -> None:
    found = await nix.resolve(resolved, SYSTEM, ["hello", "plain", "openssl"])

    kept = await build.realise(*(each.derivation for each in found.values()))

    assert {path.name for path in kept} == {"hello-2.12", "plain", "openssl-3-bin", "openssl-3-dev"}


async def test_a_derivation_that_was_collected_is_missing_not_broken(
    build: Build, nix: Nix, store: Path, tmp_path: Path
) -> None:
    found = await resolve(nix, packages(tmp_path, 'gone = build "gone" "echo > $out";'), "gone")
    collect_garbage(store)

    for derivation in (found.derivation, f"{found.derivation}!out"):
        with pytest.raises(DerivationMissingError, match="gone"):
            await build.realise(derivation)


@pytest.mark.parametrize(
    "said",
    [
        "error: opening file '/data/store/y6iszvl1xkxwcqr5xi0141a8b19b6a9z-git.drv': No such file",
        "error: getting status of '/nix/store/y6iszvl1xkxwcqr5xi0141a8b19b6a9z-git.drv': No such file",
        "error: path '/nix/store/ajb0kdf90ym1alwfjbdgl4f2m9c740y8-hello-1.0' is not valid",
        "error: path '/nix/store/y6iszvl1xkxwcqr5xi0141a8b19b6a9z-git.drv' is not valid",
    ],
)
def test_what_a_collector_took_under_a_build_is_no_failure_of_the_build(said: str) -> None:
    """Nix 2.8 says these when a collection and a build meet, which no test can bring about at will."""
    derivation = "/nix/store/y6iszvl1xkxwcqr5xi0141a8b19b6a9z-git.drv"
    assert isinstance(build_error(f"building...\n{said}\n", [derivation]), DerivationMissingError)


async def test_a_failed_build_names_the_package_the_reason_and_its_last_words(
    build: Build, tmp_path: Path
) -> None:
    source = packages(
        tmp_path / "set",
        """
        lib = build "lib-1" "for i in {1..30}; do echo line $i; echo; done; echo why >&2; exit 3";
        app = build "app-1" "echo ${lib} > $out";
        """,
    )

    with pytest.raises(BuildError) as caught:
        await build.of(source, "app")

    error = caught.value
    assert (error.what, error.reason) == ("lib-1", "its builder failed with exit code 3")
    assert error.log_tail == (*(f"line {number}" for number in range(12, 31)), "why")
    assert "line 1\n" in build.log.read_text()


async def test_a_builder_that_talks_without_end_has_a_log_with_its_beginning_and_its_end(
    build: Build, tmp_path: Path
) -> None:
    talk = "yes $(printf '%01000d' 7) | head --lines 20000"
    source = packages(tmp_path / "set", f'talks = build "talks" "echo first; {talk}; echo why; exit 3";')

    with pytest.raises(BuildError) as caught:
        await build.of(source, "talks")

    assert caught.value.reason == "its builder failed with exit code 3"
    assert caught.value.log_tail[-1] == "why"
    log = build.log.read_bytes()
    assert (17 << 20) - 10_000 < len(log) < (17 << 20) + 10_000
    told = log.decode()
    assert 0 < told.index("first\n") < told.index("[chandlery: this log is longer than 16 MiB")
    # Nix 2.34 has other words for the last.
    told_last = r"bytes are left out here\]\n.*\bwhy\n.*error: (builder for|Cannot build)"
    assert re.search(told_last, told, re.DOTALL)


async def test_a_builder_that_makes_nothing_has_failed(build: Build, tmp_path: Path) -> None:
    source = packages(tmp_path / "set", 'nothing = build "nothing" "echo did nothing";')

    with pytest.raises(BuildError, match=r"nothing could not be built: .*failed to produce output path"):
        await build.of(source, "nothing")


async def test_a_builder_may_write_what_looks_like_nixs_own_log(build: Build, tmp_path: Path) -> None:
    source = packages(
        tmp_path / "set",
        r"""
        liar = build "liar" ''
          printf '\377\n@nix {\n@nix {"action":"stop","id":1}\n@nix {"action":"msg","level":0,"msg":"lie"}\n'
          exit 3
        '';
        """,
    )
    with pytest.raises(BuildError, match="its builder failed with exit code 3") as caught:
        await build.of(source, "liar")
    assert caught.value.log_tail[0] == "\N{REPLACEMENT CHARACTER}"
    assert "@nix {" in caught.value.log_tail


async def test_a_builder_may_say_much_with_and_without_lines(build: Build, tmp_path: Path) -> None:
    source = packages(
        tmp_path / "set",
        """
        loud = build "loud" ''
          head --bytes 5000000 /dev/zero | tr '\\\\0' x
          head --bytes 5000000 /dev/zero | tr '\\\\0' y >&2
          seq 1000000
          echo done > $out
        '';
        """,
    )

    loud = await build.of(source, "loud")

    assert (build.nix.store_root / loud.base_name).read_text() == "done\n"
    assert build.log.stat().st_size > 15_000_000


@pytest.mark.parametrize("script", ["true", "yes >&2 & true", "trap : TERM INT"])
async def test_a_build_that_takes_too_long_is_stopped_with_all_its_processes(
    store: Path, tmp_path: Path, script: str
) -> None:
    marker = uuid.uuid4().hex
    build = Build(Nix(store, NixLimits(build_timeout=1.0)), tmp_path / "roots", tmp_path / "log")
    async with new_gate() as gate:
        source = packages(tmp_path / "set", gate.package(f"echo began; {script}; : {marker}"))
        with pytest.raises(BuildTimeoutError) as caught:
            await build.of(source, "waits")

        assert gate.reached.is_set()
        assert running(marker) == []
    assert caught.value.limit == 1.0
    assert caught.value.what == f"waits-{gate.port}"
    assert {"began"} <= set(build.log.read_text().splitlines())


async def test_a_build_that_nobody_waits_for_any_more_is_stopped(build: Build, tmp_path: Path) -> None:
    marker = uuid.uuid4().hex
    async with new_gate() as gate:
        source = packages(tmp_path / "set", gate.package(f": {marker}"))
        building = asyncio.create_task(build.of(source, "waits"))
        await gate.reached.wait()
        assert running(marker) != []

        building.cancel()
        with pytest.raises(asyncio.CancelledError):
            await building

        assert running(marker) == []


async def test_a_nix_that_was_killed_is_told_from_a_build_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "nix-store"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho compiling >&2\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    build = Build(Nix(tmp_path, NixLimits()), tmp_path / "roots", tmp_path / "log")

    with pytest.raises(BuildError, match="killed by signal 9") as caught:
        await build.realise("/nix/store/00000000000000000000000000000000-any.drv")

    assert caught.value.log_tail == ("compiling",)


async def test_builders_do_not_outlive_a_nix_that_does_not_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nix 2.8 overlooks a signal now and then; this one always does.
    marker = uuid.uuid4().hex
    program = tmp_path / "bin" / "nix-store"
    program.parent.mkdir()
    program.write_text(
        f"#!/bin/bash\ntrap '' TERM\nsetsid bash -c '(exec -a {marker} sleep 600); :' &\nwait\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    build = Build(Nix(tmp_path, NixLimits(build_timeout=0.5)), tmp_path / "roots", tmp_path / "log")

    with pytest.raises(BuildTimeoutError):
        await build.realise("/nix/store/00000000000000000000000000000000-any.drv")

    assert running(marker) == []


async def test_an_evaluation_that_takes_too_long_is_stopped(store: Path, tmp_path: Path) -> None:
    marker = uuid.uuid4().hex
    hurried = Nix(store, NixLimits(evaluation_timeout=1.0), OFFLINE)
    async with new_gate() as gate:
        source = packages(tmp_path, gate.package(f": {marker}") + "slow = import waits;")
        answer = await resolve(hurried, source, "slow")

        assert gate.reached.is_set()
        assert running(marker) == []
    assert answer.status == "time_limit"
    assert answer.message == "nix-instantiate was stopped after 1 s, the limit on this server"


FETCH = """
  source = import <nix/fetchurl.nix> {
    url = "http://127.0.0.1:%d/source.tar";
    sha256 = builtins.hashString "sha256" "%s";
  };
  app = build "app-1" "cat ${source} > $out";
"""


@asynccontextmanager
async def web_server(status: str, body: bytes) -> AsyncIterator[int]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def test_what_a_package_is_made_of_is_downloaded(build: Build, tmp_path: Path) -> None:
    async with web_server("200 OK", b"right") as port:
        app = await build.of(packages(tmp_path, FETCH % (port, "right")), "app")

    assert (build.nix.store_root / app.base_name).read_bytes() == b"right"


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        ("404 Not Found", b"", "unable to download 'http://127.0.0.1:{port}/source.tar': HTTP error 404"),
        ("200 OK", b"wrong", "hash mismatch in fixed-output derivation '.*source.tar.drv'"),
    ],
)
async def test_what_can_not_be_downloaded_is_told_apart_from_what_can_not_be_built(
    build: Build, tmp_path: Path, status: str, body: bytes, reason: str
) -> None:
    async with web_server(status, body) as port:
        with pytest.raises(DownloadError, match=rf"^app-1 could not be built: {reason.format(port=port)}"):
            await build.of(packages(tmp_path / "set", FETCH % (port, "never given")), "app")


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder],
        capture_output=True,
        check=False,
        text=True,
    )
    if mount.returncode != 0:
        pytest.skip(f"a small disk can't be mounted: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


async def test_a_disk_that_gets_full_is_the_reason_of_a_build_that_fails(
    small_disk: Path, tmp_path: Path
) -> None:
    source = packages(tmp_path / "set", 'big = build "big" "head --bytes 40000000 /dev/zero > $out";')
    build = Build(Nix(small_disk, LIMITS), tmp_path / "roots", tmp_path / "log")

    with pytest.raises(StorageFullError, match=f"no space left .* {small_disk}"):
        await build.of(source, "big")


async def test_a_disk_that_is_full_is_the_reason_of_an_evaluation_that_fails(
    small_disk: Path, tmp_path: Path
) -> None:
    nix = Nix(small_disk, LIMITS)
    await nix.check()
    with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass

    with pytest.raises(StorageFullError):
        await resolve(nix, packages(tmp_path / "set", 'a = build "a" "echo > $out";'), "a")


ENDLESS = "until [ -e /nowhere ]; do sleep 0.05; done"


@pytest.mark.parametrize("evaluates", [False, True])
async def test_what_nix_does_is_stopped_when_too_little_of_the_disk_is_left(
    small_disk: Path, tmp_path: Path, evaluates: bool
) -> None:
    big = f'big = build "big" "head --bytes 10000000 /dev/zero > $out; {ENDLESS}";'
    source = packages(tmp_path / "set", f'{big} evaluated = build "evaluated" (import big);')
    limits = NixLimits(build_timeout=60.0, evaluation_timeout=60.0, free_disk=16_000_000)
    nix = Nix(small_disk, limits, OFFLINE)

    with pytest.raises(LowDiskError, match=r"\d+\.\d MB, of which min_free_disk keeps 16\.0 MB"):
        await (resolve(nix, source, "evaluated") if evaluates else built_by(nix, source, "big", tmp_path))
    # What makes room is not stopped.
    (small_disk / "filler").write_bytes(bytes(9_000_000))
    await nix.collect_garbage(1 << 40)
    assert not list(nix.store_root.glob("*-big*"))


async def built_by(nix: Nix, source: PinnedSource, name: str, folder: Path) -> None:
    found = await resolve(nix, source, name)
    await nix.realise([found.derivation], folder / "roots", folder / "log", own=False)


# What is in the store


async def test_a_closure_has_every_store_path_once_with_its_own_size_and_references(
    build: Build, nix: Nix, tmp_path: Path
) -> None:
    source = packages(
        tmp_path / "set",
        """
        lib = build "a-lib" "echo lib > $out";
        tool = build "b-tool" "mkdir $out; echo ${lib} > $out/1; echo $out > $out/2";
        app = build "c-app" "echo ${tool} ${lib} > $out";
        """,
    )
    app = await build.of(source, "app")
    lib, tool = [(await resolve(nix, source, name)).store_path for name in ("lib", "tool")]

    closure = await nix.closure([app, tool, app])

    assert closure.roots == (tool, app)
    assert [(node.path, node.references) for node in closure.nodes] == [
        (lib, ()),
        (tool, (lib,)),
        (app, (lib, tool)),
    ]
    for node in closure.nodes:
        assert node.nar_size == nar_size(nix.store_root / node.path.base_name)


async def test_the_closure_of_what_is_not_there_is_an_error_of_nix(nix: Nix) -> None:
    with pytest.raises(NixError, match="is not valid"):
        await nix.closure([StorePath.parse(f"/nix/store/{'0' * 32}-nothing")])


async def test_a_file_or_folder_is_added_and_kept(nix: Nix, store: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("inside")
    (tmp_path / "script.sh").write_text("echo")

    folder = await nix.add(tmp_path / "folder", tmp_path / "roots")
    script = await nix.add(tmp_path / "script.sh", tmp_path / "roots")

    collect_garbage(store)
    assert (folder.name, script.name) == ("folder", "script.sh")
    assert (nix.store_root / folder.base_name / "file").read_text() == "inside"
    assert (nix.store_root / script.base_name).read_text() == "echo"
    shutil.rmtree(tmp_path / "roots")
    collect_garbage(store)
    assert not exists(nix, folder)
    assert not exists(nix, script)


async def test_a_store_path_that_is_there_can_be_kept_by_several(
    nix: Nix, store: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("kept by two")
    added = await nix.add(tmp_path / "file", tmp_path / "one")
    await nix.protect(added, tmp_path / "two")

    for roots, stays in (("one", True), ("two", False)):
        shutil.rmtree(tmp_path / roots)
        collect_garbage(store)
        assert exists(nix, added) is stays


async def test_what_is_not_in_the_store_can_not_be_kept(nix: Nix, tmp_path: Path) -> None:
    with pytest.raises(NixError):
        await nix.protect(StorePath.parse(f"/nix/store/{'0' * 32}-nothing"), tmp_path / "roots")


# Where it runs


async def test_sizes_are_of_all_store_paths_and_garbage_is_what_nothing_protects(tmp_path: Path) -> None:
    nix = Nix(tmp_path / "store", LIMITS)
    await nix.check()
    assert await nix.sizes() == {}
    for name in ("kept", "loose", "lost"):
        (tmp_path / name).write_text(name * 1000)
        await nix.add(tmp_path / name, tmp_path / f"roots-{name}")
    shutil.rmtree(tmp_path / "roots-loose")
    shutil.rmtree(tmp_path / "roots-lost")
    sizes = {path[44:]: size for path, size in (await nix.sizes()).items()}
    assert set(sizes) == {"kept", "loose", "lost"}
    assert all(size > 1000 * len(name) for name, size in sizes.items())
    assert sorted(path[44:] for path in await nix.garbage()) == ["loose", "lost"]
    await nix.collect_garbage(at_most=1)
    assert len(await nix.sizes()) == 2
    await nix.collect_garbage(at_most=1 << 62)
    assert [path[44:] for path in await nix.sizes()] == ["kept"]


def test_only_a_store_of_its_own_is_chandlerys_to_collect(tmp_path: Path) -> None:
    assert Nix(tmp_path, LIMITS).owns_store
    assert not Nix(None, LIMITS).owns_store


async def test_a_revision_that_is_gone_is_not_evaluated(nix: Nix) -> None:
    gone = PinnedSource("path", "/packages", "1" * 64, nix=None)
    with pytest.raises(RevisionGoneError, match="revision 1111111111111111 is not kept"):
        await nix.resolve(gone, SYSTEM, ["hello"])


async def test_without_nix_the_error_says_what_to_do(nix: Nix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")

    with pytest.raises(NixMissingError, match="apt-get install nix-bin"):
        await nix.check()


async def test_where_nix_can_not_build_that_is_said_at_the_start_with_what_to_do(
    nix: Nix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await nix.check_build()
    refusing = tmp_path / "nix-build"
    refusing.write_text("#!/bin/sh\necho 'error: user namespaces are not enabled' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    with pytest.raises(NixError, match=r"user namespaces are not enabled.*max_user_namespaces"):
        await nix.check_build()


async def test_a_check_gives_the_version_and_makes_the_store(tmp_path: Path) -> None:
    assert (await Nix(tmp_path, LIMITS).check()).startswith("nix-store (Nix) ")
    assert (tmp_path / "nix/store").is_dir()


async def test_a_store_that_can_not_be_made_is_told_by_a_check() -> None:
    with pytest.raises(NixError, match="/proc/store"):
        await Nix(Path("/proc/store"), LIMITS).check()


async def test_a_store_of_its_own_does_not_depend_on_how_this_machine_configures_nix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = tmp_path / "hostile/nix/nix.conf"
    hostile.parent.mkdir(parents=True)
    hostile.write_text("sandbox = false\nstore = dummy://\nmax-jobs = 0\npost-build-hook = /bin/false\n")
    for name, value in {
        "NIX_CONF_DIR": str(hostile.parent),
        "NIX_USER_CONF_FILES": str(hostile),
        "XDG_CONFIG_HOME": str(hostile.parent.parent),
        "NIX_CONFIG": "store = dummy://",
        "NIX_REMOTE": "daemon",
        "NIX_STORE_DIR": "/elsewhere",
        "NIX_STATE_DIR": "/nonexistent",
        "NIX_PATH": "nix=/nonexistent",
    }.items():
        monkeypatch.setenv(name, value)
    build = Build(Nix(tmp_path / "store", LIMITS), tmp_path / "roots", tmp_path / "log")
    async with web_server("200 OK", b"right") as port:
        source = packages(
            tmp_path / "set",
            FETCH % (port, "right") + 'sandboxed = build "sandboxed" "test ! -e /etc/hostname; echo > $out";',
        )

        app = await build.of(source, "app")
    await Build(build.nix, tmp_path / "others", build.log).of(source, "sandboxed")

    assert app.text.startswith("/nix/store/")
    assert (tmp_path / "store/nix/store" / app.base_name).exists()


def test_an_ordinary_user_can_build_in_a_store_of_its_own() -> None:
    script = """
import asyncio, sys
from pathlib import Path
from chandlery.nix.nix import Nix, NixLimits
from chandlery.nix.pinned_source import PinnedSource

async def main(folder: Path) -> None:
    nix = Nix(folder / "store", NixLimits())
    await nix.check()
    tree = str(folder / "set")
    source = PinnedSource("path", tree, "", nix={"tree": tree})
    found = (await nix.resolve(source, "x86_64-linux", ["app"]))["app"]
    await nix.realise([found.derivation], folder / "roots", folder / "log")
    closure = await nix.closure([found.store_path])
    print(*(node.path.name for node in closure.nodes))
    print((nix.store_root / found.store_path.base_name).read_text())

asyncio.run(main(Path(sys.argv[1])))
"""
    with ordinary_folder() as folder:
        packages(
            folder / "set",
            'lib = build "lib" "echo > $out"; app = build "app" "echo ${lib} > $out; id --user";',
        )
        printed = run_as_ordinary_user(script, str(folder)).split()

    assert printed[:2] == ["app", "lib"]
    assert printed[2].endswith("-lib")
