import platform
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from chandlery.layers.alternatives import parse
from chandlery.nix.nix import EXPRESSIONS
from tests.support.ordinary_user import ordinary_folder, run_as_ordinary_user

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

# Writes a file, without a redirection.
HISTORY = "shopt -so history; history -s written; history -w"


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
        f"{HISTORY} made",
        f"{HISTORY} /made; {HISTORY} /dev/made",
        f"{HISTORY} /usr/bin/own; {HISTORY} /usr/bin/made",
    ],
)
def test_a_script_can_run_no_program_and_write_no_file(package: Package, attempt: str) -> None:
    assert package.recorded(f"{ONE}\n{attempt}\n{TWO}\n") in (["one", "two"], ["one"])
    assert package.left() == set()
    assert [(path.name, path.read_bytes()) for path in (package.root / "usr/bin").iterdir()] == [("own", b"")]


def static_program(says: bytes) -> bytes:
    """Return an ELF file that writes a text and needs nothing else (x86-64, Linux)."""
    code = (
        b"\xb8\x01\0\0\0"  # mov eax, 1 (write)
        b"\xbf\x01\0\0\0"  # mov edi, 1
        b"\x48\x8d\x35\x10\0\0\0"  # lea rsi, [rip + 16]
        b"\xba" + len(says).to_bytes(4, "little") + b"\x0f\x05"  # mov edx, the length; syscall
        b"\xb8\x3c\0\0\0\x31\xff\x0f\x05" + says  # mov eax, 60 (exit); xor edi, edi; syscall
    )
    base, headers = 0x400000, 64 + 56
    size = headers + len(code)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + headers, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096)
    return header + segment + code


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the program is one of x86-64")
@pytest.mark.parametrize("folder", ["nonexistent", "none", ".bash/none", "usr/bin", "bin"])
def test_no_program_of_the_package_runs_either(package: Package, folder: str) -> None:
    made = package.root / folder / "own-program"
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_bytes(static_program(b"alternative\t/usr/bin/ran\tran\t/usr/bin/own\t1\n"))
    made.chmod(0o755)
    assert subprocess.run([made], check=True, capture_output=True).stdout.startswith(b"alternative")
    attempts = f"own-program; command own-program; /{folder}/own-program; exec own-program"
    assert package.recorded(f"{ONE}\n{attempts}\n") == ["one"]


@pytest.mark.parametrize(
    "sees",
    [
        "[ -e /usr/bin/env ]",
        "test -d /etc -o -d /var",
        "builtin [ -x /usr/bin/perl ]",
        "[[ -x /usr/bin/perl ]]",
        "[[ -e /etc/os-release || -d /etc || -d /proc ]]",
        "[ /usr/bin/env -nt /nonexistent ]",
        "[ -e /usr/bin/link ]",
        "read -r line < /var/lib/dpkg/status",
        '[ -n "$(< /etc/passwd)" ]',
        'mapfile lines < /proc/version && [ -n "${lines[0]}" ]',
        'history -c; history -r /etc/passwd; [ -n "$(history)" ]',
        ". os-release",
        "shopt -uo noglob; for each in /etc/*; do [ \"$each\" != '/etc/*' ]; done",
        'for each in $(compgen -f /); do [ "$each" = /etc ] && break; done',
    ],
)
def test_a_script_sees_no_file_of_this_machine(package: Package, sees: str) -> None:
    # A link leads where it will in an image.
    (package.root / "usr/bin/link").symlink_to("/usr/bin/env")

    assert package.recorded(f"{sees} && {TWO}; {ONE}") == ["one"]


@pytest.mark.parametrize(
    "sees",
    [
        "[ -x /usr/bin/own ]",
        "[[ -x /usr/bin/own && ! -e /usr/bin/env ]]",
        "[ -e /usr/bin/link -a -L /usr/bin/link ]",
        "[ -d /bin ]",
        "read -r line < /motd",
        ": < /dev/null",
    ],
)
def test_a_script_sees_what_its_package_has_at_the_root(package: Package, sees: str) -> None:
    (package.root / "usr/bin/link").symlink_to("/usr/bin/own")
    (package.root / "bin").symlink_to("usr/bin")
    (package.root / "motd").write_text("welcome\n")
    (package.root / "dev").mkdir()

    assert package.recorded(f"{sees} && {ONE}") == ["one"]


def test_an_ordinary_user_reads_scripts_too_and_is_told_where_that_cannot_be() -> None:
    recorder = (EXPRESSIONS / "record_alternatives.sh").read_text()
    script = f"""
import subprocess, sys
from pathlib import Path
folder = Path(sys.argv[1])
(folder / "package/usr/bin").mkdir(parents=True)
(folder / "record.sh").write_text({recorder!r})
forbidden = ("unshare", "--user", "--map-user=1000", "--keep-caps", "bash", "-euc",
             'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"', "sh")
for before in ((), forbidden):
    command = [*before, "bash", folder / "record.sh", folder / "package"]
    result = subprocess.run(command, input={ONE!r}, cwd=folder, capture_output=True, text=True)
    print(result.returncode, result.stdout.split("\t")[:2], result.stderr)
"""
    with ordinary_folder() as folder:
        printed = run_as_ordinary_user(script, str(folder)).splitlines()

    assert printed[0] == "0 ['/usr/bin/one', 'one'] "
    assert printed[1].startswith("1 [''] a maintainer script is read in a user namespace: let builders ")
    assert "unshare failed" in printed[1]


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
