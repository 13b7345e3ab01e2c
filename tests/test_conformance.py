"""The table in docs/conformance.md names tests; a test that is renamed must not leave its row behind."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TABLE = (TESTS.parent / "docs" / "conformance.md").read_text()


def rows() -> Iterator[tuple[str, str, str]]:
    """Yield requirement, section and tests of every row, less the heads of the tables."""
    for line in TABLE.splitlines():
        if line.startswith("| ") and not line.startswith(("| ---", "| requirement ")):
            requirement, section, tests = (cell.strip() for cell in line.strip("|").split(" | "))
            yield requirement, section, tests


def functions(file: Path) -> set[str]:
    """Return the names of the functions at the top of a file."""
    tree = ast.parse(file.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize(("requirement", "section", "tests"), list(rows()))
def test_every_requirement_has_tests_that_exist(requirement: str, section: str, tests: str) -> None:
    assert requirement
    assert section
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", tests)
    assert named, "no test is named"
    assert tests == ", ".join(f"`{file}::{test}`" for file, test in named)
    for file, test in named:
        assert test in functions(TESTS / file), f"{file} has no {test}"


def test_every_endpoint_that_is_claimed_has_a_row() -> None:
    sections = " ".join(section for _, section, _ in rows())
    assert {"end-1", "end-2", "end-3", "end-8a", "end-8b", "end-12a", "end-12b"} <= set(
        re.findall(r"end-\d+[ab]?", sections)
    )
