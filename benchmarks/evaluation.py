"""From names to derivations: remembered, evaluated, and as a new nix-build for each image would do it."""

import asyncio
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.table import Table

from chandlery.builds.resolver import PackageResolver
from chandlery.image.name import LATEST
from chandlery.nix.configuration import NixConfiguration, NixLimits, NixOptions, Purpose, host_paths
from chandlery.nix.nix import EXPRESSIONS
from chandlery.oci.documents import Platform
from chandlery.server.parts import open_parts
from chandlery.settings.settings import Settings

_RUNS = 5
_TOOLS = (
    *("nmap", "tcpdump", "strace", "gdb", "tmux", "screen", "rsync", "socat", "lsof", "sysstat"),
    *("iotop", "ncdu", "tree", "ripgrep", "bat", "vim", "htop", "sqlite3", "zip", "unzip"),
)
_IMAGES: Sequence[tuple[str, Sequence[str]]] = (
    ("hello", ("hello",)),
    ("git/jq/curl", ("git", "jq", "curl")),
    ("twenty tools", _TOOLS),
    ("libreoffice", ("libreoffice",)),
)


async def table(data_dir: Path) -> Table:
    """Resolve each image's packages; medians. nix-build only says what it would build."""
    result = Table("from names to derivations", "remembered", "evaluated", "nix-build --dry-run")
    settings = Settings.load(data_dir=data_dir)
    async with open_parts(settings) as parts:
        pin = await parts.sources.of("").pin(LATEST, Platform.of_host())
        system = Platform.of_host().nix_system
        resolver = PackageResolver(parts.stores.nix, parts.stores.index)
        configuration = NixConfiguration(data_dir / "nix", NixLimits(), NixOptions(), data_dir)
        environment = configuration.environment(Purpose.OWN)
        source = pin.to_nix()
        run = partial(subprocess.run, env=environment, check=True, capture_output=True)
        start = _median(lambda: run(["nix-build", "--version"]))
        result.add_row("nothing: Nix starts", "", "", start)
        for title, packages in _IMAGES:
            await resolver.resolve(pin, system, packages)
            remembered, evaluated = [], []
            for _ in range(_RUNS):
                began = time.perf_counter()
                await resolver.resolve(pin, system, packages)
                remembered.append(time.perf_counter() - began)
                began = time.perf_counter()
                await resolver.resolve(pin, system, packages, remembered=False)
                evaluated.append(time.perf_counter() - began)
            arguments = [
                *("nix-build", "--dry-run", "--no-out-link", str(EXPRESSIONS / "debian.nix")),
                *("--arg", "lock", source["lock"], "--arg", "mirrors", _nix_list(source["mirrors"])),
                *("--arg", "hostPaths", _nix_list(host_paths())),
                *(word for name in packages for word in ("-A", name)),
            ]
            built = await asyncio.to_thread(_median, partial(run, arguments))
            result.add_row(title, _shown(remembered), _shown(evaluated), built)
    return result


def _median(work: Callable[[], object]) -> str:
    seconds = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return _shown(seconds)


def _shown(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1000:.1f} ms"


def _nix_list(texts: Sequence[str]) -> str:
    return f"[ {' '.join(map(json.dumps, texts))} ]"
