"""Debian packages made of literals: small, and odd in the ways that Debian's own are."""

import io
import lzma
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

ARCHITECTURES = ("amd64", "arm64")


@dataclass(frozen=True)
class Member:
    """What stands at one path of a package; `link` is where a link leads."""

    content: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    type: bytes = tarfile.REGTYPE
    link: str = ""


def program(content: bytes = b"#!/bin/sh\n", mode: int = 0o755) -> Member:
    return Member(content, mode)


def directory(mode: int = 0o755, uid: int = 0, gid: int = 0) -> Member:
    return Member(mode=mode, uid=uid, gid=gid, type=tarfile.DIRTYPE)


def symlink(target: str) -> Member:
    return Member(mode=0o777, type=tarfile.SYMTYPE, link=target)


def hard_link(path: str) -> Member:
    """Another name of a file that stands earlier in the package."""
    return Member(type=tarfile.LNKTYPE, link=f"./{path}")


@dataclass(frozen=True)
class Deb:
    """A binary package (deb(5)): what its control file says, and what it holds.

    `any` stands for every architecture; in its files `@architecture@` is the one that it was built for.
    """

    name: str
    version: str = "1"
    architecture: str = "all"
    fields: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Member] = field(default_factory=dict)
    postinst: str = ""

    def control(self, architecture: str) -> str:
        """Return the control file, without an end of paragraph."""
        fields = {
            "Package": self.name,
            "Version": self.version,
            "Architecture": "all" if self.architecture == "all" else architecture,
            "Maintainer": "Nobody <nobody@localhost>",
            **self.fields,
            "Description": f"{self.name}, for tests",
        }
        return "".join(f"{name}: {value}\n" for name, value in fields.items())

    def file_name(self, architecture: str) -> str:
        """Return the name that the .deb has in a repository."""
        own = "all" if self.architecture == "all" else architecture
        return f"{self.name}_{self.version.rpartition(':')[2]}_{own}.deb"

    def build(self, architecture: str) -> bytes:
        """Return the .deb; the same one every time."""
        conffiles = "".join(f"/{path}\n" for path in self.files if path.startswith("etc/"))
        control = {
            "control": Member(self.control(architecture).encode()),
            "conffiles": Member(conffiles.encode()),
        }
        if self.postinst:
            control["postinst"] = program(self.postinst.encode())
        return _ar(
            {
                "debian-binary": b"2.0\n",
                "control.tar.xz": lzma.compress(_tar(control, architecture), preset=0),
                "data.tar.xz": lzma.compress(_tar(self.files, architecture), preset=0),
            }
        )


def _tar(files: Mapping[str, Member], architecture: str) -> bytes:
    """Archive files under `./`, with the folders above them."""
    parents = {str(each) for path in files for each in PurePosixPath(path).parents} - {"."}
    members = {**dict.fromkeys(sorted(parents), directory()), **files}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for path, member in {"": directory(), **members}.items():
            content = member.content.replace(b"@architecture@", architecture.encode())
            info = tarfile.TarInfo(f"./{path}")
            info.type, info.linkname, info.mode = member.type, member.link, member.mode
            info.uid, info.gid, info.size, info.mtime = member.uid, member.gid, len(content), 1
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _ar(members: Mapping[str, bytes]) -> bytes:
    """Make an archive as deb(5) has it."""
    archive = b"!<arch>\n"
    for name, content in members.items():
        archive += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        archive += content + b"\n" * (len(content) % 2)
    return archive


MAWK_POSTINST = """\
#!/bin/sh
set -e
case "$1" in
    configure|abort-upgrade)
        update-alternatives --quiet \\
            --install /usr/bin/awk awk /usr/bin/mawk 5 \\
            --slave /usr/share/man/man1/awk.1.gz awk.1.gz /usr/share/man/man1/mawk.1.gz \\
            --slave /usr/bin/nawk nawk /usr/bin/mawk
        ;;
esac
exit 0
"""

VIM_POSTINST = """\
#!/bin/sh
set -e
if [ "$1" = configure ]; then
    for name in vi view editor; do
        update-alternatives --install /usr/bin/$name $name /usr/bin/vim.tiny 15
    done
    if [ -x /usr/bin/vim.gtk3 ]; then
        update-alternatives --install /usr/bin/gvim gvim /usr/bin/vim.gtk3 15
    fi
fi
"""

# libc6 and libgcc-s1 need each other, as Debian's do.
PACKAGES = (
    Deb(
        "libc6",
        "2.36-9+deb12u1",
        "any",
        {"Depends": "libgcc-s1, gone | libcrypt1 (>= 1:4)", "Priority": "optional"},
        {
            "lib/libc.so.6": Member(b"libc of @architecture@\n", 0o755),
            "lib64/ld-linux.so.2": symlink("/lib/libc.so.6"),
        },
    ),
    Deb("libgcc-s1", "12.2.0-14", "any", {"Depends": "gcc-12-base (= 12.2.0-14), libc6 (>= 2.35)"}),
    Deb("gcc-12-base", "12.2.0-14", "any"),
    Deb("libcrypt1", "1:4.4.33-2", "any", {"Depends": "libc6 (>= 2.36)"}),
    Deb(
        "bash",
        "5.2.15-2+b2",
        "any",
        {"Pre-Depends": "libc6 (>= 2.36)", "Priority": "required", "Multi-Arch": "foreign"},
        {
            "bin/bash": program(b"bash of @architecture@\n"),
            "bin/rbash": symlink("bash"),
            "usr/share/doc/bash/README": Member(b"read me\n"),
            "etc/bash.bashrc": Member(b"PS1='$ '\n"),
        },
    ),
    Deb(
        "passwd",
        "1:4.13~rc1",
        "any",
        {"Depends": "libc6"},
        {
            "bin/su": program(b"su", 0o4755),
            "usr/bin/chage": Member(b"chage", 0o2755, gid=42),
            "etc/shadow file": Member(b"secret", 0o640, gid=42),
            "var/mail": directory(0o2775, gid=8),
            "var/lib/sessions": directory(0o1733),
            "etc/private": directory(0o700),
            "etc/private/key": Member(b"key", 0o600),
        },
    ),
    Deb(
        "perl",
        "5.36.0-7",
        "any",
        {"Depends": "libc6:any, perl-modules"},
        {
            "bin/perl": program(b"perl"),
            "bin/perl-link": hard_link("bin/perl"),
            "usr/bin/perl5.36": hard_link("bin/perl"),
        },
    ),
    Deb("perl-modules", "5.36.0-7", fields={"Depends": "perl"}, files={"usr/share/perl/a.pm": Member(b"1;")}),
    Deb(
        "mawk",
        "1.3.4",
        "any",
        {"Depends": "libc6", "Provides": "awk", "Priority": "required"},
        {"usr/bin/mawk": program(), "usr/share/man/man1/mawk.1.gz": Member()},
        MAWK_POSTINST,
    ),
    Deb("original-awk", "1", "any", {"Provides": "awk"}, {"usr/bin/original-awk": program()}),
    Deb("vim-tiny", "2:9", "any", files={"usr/bin/vim.tiny": program()}, postinst=VIM_POSTINST),
    Deb("git", "1:2.39.5-0+deb12u1", "any", {"Depends": "libc6, perl, awk, git-man (<< 1:2.39.5-.)"}),
    Deb("git-man", "1:2.39.5-0+deb12u1", files={"usr/share/man/man1/git.1.gz": Member(b"git")}),
    Deb(
        "ca-certificates",
        "20230311",
        fields={"Depends": "openssl | libssl"},
        files={
            "usr/share/ca-certificates/mozilla/One.crt": Member(b"one"),
            "usr/share/ca-certificates/mozilla/Two.crt": Member(b"two\n"),
        },
    ),
    Deb("ncurses-base", "6.4", files={"lib/terminfo/x/xterm": Member(b"xterm")}),
    Deb("libc-bin", "2.36", "any", files={"usr/lib/locale/C.utf8/LC_CTYPE": Member(b"letters")}),
    Deb("ncurses-bin", "6.4", "any", files={"usr/bin/tput": program()}),
    Deb("netbase", "6.4", files={"etc/services": Member(b"http 80/tcp\n")}),
    Deb("broken", "1", fields={"Depends": "not-in-the-suite"}),
)
