"""Time to an image: never built, known, a new mix of known packages, and one new package among them."""

import time
from pathlib import Path

from rich.table import Table

from chandlery.app import image_builder, open_parts
from chandlery.image_name import LATEST, Vocabulary, of_parts
from chandlery.oci import Platform
from chandlery.settings import Settings

_STEPS = (
    ("never built", ("shell", "git", "jq")),
    ("known", ("shell", "git", "jq")),
    ("a new mix of known packages", ("git", "jq")),
    ("one new package", ("git", "jq", "curl")),
)


async def table(data_dir: Path) -> Table:
    """Ask for each image in turn; the package index is fetched before."""
    result = Table("time to the image", "name", "Chandlery", "store paths", "layers")
    settings = Settings.load(data_dir=data_dir)
    async with open_parts(settings) as parts, image_builder(settings, parts) as builder:
        await parts.sources.of("").pin(LATEST, Platform.of_host())
        for title, packages in _STEPS:
            request = of_parts(packages, LATEST, Vocabulary(Platform.of_host()))
            began = time.perf_counter()
            image = await builder.image(request)
            seconds = time.perf_counter() - began
            result.add_row(
                title, request.name, f"{seconds:.3f} s", str(image.store_paths), str(len(image.layers))
            )
    return result
