import json
from typing import Any

import pytest

from chandlery.nix.closure_json import parse_closure

APP, LIB = f"/nix/store/{'0' * 32}-app-1", f"/nix/store/{'1' * 32}-lib-2"
NODES: list[dict[str, Any]] = [
    {"path": APP, "narSize": 5, "references": [APP, LIB], "narHash": "sha256:0", "ultimate": True},
    {"path": LIB, "narSize": 7, "references": []},
]
BY_PATH = {node["path"]: {name: value for name, value in node.items() if name != "path"} for node in NODES}


def read(document: object) -> tuple[list[str], list[tuple[str, int, list[str]]]]:
    closure = parse_closure(json.dumps(document).encode())
    return [path.text for path in closure.roots], [
        (node.path.text, node.nar_size, [path.text for path in node.references]) for node in closure.nodes
    ]


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(NODES, id="path-info of Nix 2.8"),
        pytest.param(
            [*NODES, {"path": f"{APP}x", "narSize": 0, "references": [], "valid": False}], id="invalid"
        ),
        pytest.param(BY_PATH, id="path-info of Nix 2.19"),
        pytest.param(
            {"exportReferencesGraph": {"graph": [APP]}, "graph": NODES, "builder": "/bin/sh"}, id="attributes"
        ),
        pytest.param({"exportReferencesGraph": {"closure": APP}, "closure": NODES}, id="one root"),
    ],
)
def test_what_nix_prints_is_read(document: object) -> None:
    assert read(document) == ([APP], [(APP, 5, [LIB]), (LIB, 7, [])])


def test_references_without_the_folder_are_read() -> None:
    nodes = [{**node, "references": [path[11:] for path in node["references"]]} for node in NODES]
    assert read(nodes) == ([APP], [(APP, 5, [LIB]), (LIB, 7, [])])


def test_named_roots_count() -> None:
    roots, _ = read({"exportReferencesGraph": {"graph": [APP, LIB]}, "graph": NODES})
    assert roots == [APP, LIB]


def test_a_closure_that_lacks_a_store_path_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lacks .*lib-2, .*--recursive"):
        read(NODES[:1])


@pytest.mark.parametrize("content", [b"", b"7", b'[{"path": "/nix/store/x"}]', b'[{"narSize": 1}]'])
def test_anything_else_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="closure"):
        parse_closure(content)


def test_a_path_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="not a store path"):
        read([{"path": "/etc/passwd", "narSize": 1, "references": []}])


def test_nothing_is_a_closure_of_nothing() -> None:
    assert read([]) == ([], [])
