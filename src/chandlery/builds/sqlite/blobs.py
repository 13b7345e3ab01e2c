"""The blobs in the tables of the build index: how they are described, and which images need them.

Functions of a connection that is in a transaction, as in `builds.sqlite.tables`. A blob is deleted with the
last image or layer that has it.
"""

import sqlite3
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice

import msgspec

from chandlery.builds.sqlite.records import UnreadableRecordError, decoded
from chandlery.builds.sqlite.schema import first, id_of_new, id_of_text
from chandlery.oci.digest import Digest
from chandlery.oci.documents import Descriptor, PackedLayer

# Images in a row of `blob_images`: as many as a byte can tell apart.
CHUNK = 256

# Images that are put in order at once rather than looked for among all.
_FEW = 256

# Layers whose descriptions are kept, in memory; they take about 3 MB.
_KNOWN_LAYERS = 4096


def put_blob(
    database: sqlite3.Connection, descriptor: Descriptor, diff_id: Digest | None
) -> tuple[int, bool]:
    """Return a blob's id, written if need be, and whether it is described there as it is here."""
    digest = bytes.fromhex(descriptor.digest.hex)
    here = (
        *(descriptor.size, descriptor.media_type),
        msgspec.json.encode(descriptor.annotations) if descriptor.annotations else None,
        None if diff_id is None else bytes.fromhex(diff_id.hex),
    )
    query = (
        "SELECT blobs.id, size, media_types.media_type, annotations, diff_id FROM blobs "
        "JOIN media_types ON media_types.id = blobs.media_type WHERE digest = ?"
    )
    for blob, *there in database.execute(query, (digest,)):
        return blob, tuple(there) == here
    media_type = id_of_text(database, "media_types", "media_type", descriptor.media_type)
    insert = "INSERT INTO blobs (digest, media_type, size, annotations, diff_id) VALUES (?, ?, ?, ?, ?)"
    return id_of_new(database.execute(insert, (digest, media_type, here[0], *here[2:]))), True


def blob_id(database: sqlite3.Connection, digest: Digest) -> int | None:
    """Return the id of a blob, if anything is known of it."""
    return first(database, "SELECT id FROM blobs WHERE digest = ?", int, bytes.fromhex(digest.hex))


def described(
    database: sqlite3.Connection, blobs: Sequence[int], known: dict[int, PackedLayer]
) -> list[Descriptor | PackedLayer]:
    """Return what blobs are, by their ids; raises `UnreadableRecordError`.

    `known` are layers that were read before, which images share: an id always means the same.
    """
    found: dict[int, Descriptor | PackedLayer] = {blob: known[blob] for blob in blobs if blob in known}
    query = (
        "SELECT blobs.id, digest, size, media_types.media_type, annotations, diff_id FROM json_each(?) "
        "CROSS JOIN blobs ON blobs.id = value JOIN media_types ON media_types.id = blobs.media_type"
    )
    missing = msgspec.json.encode([blob for blob in blobs if blob not in found]).decode()
    if len(known) > _KNOWN_LAYERS:
        known.clear()
    for blob, *row, diff_id in database.execute(query, (missing,)):
        if diff_id is None:
            found[blob] = _descriptor(*row)
        else:
            found[blob] = known[blob] = PackedLayer(_descriptor(*row), Digest(diff_id.hex()))
    try:
        return [found[blob] for blob in blobs]
    except KeyError as error:
        raise UnreadableRecordError(f"it names the blob {error}, which isn't there") from error


def layer(
    digest: bytes, size: int, media_type: str, annotations: bytes | None, diff_id: bytes | None
) -> PackedLayer:
    """Return a layer from what `blobs` says of it; raises `UnreadableRecordError`."""
    if diff_id is None:
        raise UnreadableRecordError("it is no layer")
    return PackedLayer(_descriptor(digest, size, media_type, annotations), Digest(diff_id.hex()))


def _descriptor(digest: bytes, size: int, media_type: str, annotations: bytes | None) -> Descriptor:
    told = {} if annotations is None else decoded(annotations, dict[str, str])
    return Descriptor(media_type, Digest(digest.hex()), size, told)


def images_of(database: sqlite3.Connection, blob: int, limit: int) -> list[int]:
    """Return the images that need a blob, at most `limit`: kept ones first, and those used last first."""
    chunks = dict(
        database.execute("SELECT chunk, images FROM blob_images WHERE blob = ?", (blob,)).fetchall()
    )
    number = sum(map(len, chunks.values()))
    limit = min(limit, number)
    if number > _FEW:
        # Most likely the first of all images in this order need such a blob. It takes at most as many steps
        # as there are images to put in order otherwise.
        in_order = "SELECT id FROM images ORDER BY kept DESC, last_used DESC LIMIT ?"
        steps = database.execute(in_order, (number,))
        needing = (each for (each,) in steps if each % CHUNK in chunks.get(each // CHUNK, b""))
        found = list(islice(needing, limit))
        if len(found) == limit:
            return found
    ids = [chunk * CHUNK + offset for chunk, offsets in chunks.items() for offset in offsets]
    query = (
        "SELECT id FROM images WHERE id IN (SELECT value FROM json_each(?)) "
        "ORDER BY kept DESC, last_used DESC LIMIT ?"
    )
    return [each for (each,) in database.execute(query, (msgspec.json.encode(ids).decode(), limit))]


def blobs_of_unreadable(database: sqlite3.Connection, image: int) -> set[int]:
    """Return the blobs that an image needs whose record can't tell, from all of its chunk."""
    chunk, offset = divmod(image, CHUNK)
    rows = database.execute("SELECT blob, images FROM blob_images WHERE chunk = ?", (chunk,))
    return {blob for blob, offsets in rows if offset in offsets}


def add_image(database: sqlite3.Connection, image: int, blobs: Iterable[int]) -> None:
    """Write that an image needs blobs, which it didn't need."""
    chunk, offset = divmod(image, CHUNK)
    # Of two blobs || makes a text of the same bytes.
    database.executemany(
        "INSERT INTO blob_images VALUES (?, ?, ?) "
        "ON CONFLICT DO UPDATE SET images = CAST(images || excluded.images AS BLOB)",
        [(blob, chunk, bytes([offset])) for blob in sorted(blobs)],
    )


def remove_image(database: sqlite3.Connection, image: int, blobs: Collection[int]) -> None:
    """Write that an image needs blobs no longer."""
    chunk, offset = divmod(image, CHUNK)
    query = "SELECT images FROM blob_images WHERE blob = ? AND chunk = ?"
    for blob in blobs:
        offsets = (first(database, query, bytes, blob, chunk) or b"").replace(bytes([offset]), b"")
        if offsets:
            update = "UPDATE blob_images SET images = ? WHERE blob = ? AND chunk = ?"
            database.execute(update, (offsets, blob, chunk))
        else:
            database.execute("DELETE FROM blob_images WHERE blob = ? AND chunk = ?", (blob, chunk))
    drop_unused(database, blobs)


def drop_unused(database: sqlite3.Connection, blobs: Iterable[int]) -> None:
    """Delete those of some blobs that no image and no layer has."""
    database.executemany(
        "DELETE FROM blobs WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM blob_images WHERE blob = ?1) "
        "AND NOT EXISTS (SELECT 1 FROM layers WHERE blob = ?1)",
        [(blob,) for blob in blobs],
    )


def collected(database: sqlite3.Connection) -> Mapping[int, bytearray]:
    """Return the images that aren't kept, as their offsets in each chunk."""
    chunks: defaultdict[int, bytearray] = defaultdict(bytearray)
    for (image,) in database.execute("SELECT id FROM images WHERE kept = 0"):
        chunk, offset = divmod(image, CHUNK)
        chunks[chunk].append(offset)
    return chunks
