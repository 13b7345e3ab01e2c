"""A build index as version 3 wrote it, and what is carried over of it."""

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
from structlog.testing import capture_logs

from chandlery.builds.recipe import Recipe
from chandlery.builds.sqlite.index import SqliteIndex
from chandlery.oci.documents import BuiltImage

# As the version before wrote them: the statements and the JSON stand here, so that they stay.
VERSION_3 = """
PRAGMA journal_mode = WAL;
CREATE TABLE layers (key TEXT PRIMARY KEY, digest TEXT NOT NULL, record BLOB NOT NULL) WITHOUT ROWID, STRICT;
CREATE INDEX layers_by_digest ON layers (digest);
CREATE TABLE images (
    key TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    revision TEXT NOT NULL,
    created_at REAL NOT NULL,
    last_used REAL NOT NULL,
    kept INTEGER NOT NULL,
    origin BLOB NOT NULL,
    record BLOB NOT NULL
) STRICT;
CREATE TABLE blobs (
    digest TEXT NOT NULL,
    key TEXT NOT NULL,
    size INTEGER NOT NULL,
    is_manifest INTEGER NOT NULL,
    PRIMARY KEY (digest, key)
) WITHOUT ROWID, STRICT;
CREATE INDEX blobs_by_image ON blobs (key);
CREATE TABLE image_indexes (
    digest TEXT PRIMARY KEY, created_at REAL NOT NULL, content BLOB NOT NULL
) WITHOUT ROWID, STRICT;
CREATE TABLE tags (
    name TEXT NOT NULL, tag TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY (name, tag)
) WITHOUT ROWID, STRICT;
CREATE TABLE resolutions (
    pin TEXT NOT NULL, attribute_path TEXT NOT NULL, record BLOB NOT NULL, PRIMARY KEY (pin, attribute_path)
) WITHOUT ROWID, STRICT;
"""


# One origin as it stands in such a file, letter by letter.
ORIGIN = (
    b'{"pin":{"kind":"debian","location":"bookworm","revision":"' + b"7" * 64 + b'","variant":"",'
    b'"nix":{"lock":"/var/lib/chandlery/lock","mirrors":["a","b"]},"popularity":"","stale":""},'
    b'"request":{"packages":["git"],"platform":{"os":"linux","architecture":"amd64"},"profiles":["nonroot"],'
    b'"source":"","reference":"stable","profile":{"packages":[],"user":"nonroot","entrypoint":[],"command":[],'
    b'"environment":{"HOME":"/home/nonroot"},"working_directory":"/home/nonroot","exposed_ports":["80/tcp"],'
    b'"labels":{"a":"b"}},"any_platform":true},"options":{"max_layers":96,"compression":"gzip",'
    b'"strategy":"grouped","root_layer":{"uid":0,"gid":0,"contents":[],"extra_commands":""}},'
    b'"popularity":"table"}'
)


def record_of(image: BuiltImage) -> bytes:
    """Write an image as version 3 did."""

    def descriptor(each: Any) -> dict[str, object]:
        return {
            "media_type": each.media_type,
            "digest": {"hex": each.digest.hex},
            "size": each.size,
            "annotations": each.annotations,
        }

    return msgspec.json.encode(
        {
            "manifests": {str(name): descriptor(each) for name, each in image.manifests.items()},
            "config": descriptor(image.config),
            "layers": [
                {"descriptor": descriptor(each.descriptor), "diff_id": {"hex": each.diff_id.hex}}
                for each in image.layers
            ],
            "store_paths": image.store_paths,
            "closure_size": image.closure_size,
        }
    )


class OldFile:
    """A file of version 3, made with SQL."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "build-index-3.sqlite"
        with closing(sqlite3.connect(self.path)) as database:
            database.executescript(VERSION_3)

    def execute(self, statement: str, *parameters: object) -> None:
        with closing(sqlite3.connect(self.path)) as database, database:
            database.execute(statement, parameters)

    def add_image(
        self,
        recipe: Recipe,
        image: BuiltImage,
        last_used: float = 1000.0,
        *,
        kept: bool = True,
        origin: bytes | None = None,
        record: bytes | None = None,
    ) -> None:
        with closing(sqlite3.connect(self.path)) as database, database:
            database.execute(
                "INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(recipe.key, recipe.request.name, recipe.pin.revision, last_used - 100, last_used, kept),
                    *(origin or msgspec.json.encode(recipe), record or record_of(image)),
                ),
            )
            manifests = {each.digest for each in image.manifests.values()}
            database.executemany(
                "REPLACE INTO blobs VALUES (?, ?, ?, ?)",
                [
                    (each.digest.hex, recipe.key, each.size, each.digest in manifests)
                    for each in image.descriptors
                ],
            )
            for tag in (recipe.request.reference, recipe.pin.tag):
                database.execute("REPLACE INTO tags VALUES (?, ?, ?)", (recipe.request.name, tag, recipe.key))


def carried_over(folder: Path, clock: float = 1000.0) -> Mapping[str, Any]:
    """Open an index; give what the log says of what it took from an older one."""
    with capture_logs() as logs, SqliteIndex(folder, lambda: clock):
        pass
    [event] = [each for each in logs if each["event"].startswith("an older build index")] or [{}]
    return event
