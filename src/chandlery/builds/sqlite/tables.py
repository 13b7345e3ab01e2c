"""The questions and changes of the build index, in SQL; the tables stand in `builds.sqlite.schema`.

Functions of a connection that is in a transaction: nothing here begins or ends one. What is deleted takes
along what only it had. They raise `sqlite3.Error`. A record that can't be read is left out, or raises
`UnreadableRecordError` for a collector.
"""

import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import msgspec

from chandlery.builds.index import RecordedBlob, RecordedImage
from chandlery.builds.recipe import Recipe
from chandlery.builds.sqlite import blobs
from chandlery.builds.sqlite.records import (
    ImageRecord,
    UnreadableRecordError,
    context_of,
    decoded,
    skipping_unreadable,
)
from chandlery.builds.sqlite.schema import first, id_of_new, id_of_text
from chandlery.nix.pinned_source import REVISION_TAG_LENGTH
from chandlery.oci.digest import Digest
from chandlery.oci.documents import BuiltImage, PackedLayer


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image that is kept, and when it was last used, in seconds since the epoch."""

    image: BuiltImage
    last_used: float


@dataclass(frozen=True, slots=True)
class Times:
    """When an image was made and last used, in seconds since the epoch, and whether it is kept."""

    created_at: float
    last_used: float
    kept: bool = True


# --- images


def image(database: sqlite3.Connection, key: str, known_layers: dict[int, PackedLayer]) -> FoundImage | None:
    """Return the image of a key, if it is kept; for `known_layers` see `blobs.described`."""
    query = "SELECT record, last_used FROM images WHERE key = ? AND kept"
    for encoded, last_used in database.execute(query, (bytes.fromhex(key),)):
        with skipping_unreadable(image=key):
            record = ImageRecord.decode(encoded)
            described = blobs.described(database, record.blobs, known_layers)
            return FoundImage(record.image(described), last_used)
    return None


def last_used(database: sqlite3.Connection, key: str) -> float | None:
    """Return when an image was last used, if it is kept."""
    query = "SELECT last_used FROM images WHERE key = ? AND kept"
    return first(database, query, float, bytes.fromhex(key))


def use_image(database: sqlite3.Connection, key: str, now: float) -> bool:
    """Write that an image is used; return whether it is kept."""
    update = "UPDATE images SET last_used = ? WHERE key = ? AND kept"
    return database.execute(update, (now, bytes.fromhex(key))).rowcount == 1


def put_image(
    database: sqlite3.Connection, key: str, recipe: Recipe, built: BuiltImage, times: Times
) -> None:
    """Write an image, its recipe and its tag; when it was made first stays."""
    put = [blobs.put_blob(database, each, None) for each in (*built.manifests.values(), built.config)]
    put += [blobs.put_blob(database, each.descriptor, each.diff_id) for each in built.layers]
    ids = [blob for blob, _ in put]
    record = ImageRecord.of(recipe, built, ids, exact=not all(alike for _, alike in put))
    name = id_of_text(database, "names", "name", recipe.request.name)
    context = _put_context(database, recipe)
    key_bytes = bytes.fromhex(key)
    before = database.execute("SELECT context, record FROM images WHERE key = ?", (key_bytes,)).fetchone()
    row = (key_bytes, name, context, times.kept, times.created_at, times.last_used, record.encode())
    (image_id,) = database.execute(
        "INSERT INTO images (key, name, context, kept, created_at, last_used, record) "
        "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET name = excluded.name, "
        "context = excluded.context, kept = excluded.kept, last_used = excluded.last_used, "
        "record = excluded.record RETURNING id",
        row,
    ).fetchone()
    _put_tag(database, name, recipe.request.reference, image_id)
    had = set() if before is None else _blobs_of(database, image_id, before[1])
    blobs.add_image(database, image_id, set(ids) - had)
    if unneeded := had - set(ids):
        blobs.remove_image(database, image_id, unneeded)
    if before is not None and before[0] != context:
        _drop_context(database, before[0])


def tags(database: sqlite3.Connection, name: str) -> list[str]:
    """Return the tags of a name, sorted: those asked for, and the ones that always mean a revision."""
    name_id = first(database, "SELECT id FROM names WHERE name = ?", int, name)
    asked = database.execute("SELECT DISTINCT tag FROM tags WHERE name = ?", (name_id,))
    revisions = database.execute(
        "SELECT DISTINCT contexts.revision FROM tags JOIN images ON images.id = tags.image "
        "JOIN contexts ON contexts.id = images.context WHERE tags.name = ?",
        (name_id,),
    )
    return sorted({tag for (tag,) in asked} | {revision[:REVISION_TAG_LENGTH] for (revision,) in revisions})


def tagged(
    database: sqlite3.Connection, name: str, digest: Digest | None, limit: int
) -> list[tuple[str, Recipe]]:
    """Return the tags of a name with the recipes of their images, or of those that need a blob."""
    parameters = (name, blobs.CHUNK, None if digest is None else bytes.fromhex(digest.hex))
    query = (
        "SELECT tags.tag, images.id, contexts.recipe, images.record, blob_images.images FROM tags "
        "JOIN images ON images.id = tags.image JOIN contexts ON contexts.id = images.context "
        "LEFT JOIN blob_images ON blob = (SELECT id FROM blobs WHERE digest = ?3) AND chunk = images.id / ?2 "
        "WHERE tags.name = (SELECT id FROM names WHERE name = ?1) ORDER BY images.id DESC, tags.tag"
    )
    found: list[tuple[str, Recipe]] = []
    for tag, image_id, context, encoded, needing in database.execute(query, parameters):
        if digest is None or image_id % blobs.CHUNK in (needing or b""):
            with skipping_unreadable(image=str(image_id)):
                found.append((tag, ImageRecord.decode(encoded).recipe(context)))
        if len(found) == limit:
            break
    return found


def has_tag(database: sqlite3.Connection, name: str, tag: str, key: str) -> bool:
    """Return whether an image is recorded with a tag of a name."""
    query = (
        "SELECT 1 FROM tags JOIN images ON images.id = tags.image "
        "WHERE tags.name = (SELECT id FROM names WHERE name = ?) AND tag = ? AND images.key = ?"
    )
    return first(database, query, int, name, tag, bytes.fromhex(key)) is not None


def put_tag(database: sqlite3.Connection, name: str, tag: str, key: str) -> None:
    """Write one more tag of an image; nothing of an image that isn't recorded."""
    image_id = first(database, "SELECT id FROM images WHERE key = ?", int, bytes.fromhex(key))
    if image_id is not None:
        _put_tag(database, id_of_text(database, "names", "name", name), tag, image_id)


def revisions(database: sqlite3.Connection, limit: int) -> list[str]:
    """Return the revisions of all images, of the images used last first."""
    query = (
        "SELECT revision FROM images JOIN contexts ON contexts.id = images.context "
        "GROUP BY revision ORDER BY MAX(last_used) DESC LIMIT ?"
    )
    return [revision for (revision,) in database.execute(query, (limit,))]


def image_index(database: sqlite3.Connection, digest: Digest) -> bytes | None:
    """Return the OCI index of a digest."""
    query = "SELECT content FROM image_indexes WHERE digest = ?"
    return first(database, query, bytes, bytes.fromhex(digest.hex))


def put_image_index(database: sqlite3.Connection, content: bytes, now: float) -> None:
    """Write an OCI index; when it was made first is kept."""
    row = (bytes.fromhex(Digest.of(content).hex), now, content)
    database.execute("INSERT OR IGNORE INTO image_indexes VALUES (?, ?, ?)", row)


# --- layers


def layers(database: sqlite3.Connection, keys: Collection[str]) -> dict[str, PackedLayer]:
    """Return the layers of these keys; what isn't known is left out, and what can't be read."""
    query = (
        "SELECT layers.record, digest, size, media_types.media_type, annotations, diff_id FROM layers "
        "JOIN blobs ON blobs.id = blob JOIN media_types ON media_types.id = blobs.media_type WHERE key = ?"
    )
    found = {}
    for key in keys:
        for record, *row in database.execute(query, (bytes.fromhex(key),)):
            with skipping_unreadable(layer=key):
                found[key] = blobs.layer(*row) if record is None else decoded(record, PackedLayer)
    return found


def put_layer(database: sqlite3.Connection, key: str, layer: PackedLayer) -> None:
    """Write a layer."""
    blob, alike = blobs.put_blob(database, layer.descriptor, layer.diff_id)
    before = first(database, "SELECT blob FROM layers WHERE key = ?", int, bytes.fromhex(key))
    row = (bytes.fromhex(key), blob, None if alike else msgspec.json.encode(layer))
    database.execute("REPLACE INTO layers VALUES (?, ?, ?)", row)
    if before is not None and before != blob:
        blobs.drop_unused(database, [before])


def drop_layers(database: sqlite3.Connection, digests: Iterable[Digest]) -> None:
    """Forget the layers of these blobs."""
    gone = [blob for digest in digests if (blob := blobs.blob_id(database, digest)) is not None]
    database.executemany("DELETE FROM layers WHERE blob = ?", [(blob,) for blob in gone])
    blobs.drop_unused(database, gone)


# --- resolutions


def resolutions(database: sqlite3.Connection, pin: str, attribute_paths: Iterable[str]) -> dict[str, bytes]:
    """Return what is known of attribute paths at a pin."""
    wanted = msgspec.json.encode(list(attribute_paths)).decode()
    return dict(
        database.execute(
            "SELECT attribute_path, record FROM resolutions WHERE pin = (SELECT id FROM pins WHERE pin = ?) "
            "AND attribute_path IN (SELECT value FROM json_each(?))",
            (pin, wanted),
        ).fetchall()
    )


def put_resolutions(database: sqlite3.Connection, pin: str, records: Mapping[str, bytes]) -> None:
    """Write what attribute paths give at a pin."""
    pin_id = id_of_text(database, "pins", "pin", pin)
    rows = [(pin_id, attribute_path, record) for attribute_path, record in records.items()]
    database.executemany("REPLACE INTO resolutions VALUES (?, ?, ?)", rows)


# --- blobs


def blob(database: sqlite3.Connection, digest: Digest) -> RecordedBlob | None:
    """Return what is known of a blob, from the first of the images that need it."""
    row = database.execute(
        "SELECT id, size FROM blobs WHERE digest = ?", (bytes.fromhex(digest.hex),)
    ).fetchone()
    for image_id in blobs.images_of(database, row[0], 1) if row else ():
        key, kept, encoded = database.execute(
            "SELECT key, kept, record FROM images WHERE id = ?", (image_id,)
        ).fetchone()
        with skipping_unreadable(image=key.hex()):
            is_manifest = row[0] in ImageRecord.decode(encoded).manifests
            return RecordedBlob(key.hex(), row[1], is_manifest, bool(kept))
    return None


def recipes(database: sqlite3.Connection, digest: Digest, limit: int) -> list[Recipe]:
    """Return the recipes of images that need a blob, in the order of `blob`; not those that can't be read."""
    blob_id = blobs.blob_id(database, digest)
    query = (
        "SELECT key, contexts.recipe, images.record FROM images "
        "JOIN contexts ON contexts.id = images.context WHERE images.id = ?"
    )
    found = []
    for image_id in blobs.images_of(database, blob_id, limit) if blob_id is not None else ():
        for key, context, encoded in database.execute(query, (image_id,)):
            with skipping_unreadable(image=key.hex()):
                found.append(ImageRecord.decode(encoded).recipe(context))
    return found


def needs(database: sqlite3.Connection, name: str, digest: Digest) -> bool:
    """Return whether an image of this name needs a blob."""
    # From the names' images, which are few: nearly all images need some blobs.
    rows = database.execute(
        "SELECT image % ?1, blob_images.images FROM names JOIN tags ON tags.name = names.id "
        "JOIN blob_images ON blob = (SELECT id FROM blobs WHERE digest = ?2) AND chunk = image / ?1 "
        "WHERE names.name = ?3",
        (blobs.CHUNK, bytes.fromhex(digest.hex), name),
    )
    return any(offset in images for offset, images in rows)


# --- what is kept, and what may go


def least_recently_used(database: sqlite3.Connection, used_before: float) -> list[RecordedImage]:
    """Return the images that are kept and were last used before a time, the oldest use first."""
    query = (
        "SELECT key, names.name, last_used FROM images JOIN names ON names.id = images.name "
        "WHERE kept = 1 AND last_used < ? ORDER BY last_used, key"
    )
    return [
        RecordedImage(key.hex(), name, used) for key, name, used in database.execute(query, (used_before,))
    ]


def blobs_of(database: sqlite3.Connection, key: str) -> dict[Digest, int]:
    """Return the blobs that an image needs, with their sizes in bytes."""
    encoded = first(database, "SELECT record FROM images WHERE key = ?", bytes, bytes.fromhex(key))
    if encoded is None:
        return {}
    ids = msgspec.json.encode(ImageRecord.decode(encoded).blobs).decode()
    query = "SELECT digest, size FROM blobs WHERE id IN (SELECT value FROM json_each(?)) ORDER BY digest"
    return {Digest(digest.hex()): size for digest, size in database.execute(query, (ids,))}


def references(database: sqlite3.Connection) -> Counter[Digest]:
    """Return for every blob how many of the images that are kept need it."""
    collected = blobs.collected(database)
    counts: Counter[bytes] = Counter()
    query = "SELECT digest, chunk, images FROM blob_images JOIN blobs ON blobs.id = blob"
    for digest, chunk, images in database.execute(query):
        counts[digest] += len(images.translate(None, collected[chunk]))
    return Counter({Digest(digest.hex()): count for digest, count in counts.items() if count})


def needed(database: sqlite3.Connection, digests: Iterable[Digest]) -> set[Digest]:
    """Return those of some blobs that an image needs that is kept."""
    collected = blobs.collected(database)
    query = "SELECT chunk, images FROM blob_images WHERE blob = (SELECT id FROM blobs WHERE digest = ?)"
    return {
        digest
        for digest in digests
        if any(
            images.translate(None, collected[chunk])
            for chunk, images in database.execute(query, (bytes.fromhex(digest.hex),))
        )
    }


def forget_image(database: sqlite3.Connection, key: str, used_before: float) -> bool:
    """Keep an image no longer, unless it was used since a time; return whether it was kept till now."""
    update = "UPDATE images SET kept = 0 WHERE key = ? AND kept AND last_used < ?"
    return database.execute(update, (bytes.fromhex(key), used_before)).rowcount == 1


def drop_collected(database: sqlite3.Connection, remembered: int, at_most: int) -> int:
    """Delete images that were collected, all but as many as `remembered`, and what only they had.

    Return how many were deleted: no more than `at_most` at a time.
    """
    rows = database.execute(
        "SELECT id, context, record FROM images WHERE kept = 0 ORDER BY last_used DESC LIMIT ? OFFSET ?",
        (at_most, remembered),
    ).fetchall()
    if not rows:
        return 0
    for image_id, context, encoded in rows:
        blobs.remove_image(database, image_id, _blobs_of(database, image_id, encoded))
        database.execute("DELETE FROM images WHERE id = ?", (image_id,))
        _drop_context(database, context)
    # It has no index by image: once for all of them.
    gone = "image IN (SELECT value FROM json_each(?))"
    ids = (msgspec.json.encode([image_id for image_id, *_ in rows]).decode(),)
    names = database.execute(f"SELECT DISTINCT name FROM tags WHERE {gone}", ids).fetchall()  # noqa: S608
    database.execute(f"DELETE FROM tags WHERE {gone}", ids)  # noqa: S608
    unused = "DELETE FROM names WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM tags WHERE name = ?1)"
    database.executemany(unused, names)
    return len(rows)


def drop_image_indexes(database: sqlite3.Connection, remembered: int) -> None:
    """Delete OCI indexes, all but as many as `remembered` of those made last."""
    database.execute(
        "DELETE FROM image_indexes WHERE digest IN "
        "(SELECT digest FROM image_indexes ORDER BY created_at DESC LIMIT -1 OFFSET ?)",
        (remembered,),
    )


def count(database: sqlite3.Connection) -> tuple[int, int, int, int]:
    """Return how many images are kept, how many blobs they need, with how many bytes, and how many layers."""
    images = first(database, "SELECT COUNT(*) FROM images WHERE kept = 1", int) or 0
    layers = first(database, "SELECT COUNT(DISTINCT blob) FROM layers", int) or 0
    collected = blobs.collected(database)
    query = "SELECT blob, size, chunk, images FROM blob_images JOIN blobs ON blobs.id = blob"
    sizes = {
        blob: size
        for blob, size, chunk, needing in database.execute(query)
        if needing.translate(None, collected[chunk])
    }
    return images, len(sizes), sum(sizes.values()), layers


def _blobs_of(database: sqlite3.Connection, image_id: int, encoded: bytes) -> set[int]:
    try:
        return set(ImageRecord.decode(encoded).blobs)
    except UnreadableRecordError:
        return blobs.blobs_of_unreadable(database, image_id)


def _put_context(database: sqlite3.Connection, recipe: Recipe) -> int:
    context = context_of(recipe)
    digest = bytes.fromhex(Digest.of(context).hex)
    known = first(database, "SELECT id FROM contexts WHERE digest = ?", int, digest)
    if known is not None:
        return known
    insert = "INSERT INTO contexts (digest, revision, recipe) VALUES (?, ?, ?)"
    return id_of_new(database.execute(insert, (digest, recipe.pin.revision, context)))


def _drop_context(database: sqlite3.Connection, context: int) -> None:
    """Delete the context of recipes, unless an image has it."""
    unused = "DELETE FROM contexts WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM images WHERE context = ?1)"
    database.execute(unused, (context,))


def _put_tag(database: sqlite3.Connection, name: int, tag: str, image_id: int) -> None:
    database.execute("INSERT OR IGNORE INTO tags VALUES (?, ?, ?)", (name, tag, image_id))
