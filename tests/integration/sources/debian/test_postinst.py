import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from chandlery.layers.alternatives import parse
from chandlery.nix.nix import EXPRESSIONS

# What a maintainer script may do


@dataclass(frozen=True)
class Package:
    """An unpacked package, whose maintainer script is read in a folder of its own."""

    root: Path
    folder: Path

    def recorded(self, postinst: str) -> list[str]:
        """Return the names that a script registers."""
        run = subprocess.run(
            ["bash", EXPRESSIONS / "record_alternatives.sh", self.root],
            input=postinst.encode(errors="surrogateescape"),
            cwd=self.folder,
            check=True,
            capture_output=True,
            timeout=60,
        )
        return [alternative.master.name.decode() for alternative in parse(run.stdout)]

    def left(self) -> set[str]:
        """Return what the scripts wrote."""
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")} - {
            "postinst.restricted",
            "recorded",
        }


@pytest.fixture
def package(tmp_path: Path) -> Package:
    (tmp_path / "root/usr/bin").mkdir(parents=True)
    (tmp_path / "root/usr/bin/own").touch(mode=0o755)
    (tmp_path / "folder").mkdir()
    return Package(tmp_path / "root", tmp_path / "folder")


def install(name: str) -> str:
    return f"update-alternatives --install /usr/bin/{name} {name} /usr/bin/{name}.own 1"


ONE, TWO = install("one"), install("two")


@pytest.mark.parametrize(
    ("postinst", "names"),
    [
        (ONE, ["one"]),
        (f"#!/bin/sh -e\nset -e\nfalse\n{ONE}\nexit 0\n{TWO}", ["one"]),
        (f'if [ "$1" = configure ] && [ -z "$2" ]; then {ONE}; fi', ["one"]),
        (f'case "$1" in abort-*) {TWO};; configure|reconfigure) {ONE};; esac', ["one"]),
        (f"f() {{ {ONE}; }}\nf >/dev/null 2>&1 || true\n{TWO} > /dev/null", ["one", "two"]),
        (f"/usr/bin/{ONE}\n/usr/sbin/{TWO} 2>/dev/null >&2", ["one", "two"]),
        (f"if [ -x /usr/bin/own ]; then {ONE}; fi; if test ! -e /usr/bin/own; then {TWO}; fi", ["one"]),
        (f"[ -x /usr/bin/env ] && {TWO}; [ -d /usr/bin -a ! -d /etc ] && {ONE}", ["one"]),
        (f". /usr/share/debconf/confmodule\ndb_get x || true\n{ONE}", ["one"]),
        (
            "for name in one two; do update-alternatives --quiet --install /bin/$name $name /b 1; done",
            ["one", "two"],
        ),
        ("update-alternatives --remove one /usr/bin/one", []),
        ("update-alternatives --install /usr/bin/one one", []),
        ("for each in /usr/bin/*; do update-alternatives --install $each ${each##*/} $each 1; done", ["*"]),
        (f'v=$(dpkg --version); [ -n "$v" ] && {TWO}; command -v dpkg && {TWO}; {ONE}', ["one"]),
        (f"{ONE}\nif then fi", ["one"]),
        (f"#!/usr/bin/perl\nuse strict;\nmy %a = (b => 1);\nsystem('{ONE}') if $a{{b}};\n", []),
        ("", []),
        ("\udcff\udc80 binary \udcfe", []),
    ],
)
def test_what_a_script_would_register_is_recorded(package: Package, postinst: str, names: list[str]) -> None:
    assert package.recorded(postinst) == names
    assert package.left() == set()


@pytest.mark.parametrize(
    "attempt",
    [
        "touch made",
        "/usr/bin/touch made",
        "command touch made",
        "command -p touch made",
        "env touch made",
        "PATH=/usr/bin:/bin; touch made",
        "export PATH=/usr/bin; touch made",
        "set +r; builtin set +r; /usr/bin/touch made",
        "hash -p /usr/bin/touch t; t made",
        "BASH_CMDS[t]=/usr/bin/touch; t made",
        "exec /usr/bin/touch made",
        "enable -f /usr/lib/bash/mkdir mkdir; mkdir made",
        "bash -c 'touch made'; sh -c 'touch made'",
        'python3 -c \'open("made", "w")\'; perl -e \'open(F, ">made")\'',
        "echo > made",
        "echo >> made",
        "echo >| made",
        "echo &> made",
        "exec 3> made; echo >&3",
        "exec 3<> made",
        "unset -f command_not_found_handle; touch made",
        "function test { /usr/bin/touch made; }; [ -e /x ]",
        ": | tee made",
    ],
)
def test_a_script_can_run_no_program_and_write_no_file(package: Package, attempt: str) -> None:
    assert package.recorded(f"{ONE}\n{attempt}\n{TWO}\n") in (["one", "two"], ["one"])
    assert package.left() == set()


@pytest.mark.parametrize(
    "endless",
    [
        "while :; do :; done",
        "trap '' TERM XCPU; while :; do :; done",
        f"while :; do {TWO}; done",
        "x=x; while :; do x=$x$x; done",
    ],
)
def test_a_script_that_never_ends_is_stopped_and_what_it_said_before_counts(
    package: Package, endless: str
) -> None:
    assert package.recorded(f"{ONE}\n{endless}\n")[0] == "one"


def test_what_a_script_leaves_running_is_not_waited_for(package: Package) -> None:
    assert package.recorded(f"while :; do :; done &\n{ONE}\n") == ["one"]
