"""What the headers of a request choose (RFC 9110): a format, whether anything is sent, and which bytes.

Content never changes under its digest, so the digest is the strong entity tag of whatever is sent.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers

from chandlery.oci.digest import Digest
from chandlery.oci.documents import (
    DOCKER_MANIFEST,
    DOCKER_MANIFEST_LIST,
    OCI_INDEX,
    OCI_MANIFEST,
    ManifestFormat,
)
from chandlery.registry import ranges
from chandlery.storage.byte_range import ByteRange


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a client takes: the format of a manifest, and that of an index, None if it takes none."""

    manifest: ManifestFormat
    index: ManifestFormat | None


def accepted_formats(accept: Iterable[str]) -> Accepted:
    """Choose from what a client's Accept headers say (section 12.5.1); OCI unless Docker is better.

    A client that lists no manifest gets OCI's, so that every pull works. An index is only for those that list
    one: what takes `*/*` may not know what to do with it.
    """
    quality: dict[str, float] = {}
    for item in ",".join(accept).split(","):
        media_range, *parameters = (text.strip().lower() for text in item.split(";"))
        weight = next((text[2:] for text in parameters if text.startswith("q=")), "1")
        quality[media_range] = float(weight) if re.fullmatch(r"[01](\.[0-9]{0,3})?", weight) else 0.0

    def of(media_type: str) -> float:
        nearest_first = (media_type, "application/*", "*/*")
        return next((quality[item] for item in nearest_first if item in quality), 0.0)

    oci_index, docker_index = (quality.get(each, 0.0) for each in (OCI_INDEX, DOCKER_MANIFEST_LIST))
    index = ManifestFormat.DOCKER if docker_index > oci_index else ManifestFormat.OCI
    return Accepted(
        ManifestFormat.DOCKER if of(DOCKER_MANIFEST) > of(OCI_MANIFEST) else ManifestFormat.OCI,
        index if max(oci_index, docker_index) > 0 else None,
    )


def entity_tag(digest: Digest) -> str:
    """Return the ETag of some content (section 8.8.3)."""
    return f'"{digest}"'


def is_unwanted(headers: Headers, digest: Digest) -> bool:
    """Return whether If-Match asks for other content only; a weak tag never matches (section 13.1.1)."""
    return "if-match" in headers and not {"*", entity_tag(digest)} & _listed(headers, "if-match")


def is_known(headers: Headers, digest: Digest) -> bool:
    """Return whether If-None-Match names the content, so that the client has it (section 13.1.2)."""
    tags = {tag.removeprefix("W/") for tag in _listed(headers, "if-none-match")}
    return bool({"*", entity_tag(digest)} & tags)


def wanted_ranges(headers: Headers, digest: Digest, size: int) -> Sequence[ByteRange]:
    """Return the ranges that a GET is for; none means all of it. Raises `UnsatisfiableRangeError`.

    If-Range makes Range count only if the client has begun with the same content (section 13.1.5).
    """
    header = headers.get("range")
    if header is None or headers.get("if-range", entity_tag(digest)) != entity_tag(digest):
        return ()
    return ranges.parse(header, size)


def _listed(headers: Headers, name: str) -> set[str]:
    return {item.strip() for item in ",".join(headers.getlist(name)).split(",")}
