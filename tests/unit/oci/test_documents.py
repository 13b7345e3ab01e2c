import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.oci import documents as oci
from chandlery.oci.digest import Digest
from chandlery.oci.documents import (
    CREATED,
    OCI_LAYER,
    ContainerConfig,
    Descriptor,
    ManifestFormat,
    PackedLayer,
    Platform,
    canonical_json,
    image_config,
    image_manifest,
)

AMD64 = Platform("linux", "amd64")
CONFIG = b'{"architecture":"amd64"}'
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def a_layer(text: str, media_type: str = f"{OCI_LAYER}+gzip") -> PackedLayer:
    return PackedLayer(
        Descriptor(media_type, Digest.of(text.encode()), len(text)),
        Digest.of(f"tar of {text}".encode()),
    )


def config(*layers: PackedLayer, container: ContainerConfig | None = None) -> Any:
    described = [(layer, f"layer {number}") for number, layer in enumerate(layers)]
    return json.loads(image_config(AMD64, described, container or ContainerConfig()))


def manifest(manifest_format: ManifestFormat, *media_types: str, **annotations: str) -> Any:
    descriptors = [a_layer(media_type, media_type).descriptor for media_type in media_types]
    return json.loads(image_manifest(manifest_format, CONFIG, descriptors, annotations))


@given(json_values)
def test_canonical_json_is_json(value: Any) -> None:
    assert json.loads(canonical_json(value)) == value


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_canonical_json_does_not_depend_on_the_order_of_keys(value: dict[str, int]) -> None:
    assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)


def test_canonical_json_has_no_spaces() -> None:
    assert canonical_json({"b": [1, 2], "a": {"c": None}}) == b'{"a":{"c":null},"b":[1,2]}'


def test_a_config_has_a_diff_id_and_a_line_of_history_for_each_layer() -> None:
    first, second = a_layer("first"), a_layer("second")
    described = config(first, second)
    assert described["rootfs"] == {
        "type": "layers",
        "diff_ids": [str(first.diff_id), str(second.diff_id)],
    }
    assert [entry["created_by"] for entry in described["history"]] == ["layer 0", "layer 1"]


def test_a_config_was_created_at_a_fixed_time() -> None:
    described = config(a_layer("first"))
    assert described["created"] == described["history"][0]["created"] == CREATED == "1970-01-01T00:00:01Z"


def test_a_config_names_its_platform_as_go_does() -> None:
    described = json.loads(image_config(Platform("linux", "arm64"), [], ContainerConfig()))
    assert (described["os"], described["architecture"]) == ("linux", "arm64")


def test_what_a_container_is_started_with() -> None:
    container = ContainerConfig(
        ("/bin/tini",),
        ("/bin/sh", "-l"),
        {"PATH": "/bin", "LANG": "C"},
        "nobody",
        "/tmp",
        ("8080/tcp", "53/udp"),
        {"a": "b"},
    )
    assert config(container=container)["config"] == {
        "Entrypoint": ["/bin/tini"],
        "Cmd": ["/bin/sh", "-l"],
        "ExposedPorts": {"53/udp": {}, "8080/tcp": {}},
        "Env": ["LANG=C", "PATH=/bin"],
        "User": "nobody",
        "WorkingDir": "/tmp",
        "Labels": {"a": "b"},
    }


def test_what_is_empty_is_left_out_of_the_config() -> None:
    assert config()["config"] == {}


def test_an_oci_manifest_points_at_its_config_and_layers() -> None:
    layer = f"{OCI_LAYER}+gzip"
    assert manifest(ManifestFormat.OCI, layer, note="text") == {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": str(Digest.of(CONFIG)),
            "size": len(CONFIG),
        },
        "layers": [{"mediaType": layer, "digest": str(Digest.of(layer.encode())), "size": len(layer)}],
        "annotations": {"note": "text"},
    }


def test_a_docker_manifest_is_the_same_in_the_media_types_of_docker() -> None:
    layer = f"{OCI_LAYER}+gzip"
    docker, of_oci = manifest(ManifestFormat.DOCKER, layer, note="text"), manifest(ManifestFormat.OCI, layer)
    assert docker.pop("mediaType") == "application/vnd.docker.distribution.manifest.v2+json"
    assert docker["config"].pop("mediaType") == "application/vnd.docker.container.image.v1+json"
    assert docker["layers"][0].pop("mediaType") == "application/vnd.docker.image.rootfs.diff.tar.gzip"
    for described in (of_oci, of_oci["config"], of_oci["layers"][0]):
        del described["mediaType"]
    assert docker == of_oci


@pytest.mark.parametrize(
    ("of_oci", "of_docker"),
    [
        (OCI_LAYER, "application/vnd.docker.image.rootfs.diff.tar"),
        (f"{OCI_LAYER}+gzip", "application/vnd.docker.image.rootfs.diff.tar.gzip"),
        (f"{OCI_LAYER}+zstd", f"{OCI_LAYER}+zstd"),
    ],
)
def test_every_compression_has_a_media_type_in_a_docker_manifest(of_oci: str, of_docker: str) -> None:
    [layer] = manifest(ManifestFormat.DOCKER, of_oci)["layers"]
    assert layer["mediaType"] == of_docker


def test_annotations_of_a_descriptor_are_written_only_if_there_are_any() -> None:
    digest = Digest.of(b"")
    assert "annotations" not in Descriptor(OCI_LAYER, digest, 0).to_json()
    assert Descriptor(OCI_LAYER, digest, 0, {"a": "b"}).to_json()["annotations"] == {"a": "b"}


@pytest.mark.parametrize(
    ("machine", "architecture", "system"),
    [("x86_64", "amd64", "x86_64-linux"), ("aarch64", "arm64", "aarch64-linux")],
)
def test_the_platform_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, machine: str, architecture: str, system: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    host = Platform.of_host()
    assert (str(host), host.nix_system) == (f"linux/{architecture}", system)
    assert host.architecture in oci.ARCHITECTURES
