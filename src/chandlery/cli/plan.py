"""`chandlery plan` and `chandlery popularity`: what a layer plan does, and what it knows."""

import asyncio
import gzip
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from chandlery.builds.pipeline import MOST_STORE_PATH_LAYERS
from chandlery.builds.resolver import PackageResolver
from chandlery.cli.options import DataDir, SettingsFile
from chandlery.errors import SettingsError
from chandlery.image import name as image_name
from chandlery.image.name import LATEST
from chandlery.layers.archive import layer_key
from chandlery.layers.collisions import Collision, collisions
from chandlery.layers.compression import COMPRESSIONS
from chandlery.layers.store_reader import StoreReader
from chandlery.machine.temporary_folder import TemporaryFolder
from chandlery.nix.closure import Closure
from chandlery.nix.closure_json import parse_closure
from chandlery.plan.package_graph import PackageGraph
from chandlery.plan.popularity import Popularity, known_name
from chandlery.plan.pull_simulation import Outcome, Simulation, Workload
from chandlery.plan.strategies import STRATEGIES, LayerGroup, Strategy
from chandlery.server.parts import name_prefixes, open_parts
from chandlery.settings.settings import Settings
from chandlery.sources.binary_cache import crawl, open_cache, popularity_of
from chandlery.telemetry import logs

_CACHE = "https://cache.nixos.org"
# In every image, and in a shell: names of nixpkgs' store paths.
_ALWAYS = ("nss-cacert", "iana-etc")
_OFTEN = (
    *("bash-interactive", "coreutils", "findutils", "gawk", "gnugrep", "gnused", "gnutar", "gzip", "less"),
    *("nano", "ncurses", "procps", "which"),
)
_NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """What a plan is made of; how many bytes of a layer the registry has already, and what collides.

    A closure in a file is known by its names alone: nothing tells of either.
    """

    closure: Closure
    popularity: Mapping[str, int]
    has: Callable[[LayerGroup], int | None] = lambda _: None
    collisions: Sequence[Collision] = ()


def plan(
    packages: Annotated[
        list[str] | None, typer.Argument(help="The parts of an image name.", show_default=False)
    ] = None,
    closure: Annotated[
        Path | None,
        typer.Option(
            help="A closure instead: the JSON of nix path-info --json --recursive, or of "
            "exportReferencesGraph; - for standard input.",
            show_default=False,
        ),
    ] = None,
    popularity_file: Annotated[
        Path | None,
        typer.Option(
            "--popularity", help="What chandlery popularity wrote, or Nixery's.", show_default=False
        ),
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(STRATEGIES)}.", show_default=False)
    ] = None,
    max_layers: Annotated[
        int | None,
        typer.Option(min=2, help="Layers per image, the root filesystem's included.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Set all strategies side by side.")] = False,
    graph: Annotated[
        Path | None,
        typer.Option(
            help="With --compare: a package set (JSON, .gz) to play --workload on.", show_default=False
        ),
    ] = None,
    workload: Annotated[
        Path | None, typer.Option(help="What clients pull (JSON, .gz).", show_default=False)
    ] = None,
    data_dir: DataDir = None,
    source: Annotated[str | None, typer.Option(help="The package set.", show_default=False)] = None,
    settings_file: SettingsFile = None,
) -> None:
    """Show which packages share a layer: of an image, or of a closure in a file; no layer is made.

    With `--compare --graph FILE --workload FILE`, what each strategy costs clients and the registry.
    """
    settings = Settings.load(settings_file, data_dir=data_dir, source=source, max_layers=max_layers)
    logs.configure(settings.log_format)
    chosen = strategy or settings.layer_strategy
    if chosen not in STRATEGIES:
        raise SettingsError(f"--strategy {chosen}: it is one of {', '.join(STRATEGIES)}")
    budget = min(settings.max_layers - 1, MOST_STORE_PATH_LAYERS)
    if graph is not None or workload is not None:
        if graph is None or workload is None or not compare:
            raise SettingsError("--compare, --graph and --workload go together")
        _print_costs(_costs(graph, workload, popularity_file, budget), as_json=as_json)
        return
    if bool(packages) == (closure is not None):
        raise SettingsError("name packages, or a file with --closure")
    known = read_popularity(popularity_file) if popularity_file else None
    if closure:
        image = PlannedImage(_read_closure(closure), known or Popularity())
    else:
        image = asyncio.run(_image(settings, packages or [], known))
    if compare:
        _print_strategies(image, budget, as_json=as_json)
    else:
        _print_plan(image, STRATEGIES[chosen](image.closure, image.popularity, budget), as_json=as_json)


def popularity(
    place: Annotated[
        str, typer.Argument(help="A channel (nixos-unstable), or a cache (https://..., file:///...).")
    ],
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("popularity.json"),
    cache: Annotated[str, typer.Option(help="The binary cache of a channel.")] = _CACHE,
    store_paths: Annotated[
        str | None,
        typer.Option(
            help="The address of a list of store paths (.xz or plain). [default: the channel's; the cache's "
            "store-paths.xz]",
            show_default=False,
        ),
    ] = None,
    settings_file: SettingsFile = None,
) -> None:
    """Find out how many packages need each one, and which go together, from a binary cache.

    Reads every narinfo file, which takes minutes; stopped, it goes on from there when it is called again.
    """
    settings = Settings.load(settings_file)
    logs.configure(settings.log_format)
    is_cache = "://" in place
    if not is_cache and store_paths is None:
        address = settings.nixpkgs_channel_url.format(channel=place)
        store_paths = f"{address.rpartition('/')[0]}/store-paths.xz"
    address = place if is_cache else cache
    found = asyncio.run(_crawl(address, store_paths or "", output, place))
    written = output.with_name(f"{output.name}.new")
    written.write_bytes(found.encode())
    written.replace(output)
    _journal(output).unlink()
    typer.echo(
        f"{output}: {len(found)} packages, {len(set(found.groups.values()))} groups of {len(found.groups)}; "
        f"identity {found.identity[:16]}"
    )


def read_popularity(file: Path) -> Popularity:
    """Read a table; `SettingsError` if the file is none."""
    try:
        return Popularity.parse(_read(file))
    except ValueError as error:
        raise SettingsError(f"{file}: {error}") from error


async def _crawl(address: str, list_address: str, output: Path, source: str) -> Popularity:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    async with open_cache(address, list_address) as opened:
        names = await opened.store_paths()
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("narinfo files", total=len(names))
            infos = await crawl(
                opened, names, _journal(output), lambda count: progress.update(task, advance=count)
            )
    return await asyncio.to_thread(popularity_of, infos, _ALWAYS, _OFTEN, source)


def _journal(output: Path) -> Path:
    return output.with_name(f"{output.name}.narinfos")


async def _image(settings: Settings, packages: Sequence[str], chosen: Popularity | None) -> PlannedImage:
    """Realise an image's packages, and look up which layers the registry has."""
    request = image_name.of_parts(packages, LATEST, name_prefixes(settings))
    async with open_parts(settings) as parts:
        pin = await parts.sources.of("").pin(LATEST, request.platform)
        if chosen is None and pin.popularity:
            popularity = read_popularity(Path(pin.popularity))
        else:
            popularity = parts.popularity if chosen is None else chosen
        stores = parts.stores
        resolver = PackageResolver(stores.nix, stores.index)
        found = await resolver.resolve(pin, request.platform.nix_system, request.all_packages)
        with TemporaryFolder(settings.data_dir / "tmp") as temporary:
            derivations = [each.derivation for each in found.values()]
            roots, build_log = temporary.path / "roots", temporary.path / "log"
            nix = stores.nix.of(pin)
            await nix.realise(derivations, roots, build_log, own=pin.builders_are_own)
            wanted = [found[path].store_path for path in request.most_wanted_first]
            closure = await nix.closure(wanted)
            collide = await asyncio.to_thread(collisions, StoreReader(nix.store_root), closure, wanted)
        compression = COMPRESSIONS[settings.compression]
        known = {}
        for each in STRATEGIES.values():
            budget = min(settings.max_layers - 1, MOST_STORE_PATH_LAYERS)
            for group in each(closure, popularity, budget):
                key = layer_key(group.store_paths, compression, pin.trust_domain)
                packed = await stores.index.layers([key])
                known[group.store_paths] = packed[key].descriptor.size if key in packed else 0
        return PlannedImage(closure, popularity, lambda group: known.get(group.store_paths), collide)


def _read_closure(file: Path) -> Closure:
    try:
        return parse_closure(sys.stdin.buffer.read() if str(file) == "-" else _read(file))
    except ValueError as error:
        raise SettingsError(f"{file}: {error}") from error


def _read(file: Path) -> bytes:
    try:
        content = file.read_bytes()
        return gzip.decompress(content) if file.suffix == ".gz" else content
    except (OSError, EOFError) as error:
        raise SettingsError(f"{file}: {error}") from error


def _needed(image: PlannedImage, group: LayerGroup) -> int:
    """Return how much the least needed of a layer is needed."""
    names = (known_name(path.name, image.popularity) for path in group.store_paths)
    return min(image.popularity.get(name, 0) for name in names)


def _print_plan(image: PlannedImage, groups: Sequence[LayerGroup], *, as_json: bool) -> None:
    if as_json:
        layers = [
            {
                "storePaths": [path.text for path in group.store_paths],
                "narSize": group.nar_size,
                "popularity": _needed(image, group),
                "inRegistry": image.has(group),
            }
            for group in groups
        ]
        collide = [
            {
                "winner": each.winner,
                "loser": each.loser,
                "reason": each.reason.value,
                "paths": [f"/{path.decode(errors='backslashreplace')}" for path in each.paths],
            }
            for each in image.collisions
        ]
        typer.echo(json.dumps({"layers": layers, "collisions": collide}))
        return
    table = Table("Layer", "MB", "Needed by", "Paths", "Packages", box=None, pad_edge=False)
    told = any(image.has(group) is not None for group in groups)
    if told:
        table.add_column("In the registry, MB")
    for number, group in enumerate(groups, 1):
        names = [path.name for path in group.store_paths]
        shown = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
        needed = _needed(image, group)
        there = image.has(group)
        row = [
            str(number),
            f"{group.nar_size / 1e6:,.1f}",
            f"{needed:,}" if needed else "",
            str(len(names)),
            shown,
        ]
        table.add_row(*row, *([f"{there / 1e6:,.1f}" if there else ""] if told else []))
    Console().print(table)
    typer.echo(
        f"{len(groups)} layers, {len(image.closure.nodes)} store paths, "
        f"{image.closure.nar_size / 1e6:,.1f} MB"
    )
    for each in image.collisions:
        typer.echo(str(each))


def _print_strategies(image: PlannedImage, budget: int, *, as_json: bool) -> None:
    plans = {name: strategy(image.closure, image.popularity, budget) for name, strategy in STRATEGIES.items()}
    rows = {
        name: {
            "layers": len(groups),
            "alone": sum(len(group.store_paths) == 1 for group in groups),
            "largestShared": max((each.nar_size for each in groups if len(each.store_paths) > 1), default=0),
        }
        for name, groups in plans.items()
    }
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table(
        "Strategy", "Layers", "Store paths alone", "Largest shared layer, MB", box=None, pad_edge=False
    )
    for name, row in rows.items():
        table.add_row(name, str(row["layers"]), str(row["alone"]), f"{row['largestShared'] / 1e6:,.1f}")
    Console().print(table)


def _costs(
    graph_file: Path, workload_file: Path, popularity_file: Path | None, budget: int
) -> Mapping[str, Outcome]:
    """Play a workload with every strategy, and without a limit, which has the name `limit`."""
    known = read_popularity(popularity_file) if popularity_file else Popularity()
    try:
        graph = PackageGraph.parse(_read(graph_file))
        simulation = Simulation(graph, Workload.parse(_read(workload_file), graph))
    except ValueError as error:
        raise SettingsError(f"{graph_file}, {workload_file}: {error}") from error
    costs = {"limit": simulation.limit()}
    for name, strategy in STRATEGIES.items():
        costs[name] = simulation.play(partial(_planned, strategy, known, budget))
    return costs


def _planned(
    strategy: Strategy, popularity: Popularity, budget: int, closure: Closure
) -> Sequence[LayerGroup]:
    return strategy(closure, popularity, budget)


def _print_costs(costs: Mapping[str, Outcome], *, as_json: bool) -> None:
    limit = costs["limit"]
    rows = {
        name: {
            "downloaded": each.cold.total,
            "kept": each.cold.kept,
            "downloadedAfterUpdates": each.updated.total,
            "downloadedByChain": each.chained.total,
            "layers": sum(each.layers) / len(each.layers),
            "mostLayers": max(each.layers),
        }
        for name, each in costs.items()
    }
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table(
        *(
            "Strategy",
            "Downloaded, GB",
            "of the limit",
            "Kept, GB",
            "of the limit",
            "Updates, GB",
            "of the limit",
        ),
        *("By chain, GB", "Layers", "Most"),
        box=None,
        pad_edge=False,
    )
    for name, each in costs.items():
        table.add_row(
            name,
            *(f"{each.cold.total / 1e9:.2f}", f"{each.cold.total / limit.cold.total:.3f}"),
            *(f"{each.cold.kept / 1e9:.2f}", f"{each.cold.kept / limit.cold.kept:.3f}"),
            *(f"{each.updated.total / 1e9:.2f}", _times(each.updated.total, limit.updated.total)),
            *(
                f"{each.chained.total / 1e9:.2f}",
                f"{rows[name]['layers']:.0f}",
                str(rows[name]["mostLayers"]),
            ),
        )
    Console().print(table)


def _times(number: int, least: int) -> str:
    return f"{number / least:.3f}" if least else ""
