"""Content digests, written `sha256:<hex>` (OCI image-spec, descriptor.md).

Only sha256 is used: it is the one algorithm that every client must know.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from chandlery.errors import InvalidDigestError

_SHA256 = re.compile(r"sha256:([a-f0-9]{64})")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """The sha256 of some bytes."""

    hex: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a digest from a URL or a manifest; `InvalidDigestError` if it is none."""
        match = _SHA256.fullmatch(text)
        if match is None:
            raise InvalidDigestError(text)
        return cls(match[1])

    @classmethod
    def of(cls, content: bytes) -> Self:
        """Return the digest of some bytes."""
        return cls(hashlib.sha256(content).hexdigest())

    @classmethod
    def of_parts(cls, parts: Iterable[str]) -> Self:
        """Return the digest of a list of texts, so that no two different lists agree.

        Each part is preceded by its length: `["ab", "c"]` and `["a", "bc"]` differ.
        """
        state = hashlib.sha256()
        for part in parts:
            encoded = part.encode("utf-8", "surrogateescape")
            state.update(b"%d:" % len(encoded))
            state.update(encoded)
        return cls(state.hexdigest())

    def __str__(self) -> str:
        return f"sha256:{self.hex}"
