import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from chandlery.oci.digest import Digest
from chandlery.oci.documents import (
    DOCKER_MANIFEST,
    DOCKER_MANIFEST_LIST,
    OCI_INDEX,
    OCI_MANIFEST,
    ManifestFormat,
)
from chandlery.registry.negotiation import accepted_formats, entity_tag, is_known, is_unwanted, wanted_ranges

DIGEST = Digest.of(b"content")
OTHER = Digest.of(b"other content")


@pytest.mark.parametrize(
    ("accept", "docker"),
    [
        ("", False),
        ("*/*", False),
        ("application/*", False),
        (OCI_MANIFEST, False),
        (DOCKER_MANIFEST, True),
        (f"{DOCKER_MANIFEST}, {OCI_MANIFEST}", False),
        (f"{DOCKER_MANIFEST}, */*", False),
        (f"{DOCKER_MANIFEST}, */*;q=0.5", True),
        (f"{DOCKER_MANIFEST},,", True),
        (f"{OCI_MANIFEST};q=0, {DOCKER_MANIFEST}", True),
        (f"{OCI_MANIFEST};q=0, */*", True),
        (f"{DOCKER_MANIFEST};q=0, {OCI_MANIFEST}", False),
        (f"{DOCKER_MANIFEST} ; Q=0.9 , {OCI_MANIFEST} ; q=0.3", True),
        (f"{DOCKER_MANIFEST};q=lots, {OCI_MANIFEST};q=0.1", False),
        (f"{OCI_INDEX}, text/html", False),
        (f"{OCI_INDEX}, {DOCKER_MANIFEST.upper()}", True),
    ],
)
def test_the_format_is_what_accept_prefers(accept: str, docker: bool) -> None:
    assert accepted_formats([accept]).manifest is (ManifestFormat.DOCKER if docker else ManifestFormat.OCI)


@pytest.mark.parametrize(
    ("accept", "index"),
    [
        ("", None),
        ("*/*", None),
        (f"{OCI_MANIFEST}, application/*", None),
        (OCI_INDEX, ManifestFormat.OCI),
        (DOCKER_MANIFEST_LIST, ManifestFormat.DOCKER),
        (f"{DOCKER_MANIFEST}, {DOCKER_MANIFEST_LIST}, {OCI_INDEX}, {OCI_MANIFEST}", ManifestFormat.OCI),
        (f"{OCI_INDEX};q=0.3, {DOCKER_MANIFEST_LIST}", ManifestFormat.DOCKER),
        (f"{OCI_INDEX};q=0", None),
        (f"{OCI_INDEX};q=0, {DOCKER_MANIFEST_LIST};q=0.1", ManifestFormat.DOCKER),
    ],
)
def test_an_index_is_for_those_that_name_one(accept: str, index: ManifestFormat | None) -> None:
    assert accepted_formats([accept]).index is index


@given(st.lists(st.text()))
def test_any_accept_chooses_a_format(accept: list[str]) -> None:
    assert accepted_formats(accept).manifest in ManifestFormat


@pytest.mark.parametrize(
    ("listed", "known"),
    [
        ([f'"{DIGEST}"'], True),
        ([f'W/"{DIGEST}"'], True),
        ([f'"{OTHER}" , "{DIGEST}"'], True),
        ([f'"{OTHER}"', f'"{DIGEST}"'], True),
        (["*"], True),
        ([f'"{OTHER}"'], False),
        ([str(DIGEST)], False),
        ([""], False),
        ([], False),
    ],
)
def test_if_none_match_lists_what_a_client_has(listed: list[str], known: bool) -> None:
    headers = Headers(raw=[(b"if-none-match", value.encode()) for value in listed])
    assert is_known(headers, DIGEST) == known


@pytest.mark.parametrize(
    ("listed", "unwanted"),
    [
        ([f'"{OTHER}"'], True),
        ([f'W/"{DIGEST}"'], True),
        ([""], True),
        ([f'"{OTHER}", "{DIGEST}"'], False),
        (["*"], False),
        ([], False),
    ],
)
def test_if_match_lists_all_that_a_client_wants(listed: list[str], unwanted: bool) -> None:
    headers = Headers(raw=[(b"if-match", value.encode()) for value in listed])
    assert is_unwanted(headers, DIGEST) == unwanted


@pytest.mark.parametrize(
    ("if_range", "ranges"), [(None, 1), (entity_tag(DIGEST), 1), (entity_tag(OTHER), 0), ("yesterday", 0)]
)
def test_if_range_makes_a_range_count_for_the_same_content_only(if_range: str | None, ranges: int) -> None:
    conditions = {} if if_range is None else {"if-range": if_range}
    assert len(wanted_ranges(Headers({"range": "bytes=0-9", **conditions}), DIGEST, 100)) == ranges


def test_without_a_range_everything_is_wanted() -> None:
    assert wanted_ranges(Headers({}), DIGEST, 100) == ()
