"""How large packages of a Debian suite will be, with all that they need, as its index says."""

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import msgspec

from chandlery.sources.debian.snapshot import shard_of


class _Deb(msgspec.Struct, frozen=True):
    installed_size: int = 0  # KiB


class _Unit(msgspec.Struct, frozen=True):
    debs: tuple[_Deb, ...] = ()
    references: tuple[str, ...] = ()


class _Shard(msgspec.Struct, frozen=True):
    """One file of a snapshot, of which more is read than this."""

    names: dict[str, str] = {}
    units: dict[str, _Unit] = {}


def installed_size(snapshot: Path, packages: Iterable[str]) -> int | None:
    """Return the bytes that packages take with all that they need, by the estimates of their maintainers.

    Names that the snapshot doesn't have count as nothing. It is None if the snapshot is gone.
    """

    @cache
    def shard(key: str) -> _Shard:
        return msgspec.json.decode((snapshot / f"{key}.json").read_bytes(), type=_Shard)

    try:
        return _size(lambda name: shard(shard_of(name)), packages)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _size(shard: Callable[[str], _Shard], packages: Iterable[str]) -> int:
    found = (shard(name).names.get(name) for name in packages)
    waiting = {unit for unit in found if unit is not None}
    seen: set[str] = set()
    size = 0
    while waiting:
        name = waiting.pop()
        seen.add(name)
        unit = shard(name).units.get(name, _Unit())
        size += sum(deb.installed_size for deb in unit.debs) << 10
        waiting |= {*unit.references} - seen
    return size
