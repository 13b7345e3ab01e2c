"""The links that update-alternatives(1) keeps on a Debian system, decided instead of registered.

A store path with the root layout may say in `nix-support/alternatives` what its package's postinst would
register. Each line is one alternative, its fields separated by tabs:

    link  name  path  priority  [slave-link  slave-name  slave-path]...

as in `/usr/bin/awk awk /usr/bin/mawk 5 /usr/share/man/man1/awk.1.gz awk.1.gz /usr/share/man/man1/mawk.1.gz`.
The fields come from scripts that nobody here wrote, so what update-alternatives would refuse is left out.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from chandlery.nix.closure import StorePath

_MASTER_FIELDS = 4
_SLAVE_FIELDS = 3
_PATH = re.compile(rb"(?:/(?!\.\.?(?:/|$))[^/]+)+")
_NAME = re.compile(rb"(?!\.\.?$)[^/]+")
_PRIORITY = re.compile(rb"-?[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class AlternativeLink:
    """`link` leads to `/etc/alternatives/<name>`, and that to `path`; both are absolute."""

    link: bytes
    name: bytes
    path: bytes


@dataclass(frozen=True, slots=True)
class Alternative:
    """One way to provide a name: its own link, and those that come and go with it."""

    master: AlternativeLink
    priority: int
    slaves: tuple[AlternativeLink, ...]


def parse(content: bytes) -> Iterator[Alternative]:
    """Read a `nix-support/alternatives` file."""
    for line in content.split(b"\n"):
        fields = line.split(b"\t")
        master = _link(fields[: _MASTER_FIELDS - 1])
        if master is None or len(fields) < _MASTER_FIELDS or not _PRIORITY.fullmatch(fields[3]):
            continue
        starts = range(_MASTER_FIELDS, len(fields), _SLAVE_FIELDS)
        slaves = (_link(fields[start : start + _SLAVE_FIELDS]) for start in starts)
        yield Alternative(master, int(fields[3]), tuple(slave for slave in slaves if slave is not None))


def _link(fields: list[bytes]) -> AlternativeLink | None:
    """Make a link of its three fields; None if they can't be one."""
    match fields:
        case [link, name, path] if _PATH.fullmatch(link) and _NAME.fullmatch(name) and _PATH.fullmatch(path):
            return AlternativeLink(link, name, path)
    return None


def choose(
    alternatives: Iterable[tuple[StorePath, Alternative]], exists: Callable[[bytes], bool]
) -> list[AlternativeLink]:
    """Choose as update-alternatives does in automatic mode: for each name, the highest priority.

    An alternative whose path doesn't exist is none, and so is such a slave. Equal priorities are decided by
    the path, then by the store path. The links are ordered by the master's name, slaves after their master.
    """
    ranked = sorted(
        alternatives,
        key=lambda pair: (pair[1].master.name, -pair[1].priority, pair[1].master.path, pair[0]),
    )
    chosen: dict[bytes, Alternative] = {}
    for _, alternative in ranked:
        if alternative.master.name not in chosen and exists(alternative.master.path):
            chosen[alternative.master.name] = alternative
    return [
        link
        for alternative in chosen.values()
        for link in (alternative.master, *filter(lambda slave: exists(slave.path), alternative.slaves))
    ]
