"""Time to an image: never built, known, new mixes of known packages, and one new package among them."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from chandlery.image.name import LATEST, NamePrefixes, of_parts
from chandlery.oci.documents import Platform
from chandlery.server.parts import open_images, open_parts
from chandlery.settings.settings import Settings
from chandlery.telemetry.build_timings import Work

# Each title, and images that are asked for one after another; their median is told.
_STEPS: Sequence[tuple[str, Sequence[str]]] = (
    ("never built", ("shell/git/jq",)),
    ("known", ("shell/git/jq",) * 9),
    ("a new mix of known packages", ("git/jq", "git", "jq", "shell/git", "shell/jq", "shell")),
    ("one new package", ("git/jq/curl",)),
    ("never built, large", ("ffmpeg",)),
    ("a new mix of known packages, large", ("ffmpeg/git", "ffmpeg/jq/curl", "shell/ffmpeg", "ffmpeg/curl")),
)


async def table(data_dir: Path) -> Table:
    """Ask for the images in turn; the package index is there before. Works overlap: each has its own time."""
    result = Table(
        *("time to the image", "names", "Chandlery", "store paths", "layers"),
        *Work,
    )
    settings = Settings.load(data_dir=data_dir)
    async with open_parts(settings) as parts, open_images(settings, parts) as builder:
        await parts.sources.of("").pin(LATEST, Platform.of_host())
        for title, names in _STEPS:
            seconds = []
            for name in names:
                request = of_parts(name.split("/"), LATEST, NamePrefixes(Platform.of_host()))
                began = time.perf_counter()
                image = await builder.image(request)
                seconds.append(time.perf_counter() - began)
            works = {each.work: each.busy for each in builder.queue.builds()[0].timings.times()}
            result.add_row(
                title,
                ", ".join(dict.fromkeys(names)),
                f"{statistics.median(seconds) * 1000:,.1f} ms",
                str(image.store_paths),
                str(len(image.layers)),
                *(f"{works[work]:.2f} s" if work in works and len(names) == 1 else "" for work in Work),
            )
    return result
