"""What `chandlery doctor` looks at: all that a server needs of its machine and of those that it asks.

Nothing is changed: what has to be written to try something is written to a folder that is made for it, on the
disk of the data folder, and removed. A server may run meanwhile.
"""

import asyncio
import os
import re
import shutil
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from chandlery.access.users import Users
from chandlery.doctor.certificate import CertificateRefusedError, good_until
from chandlery.doctor.examination import Check, Outcome, Status, in_thread
from chandlery.errors import ChandleryError, SettingsError
from chandlery.image.name import LATEST
from chandlery.maintenance.run_marker import RunMarker
from chandlery.nix.nix import Nix
from chandlery.nix.stores import AS_ROOT, AS_USER, MIXED, UNMIXED
from chandlery.server.parts import (
    HIDDEN,
    SHOWN,
    access_control,
    certificate,
    configured_popularity,
    hides_images,
    open_nix,
    open_sources,
    trust_domains,
)
from chandlery.settings.settings import Settings, SourceSettings
from chandlery.settings.values import without_secrets
from chandlery.storage.kinds import open_blob_store

# What nix.py calls is not in older ones, and the oldest that the tests run with.
_OLDEST_NIX, _OLDEST_TESTED_NIX = (2, 4), (2, 8)

# Seconds. apt fetches a whole index, and who asks a server that is slow has to wait.
_SOURCE_LIMIT = 300.0
_HTTP_LIMIT = 5.0
# Tokens live for an hour and signed URLs for minutes; apt and TLS refuse what isn't good yet, or any more.
_CLOCK_NOTICED, _CLOCK_WRONG = 30.0, 300.0
_CERTIFICATE_SOON = 14 * 86400.0

_LITTLE_SPACE = 5 << 30
_FEW_FILES, _NO_FILES = 200_000, 5_000
_LITTLE_MEMORY = 1 << 30

_URL = re.compile(r"https?://[^\s!]+")

Clock = Callable[[], float]


@contextmanager
def scratch_folder(data_dir: Path) -> Iterator[Path]:
    """Make a folder for what checks write: beside what a server writes, or where temporary files go."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="doctor-", dir=_nearest_folder(data_dir)))
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="doctor-"))
    try:
        yield folder
    finally:
        _remove(folder)


def machine_checks(settings: Settings, scratch: Path, clock: Clock = time.time) -> list[Check]:
    """Return the checks for these settings; what they write goes to `scratch`."""
    # All that has a folder of its own in the data folder has it there instead.
    aside = settings.model_copy(update={"data_dir": scratch})
    made = asyncio.Lock()
    checks = [
        Check("settings", partial(_settings, settings)),
        Check("data folder", lambda: in_thread(partial(_data_folder, settings))),
        Check("disk", lambda: in_thread(partial(_disk, settings))),
        Check("memory", lambda: in_thread(partial(_memory, settings))),
        Check("nix", partial(_nix, settings, aside, made)),
        Check("sandbox", partial(_sandbox, aside, made), limit=120.0),
        Check("storage", partial(_storage, aside)),
        Check("clock", partial(_clock, aside, clock)),
        Check("address", partial(_address, settings), limit=30.0),
        Check("access", lambda: in_thread(partial(_access, aside))),
    ]
    if settings.popularity:
        checks.append(Check("popularity", partial(_popularity, aside), limit=150.0))
    if settings.tls_certificate or settings.tls_key:
        checks.append(Check("certificate", lambda: in_thread(partial(_certificate, settings, aside, clock))))
    for name, source in settings.all_sources.items():
        pin = partial(_source, aside, name, source, made)
        checks.append(Check(f"sources.{name}" if name else "source", pin, _SOURCE_LIMIT))
    return checks


async def _settings(settings: Settings) -> Outcome:
    if settings.notices:
        return Outcome("; ".join(settings.notices), Status.WARNING)
    said = {str(each.origin) for each in settings.in_force() if each.origin.kind != "default"}
    return Outcome(f"from {', '.join(sorted(said))}" if said else "all are the defaults")


def _data_folder(settings: Settings) -> Outcome:
    folder = settings.data_dir
    if _is_there(folder) and not _is_folder(folder):
        return Outcome(f"{folder} is no folder", Status.FAILURE, "choose another with data_dir")
    nearest = _nearest_folder(folder)
    try:
        os.rmdir(tempfile.mkdtemp(prefix="doctor-", dir=nearest))  # noqa: PTH106
    except OSError as error:
        return Outcome(
            f"{nearest} can't be written: {error.strerror}",
            Status.FAILURE,
            "let the user that runs chandlery write there, or choose another with data_dir",
        )
    if nearest != folder:
        return Outcome(f"{folder} isn't there yet, and can be made")
    in_use = RunMarker(folder).is_held()
    return Outcome(f"{folder} can be written" + (", and a server uses it" if in_use else ""))


def _disk(settings: Settings) -> Outcome:
    folders = [_nearest_folder(settings.data_dir)]
    if settings.nix_store == "machine" and Path("/nix/store").is_dir():
        folders.append(Path("/nix/store"))
    outcomes = [_disk_of(folder, settings) for folder in folders]
    return max(outcomes, key=lambda outcome: list(Status).index(outcome.status))


def _disk_of(folder: Path, settings: Settings) -> Outcome:
    disk = os.statvfs(folder)
    free, size = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    text = f"{free / 1e9:,.1f} GB of {size / 1e9:,.1f} GB free where {folder} is"
    make_room = "free some, or set disk_limit, so that what was used least recently goes"
    if free < settings.min_free_disk:
        least = f"{settings.min_free_disk / 1e9:,.1f} GB"
        return Outcome(
            f"{text}: with less than min_free_disk ({least}) nothing is built", Status.FAILURE, make_room
        )
    # Some file systems have no fixed number of files, and say 0.
    if disk.f_files and disk.f_favail < _FEW_FILES:
        status = Status.FAILURE if disk.f_favail < _NO_FILES else Status.WARNING
        return Outcome(
            f"room for {disk.f_favail:,} more files where {folder} is, and an image has thousands",
            status,
            "remove files, or make a file system with more inodes",
        )
    if settings.disk_limit > size:
        return Outcome(f"{text}: disk_limit is more than it holds", Status.WARNING, "set a smaller one")
    if free < _LITTLE_SPACE:
        return Outcome(f"{text}: large images need more", Status.WARNING, make_room)
    return Outcome(text)


def _memory(settings: Settings) -> Outcome:
    described = dict(re.findall(r"^(\w+): +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
    total, available = (int(described[name]) << 10 for name in ("MemTotal", "MemAvailable"))
    limit = _memory_limit()
    if limit is not None:
        total, available = min(total, limit), min(available, limit)
    cores = len(os.sched_getaffinity(0))
    text = f"{available / 1e9:,.1f} GB of {total / 1e9:,.1f} GB free, {cores} processors"
    if available < _LITTLE_MEMORY:
        return Outcome(f"{text}: large package sets need more", Status.WARNING, "give it 2 GB or more")
    if settings.evaluation_memory > total:
        return Outcome(
            f"{text}: evaluation_memory is more than there is, so the kernel ends what takes too much",
            Status.WARNING,
            "set a smaller one",
        )
    return Outcome(text)


def _memory_limit() -> int | None:
    """Return the bytes that a container may have (cgroup v2, "memory.max"); None without a limit."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return None
    return None if limit == "max" else int(limit)


async def _opened(settings: Settings, made: asyncio.Lock) -> tuple[Nix, str]:
    """Return a Nix that has its store, and the version; Nix 2.8 fails if two make a store at once."""
    nix = open_nix(settings).own
    async with made:
        return nix, await nix.check()


async def _nix(settings: Settings, aside: Settings, made: asyncio.Lock) -> Outcome:
    if missing := _missing_store(settings):
        return missing
    # A store that isn't there would be made.
    there = settings.nix_store == "machine" or (settings.data_dir / "nix" / "nix").is_dir()
    _, said = await _opened(settings if there else aside, made)
    version = said.rpartition(" ")[2]
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    text = (
        f"Nix {version}, with {'a store of its own' if settings.nix_store == 'own' else 'the store in /nix'}"
    )
    if numbers < _OLDEST_NIX:
        return Outcome(
            f"{text}: it is too old", Status.FAILURE, f"install {'.'.join(map(str, _OLDEST_NIX))} or newer"
        )
    if numbers < _OLDEST_TESTED_NIX:
        tested = ".".join(map(str, _OLDEST_TESTED_NIX))
        return Outcome(f"{text}: it is older than {tested}, the oldest that is tested", Status.WARNING)
    if _mixed(aside):
        return Outcome(f"{text}: {MIXED}", Status.WARNING, UNMIXED)
    return Outcome(text)


def _mixed(aside: Settings) -> bool:
    nix = open_nix(aside)
    try:
        return nix.mix(trust_domains(open_sources(aside, nix)))
    except SettingsError:
        return False  # the check of that source says why


def _missing_store(settings: Settings) -> Outcome | None:
    """Tell that the machine's store isn't there, if that is to be used: Nix would try to make it."""
    if settings.nix_store == "own" or Path("/nix/store").is_dir():
        return None
    remedy = 'install Nix with its store, or set nix_store = "own"'
    return Outcome("there is no Nix store in /nix", Status.FAILURE, remedy)


async def _sandbox(aside: Settings, made: asyncio.Lock) -> Outcome:
    if missing := _missing_store(aside):
        return missing
    try:
        nix, _ = await _opened(aside, made)
        await nix.check_build()
        if not await nix.protects_this_machine():
            return Outcome(
                "Nix builds in its sandbox, and builders could change files of this machine",
                Status.WARNING,
                "run the server as an ordinary user, or let root make mount namespaces (CAP_SYS_ADMIN)",
            )
    except ChandleryError as error:
        return Outcome(without_secrets(str(error)), Status.FAILURE, _why_no_namespaces())
    if open_nix(aside).reach_the_kernel:
        return Outcome(f"Nix builds in its sandbox, and {AS_ROOT}", Status.WARNING, AS_USER)
    return Outcome("Nix builds in its sandbox")


def _why_no_namespaces() -> str:
    """Say which switch of the kernel keeps a user from making user namespaces, if one does."""
    forbidding = {
        "user/max_user_namespaces": "0",
        "kernel/unprivileged_userns_clone": "0",
        "kernel/apparmor_restrict_unprivileged_userns": "1",
    }
    for name, value in forbidding.items():
        file = Path("/proc/sys", name)
        if file.exists() and file.read_text().strip() == value:
            switch = name.replace("/", ".")
            return f"{switch} is {value}: set it to {'10000 or so' if 'max' in name else 1 - int(value)}"
    return ""


async def _source(aside: Settings, name: str, source: SourceSettings, made: asyncio.Lock) -> Outcome:
    sources = open_sources(_alone(aside, name, source), open_nix(aside))
    try:
        pinned = await sources.of("").pin(LATEST, sources.platforms("")[0])
        return Outcome(f"{sources.of('').text} is at {pinned.tag}")
    finally:
        await sources.close()


def _alone(aside: Settings, name: str, source: SourceSettings) -> Settings:
    """Return settings in which there is no other source."""
    return aside.model_copy(update={"sources": {name: source}, "source": name} if name else {"sources": {}})


async def _popularity(aside: Settings) -> Outcome:
    table = await configured_popularity(aside)
    groups = len(set(table.groups.values()))
    return Outcome(f"the table knows {len(table)} packages, and {groups} groups")


async def _storage(aside: Settings) -> Outcome:
    options = aside.storage_options
    with open_blob_store(aside.storage, aside.data_dir, options, redirects=False) as blobs:
        await blobs.check()
    where = aside.storage or "the data folder's disk"
    return Outcome(f"blobs can be written to {where}, read and deleted")


async def _clock(aside: Settings, clock: Clock) -> Outcome:
    urls = await _urls(aside)
    # Of a certificate that seems to have expired the clock may be the reason; nothing but a date is read.
    async with httpx.AsyncClient(verify=False, timeout=_HTTP_LIMIT) as client:  # noqa: S501
        for url in urls:
            try:
                told = (await client.head(url)).headers["date"]
                offset = clock() - parsedate_to_datetime(told).timestamp()
            except (httpx.HTTPError, KeyError, ValueError):
                continue
            text = f"{abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'} {urlsplit(url).hostname}"
            if abs(offset) <= _CLOCK_NOTICED:
                return Outcome(f"as that of {urlsplit(url).hostname}")
            status = Status.FAILURE if abs(offset) > _CLOCK_WRONG else Status.WARNING
            return Outcome(text, status, "set the clock, as by `timedatectl set-ntp true`")
    if not urls:
        return Outcome("no source has a server to compare it with")
    return Outcome("no server answered to compare it with", Status.WARNING)


async def _urls(aside: Settings) -> Sequence[str]:
    """Return addresses of servers that the sources ask anyway."""
    found: list[str] = []
    for name, source in aside.all_sources.items():
        try:
            sources = open_sources(_alone(aside, name, source), open_nix(aside))
            found += await sources.of("").upstreams()
        except ChandleryError:
            continue  # the check of this source says why
    return found


async def _address(settings: Settings) -> Outcome:
    where = f"{settings.host} port {settings.port}"
    try:
        await in_thread(partial(_bind, settings.host, settings.port))
    except OSError as error:
        # getaddrinfo's errors have no error number of the kernel's.
        if not isinstance(error, socket.gaierror) and await _answers(settings):
            return Outcome(f"a Chandlery answers at {where}")
        return Outcome(
            f"{where} can't be listened at: {error.strerror}",
            Status.FAILURE,
            "stop what listens there, or choose another with host or port",
        )
    return Outcome(f"{where} is free")


def _bind(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))


async def _answers(settings: Settings) -> bool:
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
    scheme = "https" if settings.tls_certificate else "http"
    address = f"[{local}]" if ":" in local else local
    # Whether its certificate is good is another check's business.
    async with httpx.AsyncClient(verify=False, timeout=_HTTP_LIMIT) as client:  # noqa: S501
        try:
            response = await client.get(f"{scheme}://{address}:{settings.port}/healthz")
            return bool(response.json() == {"alive": True})
        except (httpx.HTTPError, ValueError):
            return False


def _access(aside: Settings) -> Outcome:
    if aside.token_key_file and not aside.token_key_file.exists():
        # It would be made.
        aside = aside.model_copy(update={"token_key_file": None})
    control = access_control(aside)
    if aside.users_file:
        Users(aside.users_file)
    if hides_images(aside):
        return Outcome(HIDDEN, Status.WARNING, SHOWN)
    if aside.users_file:
        others = ", and who hasn't logged in" if aside.anonymous == "read" else ""
        return Outcome(f"the users in {aside.users_file} may pull{others}")
    if aside.anonymous == "read":
        return Outcome("everybody may pull, from other machines too")
    limited = ", within the access rules" if control else ""
    return Outcome(f"everybody on this machine may pull{limited}")


def _certificate(settings: Settings, aside: Settings, clock: Clock) -> Outcome:
    copy = certificate(aside)
    if copy is None or settings.tls_certificate is None or settings.tls_key is None:
        return Outcome("there is none")
    # Tries it with the library of the server, and tells whether the key is its own.
    copy.update()
    name = settings.tls_certificate
    try:
        good_until(name, settings.tls_key)
        end = good_until(name, settings.tls_key, urlsplit(settings.public_url).hostname or "")
    except CertificateRefusedError as error:
        return Outcome(f"clients will refuse {name}: {error}", Status.FAILURE, "get another")
    except (ssl.SSLError, OSError) as error:
        return Outcome(f"{name} can't be used: {error}", Status.FAILURE, "get another")
    days = (end - clock()) / 86400
    if end - clock() < _CERTIFICATE_SOON:
        return Outcome(f"{name} ends in {days:.0f} days", Status.WARNING, "renew it: no restart is needed")
    return Outcome(f"{name} is good for {days:.0f} days")


def _nearest_folder(folder: Path) -> Path:
    """Return the folder itself, or what of its path is there."""
    return next(each for each in (folder, *folder.parents) if _is_folder(each))


# `Path.exists` and `Path.is_dir` raise `PermissionError` below a folder that this user may not look into.


def _is_there(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112


def _remove(folder: Path) -> None:
    """Remove a folder with a Nix store in it, whose folders are read-only."""
    for parent, _, _ in os.walk(folder):
        Path(parent).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
