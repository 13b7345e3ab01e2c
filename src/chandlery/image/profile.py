"""What an image is beside its packages: user, entrypoint, command, environment and so on. No I/O.

A profile is a first part of an image name, as `shell` in `shell/git`. Two ship; the settings file declares
others, or others of the same name. What the name of a profile means depends on the settings alone: where a
profile can stand, no package of a package set takes its place.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

# In every image: a CA bundle, and the names of protocols and services.
BASE_PACKAGES = ("cacert", "iana-etc")

_USER = re.compile(r"root|nobody|nonroot|[0-9]{1,9}(:[0-9]{1,9})?")
_PORT = re.compile(r"([0-9]{1,5})(/(tcp|udp|sctp))?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NAMED_USERS = {"root": "0:0", "nobody": "65534:65534", "nonroot": "65532:65532"}


@dataclass(frozen=True, slots=True)
class Account:
    """Whom programs run as; the account stands in the image, with a home of its own."""

    name: str
    uid: int
    gid: int

    @property
    def home(self) -> str:
        """The path of the home, without the slash that it begins with."""
        return f"home/{self.name}"


@dataclass(frozen=True, slots=True)
class Profile:
    """What a profile asks for; what is empty is left to other profiles, or to what images have anyway.

    `packages` are attribute paths as nixpkgs has them. `user` is root, nobody, nonroot, or UID or UID:GID; it
    has an account in the image. `exposed_ports` are as in image-spec: `8080/tcp`. `ValueError` says what is
    wrong.
    """

    packages: tuple[str, ...] = ()
    user: str = ""
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)
    working_directory: str = ""
    exposed_ports: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.user and _USER.fullmatch(self.user) is None:
            raise ValueError(f"user {self.user!r}: write root, nobody, nonroot, UID or UID:GID")
        if self.working_directory and not self.working_directory.startswith("/"):
            raise ValueError(f"working_directory {self.working_directory!r}: it begins with /")
        for port in self.exposed_ports:
            match = _PORT.fullmatch(port)
            if match is None or not 0 < int(match[1]) < 65536:
                raise ValueError(f"exposed_ports: {port!r} is no port: write 8080, 8080/tcp or 8080/udp")
        texts = (*self.packages, *self.entrypoint, *self.command, self.working_directory)
        if any("\0" in text for text in (*texts, *self.environment.values(), *self.labels.values())):
            raise ValueError("no text may have a zero byte in it")
        if not all(re.fullmatch(r"[\w.+-]+", package) for package in self.packages):
            raise ValueError(
                f"packages {list(self.packages)}: name attribute paths, such as python3Packages.numpy"
            )
        if not all(self.labels):
            raise ValueError("labels: one has no name")
        for name in self.environment:
            if _VARIABLE.fullmatch(name) is None:
                raise ValueError(f"environment: {name!r} is no name of a variable")

    def over(self, other: Self) -> Self:
        """Return both profiles as one: lists and tables are joined, and of single values this one's count."""
        both: dict[str, Any] = {}
        for each in fields(self):
            mine, others = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, Mapping):
                both[each.name] = {**others, **mine}
            elif each.name in ("packages", "exposed_ports"):
                both[each.name] = tuple(dict.fromkeys([*others, *mine]))
            else:
                both[each.name] = mine or others
        return type(self)(**both)

    @property
    def user_and_group(self) -> str:
        """The user as numbers: Kubernetes can't tell that a name isn't root. Empty without a user."""
        user, _, group = _NAMED_USERS.get(self.user, self.user).partition(":")
        return f"{user}:{group or user}" if user else ""

    @property
    def account(self) -> Account | None:
        """The account that images of this profile have beside those of every image."""
        if not self.user or self.user_and_group in (_NAMED_USERS["root"], _NAMED_USERS["nobody"]):
            return None
        uid, gid = map(int, self.user_and_group.split(":"))
        return Account("nonroot" if self.user_and_group == _NAMED_USERS["nonroot"] else "user", uid, gid)

    def key_parts(self) -> list[str]:
        """Return all of it as text, for an image's key."""
        parts: list[str] = []
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, str):
                value = (value,)
            elif isinstance(value, Mapping):
                value = [text for pair in sorted(value.items()) for text in pair]
            parts += [each.name, str(len(value)), *value]
        return parts


SHELL = "shell"

SHIPPED: Mapping[str, Profile] = {
    # Only a shell brings the locale along: without it, programs complain of a LANG that isn't there.
    SHELL: Profile(
        packages=(
            "bashInteractive",
            "coreutils",
            "findutils",
            "gawk",
            "gnugrep",
            "gnused",
            "gnutar",
            "gzip",
            "less",
            "nano",
            "ncurses",
            "procps",
            "which",
        ),
        command=("/bin/bash",),
        environment={"LANG": "C.UTF-8"},
    ),
    "nonroot": Profile(
        user="nonroot", environment={"HOME": "/home/nonroot"}, working_directory="/home/nonroot"
    ),
}
