"""Layer plans: what clients download and what the registry keeps, for every strategy on many workloads.

`make bench` plays the workload that is given and one of each kind, in under a minute; for the tables of
docs/layering.md run `python -m benchmarks.layering --seeds 3`.

The packages are all of Debian 12 (data/debian-bookworm.json.gz, made of its index). Popularity is measured as
for a lock, without a look at any workload.
"""

import argparse
import gzip
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from chandlery.nix.closure import Closure
from chandlery.plan.package_clusters import measure
from chandlery.plan.package_graph import PackageGraph
from chandlery.plan.pull_simulation import Outcome, Simulation, Workload
from chandlery.plan.strategies import STRATEGIES, LayerGroup, Strategy

_DATA = Path(__file__).parent / "data"
_BUDGET = 94

_ALWAYS = ("ca-certificates", "netbase")
_SHELL = ("bash", "coreutils", "moreutils", "nano")
# What Chandlery's own shell has, in Debian's names: a lock doesn't know which shell a workload draws.
_OFTEN = (
    *("bash", "coreutils", "findutils", "gawk", "grep", "sed", "tar", "gzip", "less", "nano", "ncurses-base"),
    *("ncurses-bin", "procps", "debianutils"),
)
_WELL_KNOWN = (
    *("ansible", "apache2", "aria2", "awscli", "bat", "bc", "bzip2", "cargo", "chromium", "clang", "cmake"),
    *(
        "curl",
        "default-jre-headless",
        "diffutils",
        "dnsutils",
        "elixir",
        "emacs-nox",
        "erlang-base",
        "fd-find",
    ),
    *("ffmpeg", "file", "findutils", "fzf", "g++", "gawk", "gcc", "gdb", "ghc", "git", "gnupg", "golang-go"),
    *("gradle", "graphviz", "grep", "haproxy", "hashcat", "htop", "hugo", "imagemagick", "inkscape"),
    *("iproute2", "iputils-ping", "jekyll", "john", "jq", "libreoffice-core", "lsof", "lua5.4", "make"),
    *("mariadb-client", "maven", "mercurial", "neovim", "nginx", "ninja-build", "nmap", "nodejs", "npm"),
    *("ocaml", "openssh-client", "patch", "perl", "php-cli", "postgresql-client", "pv", "python3"),
    *("python3-django", "python3-matplotlib", "python3-numpy", "python3-pandas", "python3-requests"),
    *("python3-scipy", "qemu-system-x86", "r-base-core", "redis-server", "ripgrep", "rsync", "ruby", "rustc"),
    *("skopeo", "socat", "sqlite3", "strace", "subversion", "tcpdump", "texlive-base", "tmux", "tshark"),
    *("unzip", "vim", "wget", "xz-utils", "yq", "zip", "zsh"),
)
_MANY = 200


class Draw:
    """Draws images from a graph; `chance` decides everything."""

    def __init__(self, graph: PackageGraph, chance: random.Random) -> None:
        self.graph = graph
        self.chance = chance
        known = {name: package for package, name in enumerate(graph.names)}
        self._always = [known[name] for name in _ALWAYS]
        self._shell = [known[name] for name in _SHELL]
        self._tools = [known[name] for name in _WELL_KNOWN if name in known]
        chance.shuffle(self._tools)

    def anything(self) -> int:
        """Draw from all packages."""
        return self.chance.randrange(len(self.graph))

    def tool(self) -> int:
        """Draw from the well-known ones."""
        return self.chance.choice(self._tools)

    def favourite(self) -> int:
        """Draw by Zipf's law: the second half as often as the first, and so on."""
        weights = [1 / rank for rank in range(1, len(self._tools) + 1)]
        return self.chance.choices(self._tools, weights)[0]

    def image(self, packages: Sequence[int]) -> tuple[int, ...]:
        """Add what every image has, and to half of them a shell."""
        shell = self._shell if self.chance.random() < 1 / 2 else ()
        return tuple(sorted({*self._always, *shell, *packages}))

    def several(self, draw: Callable[[], int], fewest: int = 1, most: int = 4) -> tuple[int, ...]:
        """Draw an image of one to four packages, or others."""
        return self.image([draw() for _ in range(self.chance.randint(fewest, most))])

    def mixed(self) -> int:
        """Draw seven of ten from the well-known ones."""
        return self.tool() if self.chance.random() < 7 / 10 else self.anything()

    def paths(self, image: tuple[int, ...]) -> int:
        """Count an image's store paths."""
        return len(self.graph.closure(image))


def _until(draw: Callable[[], tuple[int, ...]], fits: Callable[[tuple[int, ...]], bool]) -> tuple[int, ...]:
    while True:
        image = draw()
        if fits(image):
            return image


_Kind = Callable[[Draw], tuple[int, ...]]
# Title, clients, pulls, and how one image is drawn.
_KINDS: Sequence[tuple[str, int, int, _Kind]] = (
    ("mixed as the given one", 10, 20, lambda draw: draw.several(draw.mixed)),
    ("small name_prefixes, Zipf", 10, 20, lambda draw: draw.several(draw.favourite)),
    (
        "many small images",
        *(20, 60),
        lambda draw: draw.image([draw.favourite() if draw.chance.random() < 1 / 2 else draw.anything()]),
    ),
    ("from anywhere", 10, 20, lambda draw: draw.several(draw.anything)),
    (
        "large closures, mixed",
        *(10, 20),
        lambda draw: _until(lambda: draw.several(draw.mixed), lambda image: draw.paths(image) > _MANY),
    ),
    (
        "large closures, from anywhere",
        *(10, 20),
        lambda draw: _until(
            lambda: draw.several(draw.anything, 2, 6), lambda image: draw.paths(image) > _MANY
        ),
    ),
    (
        "tiny images only: all fit",
        *(10, 60),
        lambda draw: _until(
            lambda: draw.several(draw.mixed, 1, 1), lambda image: draw.paths(image) <= _BUDGET
        ),
    ),
)


def workloads(graph: PackageGraph, seeds: int) -> Iterator[tuple[str, Workload]]:
    """Yield the workload of the issue, and one of each kind for each seed."""
    yield "given", Workload.parse(gzip.decompress((_DATA / "workload.json.gz").read_bytes()), graph)
    for title, clients, pulls, kind in _KINDS:
        for seed in range(1, seeds + 1):
            draw = Draw(graph, random.Random(f"{title} {seed}"))  # noqa: S311
            drawn = tuple(tuple(kind(draw) for _ in range(pulls)) for _ in range(clients))
            used = sorted(graph.closure(package for pulls in drawn for image in pulls for package in image))
            updates = tuple(tuple(draw.chance.sample(used, 25)) for _ in range(3))
            yield f"{title} ({seed})" if seeds > 1 else title, Workload(drawn, updates)


@dataclass
class Timed:
    """A strategy that knows how many seconds its slowest plan took."""

    strategy: Strategy
    popularity: Mapping[str, int]
    slowest: float = 0.0

    def __call__(self, closure: Closure) -> Sequence[LayerGroup]:
        """Plan."""
        began = time.perf_counter()
        plan = self.strategy(closure, self.popularity, _BUDGET)
        self.slowest = max(self.slowest, time.perf_counter() - began)
        return plan


def table(seeds: int = 1, strategies: Sequence[str] = tuple(STRATEGIES)) -> Table:
    """Play every workload with every strategy; all figures are times what the limit costs."""
    result = Table(
        "workload",
        "plan",
        "downloaded",
        "worst client",
        "kept",
        "updates",
        "kept",
        "extra / Nixery's",
        "by chain",
        "layers",
        "slowest plan",
    )
    graph = debian()
    began = time.perf_counter()
    popularity = measure(graph, _ALWAYS, _OFTEN)
    result.title = (
        f"layer plans; popularity of {len(graph):,} packages took {time.perf_counter() - began:.1f} s"
    )
    for title, workload in workloads(graph, seeds):
        simulation = Simulation(graph, workload)
        limit = simulation.limit()
        plans = {name: Timed(STRATEGIES[name], popularity) for name in strategies}
        outcomes = {name: simulation.play(plan) for name, plan in plans.items()}
        for name, outcome in outcomes.items():
            figures = _figures(outcome, limit, outcomes.get("nixery"))
            result.add_row(title, name, *figures, f"{1000 * plans[name].slowest:.0f} ms")
            title = ""
        result.add_section()
    return result


def debian() -> PackageGraph:
    """Read the package set."""
    return PackageGraph.parse(gzip.decompress((_DATA / "debian-bookworm.json.gz").read_bytes()))


def _figures(outcome: Outcome, limit: Outcome, nixery: Outcome | None) -> Iterator[str]:
    of_clients = zip(outcome.cold.downloaded, limit.cold.downloaded, strict=True)
    yield f"{outcome.cold.total / limit.cold.total:.3f}"
    yield f"{max(mine / least for mine, least in of_clients):.3f}"
    yield f"{outcome.cold.kept / limit.cold.kept:.3f}"
    yield f"{outcome.updated.total / limit.updated.total:.3f}"
    yield f"{outcome.updated.kept / limit.updated.kept:.3f}"
    extra = nixery.updated.total - limit.updated.total if nixery else 0
    yield f"{(outcome.updated.total - limit.updated.total) / extra:.2f}" if extra else ""
    yield f"{outcome.chained.total / limit.cold.total:.3f}"
    yield f"{mean(outcome.layers):.0f}, {max(outcome.layers)}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layering", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="workloads of each kind (default: %(default)s)")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=tuple(STRATEGIES))
    options = parser.parse_args()
    Console(highlight=False, width=160).print(table(options.seeds, options.strategies))


if __name__ == "__main__":
    main()
