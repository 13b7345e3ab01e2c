import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.errors import InvalidDigestError
from chandlery.oci.digest import Digest

texts = st.lists(st.text(max_size=5), max_size=5)


@given(st.binary())
def test_a_digest_is_the_sha256_and_reads_back(content: bytes) -> None:
    digest = Digest.of(content)
    assert str(digest) == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert Digest.parse(str(digest)) == digest


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256:",
        "sha256:" + "a" * 63,
        "sha256:" + "a" * 65,
        "sha256:" + "A" * 64,
        "sha256:" + "g" * 64,
        "sha256:" + "a" * 64 + "\n",
        " sha256:" + "a" * 64,
        "sha512:" + "a" * 128,
        "a" * 64,
        "sha256:../../../../etc/passwd",
        "sha256:" + "٣" * 64,
    ],
)
def test_what_is_no_digest_is_refused(text: str) -> None:
    with pytest.raises(InvalidDigestError) as caught:
        Digest.parse(text)
    assert caught.value.text == text


@given(texts, texts)
def test_different_lists_have_different_digests(left: list[str], right: list[str]) -> None:
    assert (Digest.of_parts(left) == Digest.of_parts(right)) == (left == right)


def test_where_a_part_ends_counts() -> None:
    lists = [["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], ["1:a"], ["a", "1:a"]]
    assert len({Digest.of_parts(parts) for parts in lists}) == len(lists)


def test_a_part_may_be_no_unicode() -> None:
    assert Digest.of_parts(["\udcff"]) != Digest.of_parts(["\udcfe"])
