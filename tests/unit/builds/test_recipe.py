from dataclasses import replace

import pytest

from chandlery.builds.recipe import BuildOptions, Recipe
from chandlery.image.name import ImageRequest
from chandlery.image.profile import Profile
from chandlery.layers.compression import COMPRESSIONS
from chandlery.layers.root_layer import RootLayerOptions
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.documents import Platform

PIN = PinnedSource("path", "/srv/packages", "1" * 64)
REQUEST = ImageRequest(("git", "jq"), Platform("linux", "amd64"))
ORIGIN = Recipe(PIN, REQUEST, BuildOptions())


@pytest.mark.parametrize(
    "other",
    [
        replace(ORIGIN, pin=replace(PIN, kind="debian")),
        replace(ORIGIN, pin=replace(PIN, location="/srv/other")),
        replace(ORIGIN, pin=replace(PIN, revision="2" * 64)),
        replace(ORIGIN, request=replace(REQUEST, packages=("gitjq",))),
        replace(ORIGIN, request=replace(REQUEST, packages=("git",))),
        replace(ORIGIN, pin=replace(PIN, variant="3" * 64)),
        replace(ORIGIN, request=replace(REQUEST, profiles=("shell",))),
        replace(ORIGIN, request=replace(REQUEST, profile=Profile(user="nonroot"))),
        replace(ORIGIN, request=replace(REQUEST, profile=Profile(packages=("bash",)))),
        replace(ORIGIN, request=replace(REQUEST, profile=Profile(command=("a", "b")))),
        replace(ORIGIN, request=replace(REQUEST, profile=Profile(command=("ab",)))),
        replace(ORIGIN, request=replace(REQUEST, profile=Profile(environment={"a": "b"}))),
        replace(ORIGIN, request=replace(REQUEST, profile=Profile(labels={"a": "b"}))),
        replace(ORIGIN, request=replace(REQUEST, profile=Profile(exposed_ports=("80",)))),
        replace(ORIGIN, request=replace(REQUEST, platform=Platform("linux", "arm64"))),
        replace(ORIGIN, popularity="4" * 64),
        replace(ORIGIN, options=BuildOptions(max_layers=95)),
        replace(ORIGIN, options=BuildOptions(compression="zstd")),
        replace(ORIGIN, options=BuildOptions(strategy="other")),
        replace(ORIGIN, options=BuildOptions(root_layer=RootLayerOptions(uid=1000))),
        replace(ORIGIN, options=BuildOptions(root_layer=RootLayerOptions(gid=1000))),
        replace(ORIGIN, options=BuildOptions(root_layer=RootLayerOptions(extra_commands="true"))),
    ],
)
def test_whatever_is_another_in_an_origin_is_another_image(other: Recipe) -> None:
    assert other.key != ORIGIN.key


@pytest.mark.parametrize(
    "same",
    [
        replace(ORIGIN, request=replace(REQUEST, reference="1111111111111111")),
        replace(ORIGIN, request=replace(REQUEST, source="ours")),
        replace(ORIGIN, request=replace(REQUEST, any_platform=True)),
        replace(ORIGIN, pin=replace(PIN, stale="the mirror is dead")),
        replace(ORIGIN, pin=replace(PIN, nix={"lock": "/elsewhere"})),
        replace(ORIGIN, pin=replace(PIN, nix=None)),
        replace(ORIGIN, pin=replace(PIN, popularity="/elsewhere/popularity.json")),
    ],
)
def test_what_the_tag_was_and_where_nix_finds_the_source_make_no_other_image(same: Recipe) -> None:
    assert same.key == ORIGIN.key


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_the_version_of_the_compressor_is_a_part_of_the_key(name: str) -> None:
    assert COMPRESSIONS[name].fingerprint in BuildOptions(compression=name).key_parts()
