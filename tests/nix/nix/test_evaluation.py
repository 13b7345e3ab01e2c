import asyncio
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chandlery.errors import (
    BrokenError,
    EvaluationError,
    EvaluationFailedError,
    EvaluationMemoryError,
    EvaluationTimeoutError,
    InfiniteRecursionError,
    InsecureError,
    NotAPackageError,
    UnfreeError,
    UnsupportedSystemError,
    evaluation_error,
)
from chandlery.nix.closure import StorePath
from chandlery.nix.configuration import host_paths
from chandlery.nix.evaluation import PackageSet
from chandlery.nix.nix import EXPRESSIONS, Nix, NixLimits, NixOptions, Resolution
from chandlery.nix.pinned_source import PinnedSource
from tests.support.nix_package_set import SYSTEM, nixpkgs_shape, packages, requires_nix, resolve, source_of

pytestmark = requires_nix

OFFLINE = NixOptions(substituters=(), host_paths=tuple(host_paths()))
MIB = 1 << 20


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def nix(store: Path) -> Nix:
    return Nix(store, NixLimits(evaluation_timeout=60.0, evaluation_memory=1000 * MIB), OFFLINE)


@contextmanager
def files_over_http(folder: Path) -> Iterator[str]:
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def error_of(answers: Mapping[str, Resolution]) -> EvaluationError:
    return evaluation_error(
        {path: {"reason": each.status, "message": each.message} for path, each in answers.items()}
    )


# Looking up


@pytest.mark.parametrize(
    ("attribute_path", "name", "output"),
    [
        ("hello", "hello-2.12", "out"),
        ("sdl2", "SDL2-1.0", "out"),
        ("1password", "1password-1.0", "out"),
        ("_1password", "1password-1.0", "out"),
        ("1PASSWORD", "1password-1.0", "out"),
        ("python3packages.numpy", "numpy-1.0", "out"),
        ("python3Packages.deep.er.package", "deep-1.0", "out"),
        ("haskellpackages.cabal", "Cabal-1.0", "out"),
        ("openssl", "openssl-3.0", "bin"),
        ("openssl.out", "openssl-3.0", "out"),
        ("openssl.man", "openssl-3.0", "man"),
        ("openssl.dev.man", "openssl-3.0", "man"),
        ("devfirst", "dev-first-1.0", "dev"),
        ("hello.out", "hello-2.12", "out"),
        ("old-hello", "hello-2.12", "out"),
        ("imported", "hello-2.12", "out"),
    ],
)
async def test_a_package_of_nixpkgs_shape_is_found(
    nix: Nix, attribute_path: str, name: str, output: str
) -> None:
    found = await resolve(nix, nixpkgs_shape(), attribute_path)

    assert (found.status, found.name, found.output) == ("found", name, output)
    assert found.store_path.name == (name if output == "out" else f"{name}-{output}")


@pytest.mark.parametrize("attribute_path", ["openssl.doc", "hello.dev", "numpy", "_hello", "1", "hello.1"])
async def test_what_a_set_of_nixpkgs_shape_does_not_have_is_not_found(nix: Nix, attribute_path: str) -> None:
    assert (await resolve(nix, nixpkgs_shape(), attribute_path)).status == "not_found"


async def test_below_a_package_its_outputs_are_the_names(nix: Nix) -> None:
    assert await nix.attribute_names(nixpkgs_shape(), SYSTEM, ["openssl"]) == ["bin", "dev", "out", "man"]
    assert "unrar" in await nix.attribute_names(nixpkgs_shape(), SYSTEM, [])


async def test_an_underscore_before_a_digit_may_be_left_out_at_any_level(nix: Nix, tmp_path: Path) -> None:
    source = packages(
        tmp_path,
        """
        _7zip = build "underscore" "echo > $out";
        "0ad" = build "exact" "echo > $out"; _0ad = _7zip;
        _0AD = _7zip;
        within._3Proxy = build "deep" "echo > $out";
        within._Letter = _7zip;
        twice = { _1A = _7zip; "1a" = build "one-a" "echo > $out"; _2b = _7zip; "2B" = _7zip; };
        """,
    )
    wanted = {
        "7zip": "underscore",
        "0ad": "exact",
        "within.3proxy": "deep",
        "within.letter": "",
        "twice.1a": "one-a",
        "twice.2b": "underscore",
        "twice.2B": "underscore",
        "twice._1a": "underscore",
        "8zip": "",
    }

    answers = await nix.resolve(source, SYSTEM, list(wanted))

    assert {path: answer.name for path, answer in answers.items()} == wanted


ANY_NAME = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20) | st.sampled_from(
    [
        '"',
        "${x}",
        '${throw "run"}',
        "''",
        "\\",
        "\n",
        "\\n",
        "a b",
        "$",
        "$$",
        "''${",
        ".",
        "/",
        "ü",
        "🙂",
        "--",
    ]
)


@settings(max_examples=25, deadline=None)
@given(st.lists(ANY_NAME, unique=True, min_size=1, max_size=10), st.randoms())
def test_a_name_finds_the_attribute_of_exactly_this_name_whatever_is_in_it(
    nix: Nix, tmp_path_factory: pytest.TempPathFactory, names: list[str], random: Random
) -> None:
    folder = tmp_path_factory.mktemp("set")
    there = random.sample(names, random.randint(0, len(names)))
    # By its place in the list, since a derivation can't have every name.
    (folder / "names.json").write_text(json.dumps(there))
    source = source_of(
        folder,
        """
        let
          names = builtins.fromJSON (builtins.readFile ./names.json);
          package = i: derivation { name = "package-${toString i}"; system = "s"; builder = "b"; };
        in builtins.listToAttrs (builtins.genList
          (i: { name = builtins.elemAt names i; value = package i; }) (builtins.length names))
        """,
    )

    answers = asyncio.run(nix.resolve(source, SYSTEM, names))

    for name in names:
        if name in there:
            assert answers[name].name == f"package-{there.index(name)}"
        elif not any(name.lower() == other.lower().removeprefix("_") for other in there) and "." not in name:
            assert answers[name] == Resolution(status="not_found")


# What a package set is called with


async def test_config_allows_what_nixpkgs_refuses(nix: Nix) -> None:
    refused = ["unrar", "broken", "insecure", "only-arm64", "needs-unfree"]
    allowing = nixpkgs_shape(
        allowUnfree=True,
        allowBroken=True,
        permittedInsecurePackages=["insecure-1.0"],
        allowUnsupportedSystem=True,
    )

    assert all(
        not each.found for each in (await nix.resolve(nixpkgs_shape(), "x86_64-linux", refused)).values()
    )
    assert all(each.found for each in (await nix.resolve(allowing, "x86_64-linux", refused)).values())


async def test_a_package_that_is_allowed_and_fails_is_not_called_unfree(nix: Nix, tmp_path: Path) -> None:
    source = packages(
        tmp_path,
        """
        u = { type = "derivation"; name = "u"; drvPath = throw "else"; inherit meta; };
        meta = { unfree = true; available = true; };
        """,
    )

    assert (await resolve(nix, source, "u")).status == "failed"


async def test_overlays_change_the_set_each_after_the_one_before(nix: Nix, tmp_path: Path) -> None:
    file, folder = tmp_path / "first.nix", tmp_path / "second"
    folder.mkdir()
    file.write_text("final: prev: { hello = prev.jq; added = prev.jq; }")
    (folder / "default.nix").write_text("final: prev: import ./more.nix { inherit prev; }")
    (folder / "more.nix").write_text("{ prev }: { again = prev.added; }")
    source = nixpkgs_shape([file, folder])

    names = ["hello", "added", "again", "greeter"]
    answers = await nix.resolve(source, SYSTEM, names)

    assert [answers[name].name for name in names] == ["jq-1.0", "jq-1.0", "jq-1.0", "greeter-1.0"]
    plain = await resolve(nix, nixpkgs_shape(), "greeter")
    assert answers["greeter"].derivation != plain.derivation


# Reasons


@pytest.mark.parametrize(
    ("attribute_path", "kind", "message", "advice"),
    [
        (
            "unrar",
            UnfreeError,
            "Package .unrar-7.0. in pkgs/make.nix:7 has an unfree license",
            "allowUnfree",
        ),
        ("needs-unfree", UnfreeError, "Package .unrar-7.0. in pkgs/make.nix:7 has an unfree", "allowUnfree"),
        ("broken", BrokenError, "Package .broken-1.0. in pkgs/make.nix:7 is marked as broken", "allowBroken"),
        (
            "insecure",
            InsecureError,
            "Package .insecure-1.0. in pkgs/make.nix:7 is mark",
            "permittedInsecurePackages",
        ),
        ("only-arm64", UnsupportedSystemError, "is not available on the requested hostPlatform", "arm64"),
        ("python3Packages", NotAPackageError, "it is a set", "within that set"),
        ("hello.meta", NotAPackageError, "it is a set", "within that set"),
        ("hello.passthru", NotAPackageError, "it is a set", "within that set"),
        ("hello.name", NotAPackageError, "it is a string", "within that set"),
        ("throws", EvaluationFailedError, "it was thrown", "authors"),
        ("aborts", EvaluationFailedError, "it was aborted", "authors"),
        ("wrong", EvaluationFailedError, "cannot add a set to an integer", "authors"),
        ("renamed", EvaluationFailedError, "'renamed' has been renamed to/replaced by 'hello'", "authors"),
        ("recursion", InfiniteRecursionError, "infinite recursion encountered", "authors"),
        ("deep", InfiniteRecursionError, "stack overflow", "authors"),
        (
            "eats",
            EvaluationMemoryError,
            "Nix was out of memory; the limit on this server is 0.977 GiB",
            "memory",
        ),
    ],
)
async def test_each_reason_is_an_error_of_its_own_that_says_what_to_do(
    nix: Nix, attribute_path: str, kind: type[EvaluationError], message: str, advice: str
) -> None:
    answers = await nix.resolve(nixpkgs_shape(), "x86_64-linux", [attribute_path])
    error = error_of(answers)

    assert type(error) is kind
    assert re.search(message, str(error))
    assert advice in kind.advice
    assert str(error).endswith(kind.advice)
    assert "refusing to evaluate" not in str(error)
    assert json.loads(json.dumps(vars(error))) == {
        "reasons": {attribute_path: {"reason": kind.reason, "message": answers[attribute_path].message}}
    }


async def test_different_reasons_are_one_error_that_tells_them_all(nix: Nix) -> None:
    answers = await nix.resolve(nixpkgs_shape(), SYSTEM, ["unrar", "broken", "recursion", "deep"])
    error = error_of(answers)

    assert type(error) is EvaluationError
    assert {path: why["reason"] for path, why in error.reasons.items()} == {
        "unrar": "unfree",
        "broken": "broken",
        "recursion": "infinite_recursion",
        "deep": "infinite_recursion",
    }
    for part in ("unrar is unfree: ", "broken is marked as broken: ", InfiniteRecursionError.advice):
        assert str(error).count(part) == 1


async def test_a_platform_decides_what_is_supported(nix: Nix) -> None:
    for system, supported in (("x86_64-linux", "only-amd64"), ("aarch64-linux", "only-arm64")):
        answers = await nix.resolve(nixpkgs_shape(), system, ["only-amd64", "only-arm64"])
        assert [path for path, answer in answers.items() if answer.found] == [supported]


@pytest.mark.parametrize(
    "lie",
    [
        'drvPath = "/etc/passwd"; outPath = "/etc/passwd";',
        'drvPath = "/etc"; outPath = builtins.toFile "x" "";',
        'drvPath = 3; outPath = "x";',
        'drvPath = toString ./evil.nix; outPath = builtins.toFile "x" "";',
        'drvPath = builtins.toFile "evil.nix" "1"; outPath = builtins.toFile "x" "";',
        'drvPath = "/nix/store/../../etc/x.drv"; outPath = builtins.toFile "x" "";',
        'outputName = "other"; drvPath = builtins.toFile "x" ""; outPath = "";',
    ],
)
async def test_what_is_no_derivation_is_never_taken_for_one(nix: Nix, tmp_path: Path, lie: str) -> None:
    source = packages(
        tmp_path, f'lie = {{ type = "derivation"; name = "lie"; {lie} }}; good = build "good" "";'
    )

    answers = await nix.resolve(source, SYSTEM, ["lie", "good"])

    assert (answers["lie"].status, answers["good"].status) == ("failed", "found")
    assert answers["lie"].message


# Limits


class WatchedNix(Nix):
    """Nix, with how many of its evaluations reached their limit of time, and the sum of these limits."""

    stopped = 0
    granted = 0.0

    async def _evaluate(
        self, packages: PackageSet, expression: str, about: Mapping[str, Any], timeout: float, *others: Any
    ) -> bytes | Resolution:
        answer = await super()._evaluate(packages, expression, about, timeout, *others)
        if isinstance(answer, Resolution) and answer.status == EvaluationTimeoutError.reason:
            self.stopped += 1
            self.granted += timeout
        return answer


@pytest.mark.slow
async def test_what_loops_is_told_from_what_was_asked_for_with_it(store: Path) -> None:
    nix = WatchedNix(store, NixLimits(evaluation_timeout=2.0), OFFLINE)
    names = [*("hello", "jq", "loops"), *("SDL2", "bash", "throws", "greeter", "unrar")]

    answers = await nix.resolve(nixpkgs_shape(), SYSTEM, names)

    # Once with the others, and once alone.
    assert nix.stopped == 2
    assert {path: answer.status for path, answer in answers.items()} == dict.fromkeys(names, "found") | {
        "loops": "time_limit",
        "throws": "failed",
        "unrar": "unfree",
    }
    assert isinstance(error_of({"loops": answers["loops"]}), EvaluationTimeoutError)


@pytest.mark.slow
async def test_however_many_loop_the_answer_comes_in_time(store: Path, tmp_path: Path) -> None:
    nix = WatchedNix(store, NixLimits(evaluation_timeout=1.0), OFFLINE)
    (tmp_path / "overlay.nix").write_text(
        """
        final: prev: builtins.listToAttrs (builtins.genList
          (n: { name = "loop-${toString n}"; value = prev.loops; }) 100)
        """
    )
    names = [f"loop-{number}" for number in range(100)]

    answers = await nix.resolve(nixpkgs_shape([tmp_path / "overlay.nix"]), SYSTEM, names)

    assert nix.granted <= 3 * 1.0
    assert {answer.status for answer in answers.values()} == {"time_limit"}
    assert set(answers) == set(names)


async def test_what_eats_memory_does_not_keep_others_from_being_found(nix: Nix) -> None:
    answers = await nix.resolve(nixpkgs_shape(), SYSTEM, ["hello", "eats", "jq", "deep", "greeter"])

    assert {path: answer.status for path, answer in answers.items()} == {
        "hello": "found",
        "eats": "memory_limit",
        "jq": "found",
        "deep": "infinite_recursion",
        "greeter": "found",
    }


@pytest.mark.parametrize(
    "eater",
    [
        "builtins.length (builtins.genList (n: n) 4000000000)",
        'builtins.stringLength (builtins.foldl\' (s: _: s + s) "abcdefgh" (builtins.genList (n: n) 64))',
        "builtins.length (builtins.genericClosure { startSet = [ { key = 0; } ]; "
        "operator = { key }: [ { key = key + 1; } ]; })",
    ],
)
async def test_memory_is_limited_however_it_is_taken(store: Path, tmp_path: Path, eater: str) -> None:
    nix = Nix(store, NixLimits(evaluation_memory=600 * MIB), OFFLINE)
    source = packages(tmp_path, f'eats = build "n-${{toString ({eater})}}" "";')

    assert (await resolve(nix, source, "eats")).status == "memory_limit"


async def test_a_nix_that_was_killed_had_no_memory(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "nix-instantiate"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")

    answer = await resolve(Nix(store, NixLimits(), OFFLINE), nixpkgs_shape(), "hello")

    assert (answer.status, answer.message.partition(";")[0]) == ("memory_limit", "Nix was killed by signal 9")


async def test_a_set_that_loops_is_not_evaluated_for_each_package(store: Path, tmp_path: Path) -> None:
    nix = WatchedNix(store, NixLimits(evaluation_timeout=1.0), OFFLINE)
    loops = "let n = builtins.genList (n: n) 65536; e = f: s: builtins.foldl' (a: _: f a) s n; in "
    source = source_of(tmp_path, loops + "builtins.seq (e (e (e (e (x: x + 1)))) 0) { }")
    names = [f"package-{number}" for number in range(100)]

    answers = await nix.resolve(source, SYSTEM, names)

    assert nix.stopped == 1
    assert {answer.status for answer in answers.values()} == {"time_limit"}
    assert await nix.attribute_names(source, SYSTEM, []) == []


# Safety


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "secret").write_text("the operator's secret")
    (folder / "secret.nix").write_text('"the operator\'s secret"')
    return folder


@pytest.mark.parametrize(
    "attempt",
    [
        "builtins.readFile /etc/passwd",
        'builtins.readFile "/etc/passwd"',
        'builtins.readFile "/proc/self/environ"',
        "builtins.readFile %(secret)s/secret",
        "import %(secret)s/secret.nix",
        "builtins.scopedImport { } %(secret)s/secret.nix",
        "builtins.readFile ./link",
        "builtins.readFile ./folder-link/secret",
        'builtins.readFile (./. + "/../secret/secret")',
        "toString (builtins.attrNames (builtins.readDir /root))",
        'builtins.hashFile "sha256" /etc/passwd',
        '"${/etc/passwd}"',
        'builtins.readFile "${./link}"',
        'builtins.readFile "${builtins.path { path = ./link; }}"',
        'toString (builtins.attrNames (builtins.readDir "${./folder-link}"))',
        'builtins.path { path = %(secret)s; name = "x"; }',
        "builtins.filterSource (_: _: true) %(secret)s",
        '(derivation { name = "x"; system = "x"; builder = "x"; src = /etc/passwd; }).drvPath',
        'builtins.fetchurl "file:///etc/passwd"',
        'builtins.fetchTarball "file://%(secret)s"',
        'builtins.readFile (builtins.fetchGit "file://%(repository)s" + "/tracked")',
        'builtins.readFile (builtins.fetchGit %(repository)s + "/tracked")',
        'builtins.readFile (builtins.fetchTree { type = "path"; path = "%(secret)s"; } + "/secret")',
        '(builtins.getFlake "path:%(secret)s").x',
        "toString <nixpkgs>",
        'builtins.findFile [ { path = "/etc"; prefix = "x"; } ] "x/passwd"',
        "builtins.storePath /nix/store",
        'builtins.exec [ "cat" "/etc/passwd" ]',
        'builtins.fetchMercurial "file://%(repository)s"',
        'builtins.fetchGit "ssh://127.0.0.1/repository"',
    ],
)
async def test_an_evaluation_reads_nothing_but_its_package_set(
    nix: Nix, tmp_path: Path, secret: Path, attempt: str
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "tracked").write_text("the operator's secret")
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "x"]):
        author = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        process = await asyncio.create_subprocess_exec("git", *author, *command, cwd=repository)
        assert await process.wait() == 0
    tree = tmp_path / "tree" / "source"
    tree.mkdir(parents=True)
    (tree / "link").symlink_to(secret / "secret")
    (tree / "folder-link").symlink_to(secret)
    expression = attempt % {"secret": secret, "repository": repository}

    answer = await resolve(nix, packages(tree, f"read = throw ({expression});"), "read")

    assert answer.status == "failed"
    assert "operator's secret" not in answer.message
    assert "root:" not in answer.message
    assert any(
        reason in answer.message
        for reason in (
            "is forbidden in restricted mode",
            "was not found in the Nix search path",
            "is disabled",
            "missing",
            "is not in the Nix store",
        )
    ), answer.message


async def test_of_folders_an_evaluation_sees_no_more_than_the_way_to_what_it_reads(
    nix: Nix, tmp_path: Path
) -> None:
    tree = tmp_path / "tree" / "source"
    (tmp_path / "tree" / "beside").mkdir(parents=True)
    expression = 'toString (map (path: builtins.attrNames (builtins.readDir path)) [ "/" %s %s/.. ])'

    answer = await resolve(nix, packages(tree, f"p = throw ({expression % (tmp_path, tree)});"), "p")

    # Nix 2.8 refuses it. Newer ones show names of which the package set knows all.
    if "is forbidden in restricted mode" not in answer.message:
        ways = {*tree.parts, *EXPRESSIONS.parts, "default.nix", "expressions"}
        assert set(answer.message.split()) <= ways


async def test_a_link_out_of_a_package_set_is_copied_as_a_link_at_most(nix: Nix, secret: Path) -> None:
    tree = secret.parent / "tree" / "source"
    tree.mkdir(parents=True)
    (tree / "link").symlink_to(secret / "secret")

    answer = await resolve(nix, packages(tree, 'p = throw "${./link}";'), "p")

    if "is forbidden in restricted mode" not in answer.message:
        assert (nix.store_root / StorePath.parse(answer.message).base_name).is_symlink()


async def test_an_evaluation_can_not_tell_what_is_on_the_machine(
    nix: Nix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPERATORS", "secret")
    source = packages(
        tmp_path,
        """
        exists = throw "<${toString (builtins.pathExists /etc/passwd)}>";
        environment = throw "<${builtins.getEnv "OPERATORS"}${builtins.getEnv "HOME"}>";
        path = throw (toString (map (each: each.prefix) builtins.nixPath));
        """,
    )

    answers = await nix.resolve(source, SYSTEM, ["exists", "environment", "path"])

    assert answers["environment"].message == "<>"
    assert answers["path"].message == "chandlery tree"
    assert answers["exists"].message == "<>"


async def test_a_package_set_can_do_what_it_needs(nix: Nix, tmp_path: Path) -> None:
    served, tree = tmp_path / "served", tmp_path / "tree" / "source"
    served.mkdir()
    (served / "file").write_text("fetched")
    (tree / "folder").mkdir(parents=True)
    (tree / "folder/file").write_text("file")
    (tree / "folder/package.nix").write_text('{ build }: build "imported" "cat ${./file} > $out"')
    (tree / "inner-link").symlink_to("folder")
    with files_over_http(served) as address:
        source = packages(
            tree,
            f"""
            imported = import ./folder/package.nix {{ inherit build; }};
            linked = import ./inner-link/package.nix {{ inherit build; }};
            copied = build "copied" "cat ${{./folder}}/file > $out";
            named = build "named" "cat ${{builtins.path {{ path = ./folder; name = "x"; }}}}/file > $out";
            filtered = build "filtered" "cat ${{builtins.filterSource (_: _: true) ./.}}/folder/file > $out";
            store = build "store" "echo ${{builtins.storeDir}} > $out";
            system = build "on-${{builtins.currentSystem}}" "echo > $out";
            fetched = build (builtins.readFile (builtins.fetchurl "{address}/file")) "echo > $out";
            generated = import (build "generated.nix" "echo '{{ name = \\"from-derivation\\"; }}' > $out");
            derived = build generated.name "echo > $out";
            listed = build (toString (builtins.attrNames (builtins.readDir made))) "echo > $out";
            made = build "made" "mkdir $out; echo > $out/in-derivation";
            """,
        )

        answers = await nix.resolve(
            source,
            SYSTEM,
            [
                "imported",
                "linked",
                "copied",
                "named",
                "filtered",
                "store",
                "system",
                "fetched",
                "derived",
                "listed",
            ],
        )

    assert {answer.message for answer in answers.values()} == {""}
    assert [answers[each].name for each in ("fetched", "derived", "listed")] == [
        "fetched",
        "from-derivation",
        "in-derivation",
    ]


@pytest.mark.parametrize("link", [True, False])
async def test_a_package_set_is_found_behind_a_link_to_its_folder(
    nix: Nix, tmp_path: Path, link: bool
) -> None:
    real = tmp_path / "real"
    packages(real / "source", 'hello = build "hello" "cat ${./default.nix} > $out";')
    (tmp_path / "link").symlink_to(real)
    folder = tmp_path / ("link" if link else "real") / "source"

    assert (await resolve(nix, PinnedSource("path", "x", "1", nix={"tree": str(folder)}), "hello")).found


@pytest.mark.parametrize(
    ("allowed", "reached"), [(("https:", "http:"), True), (("https:",), False), ((), False)]
)
async def test_an_evaluation_fetches_from_where_the_operator_allows(
    store: Path, tmp_path: Path, allowed: Sequence[str], reached: bool
) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served/file").write_text("fetched")
    nix = Nix(store, NixLimits(), NixOptions(tuple(allowed), substituters=()))
    with files_over_http(tmp_path / "served") as address:
        source = packages(
            tmp_path / "set", f'p = build (baseNameOf (builtins.fetchurl "{address}/file")) "";'
        )
        answer = await resolve(nix, source, "p")

    assert ("is forbidden in restricted mode" in answer.message) is not reached
