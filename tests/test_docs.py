"""Documents name tests, code and each other; what they name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Decisions name what there was at their time.
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")],
)
_TEST = re.compile(r"\btests/[\w/]+(?:\.py)?(?:::(\w+))?")
_LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(?:#([^)\s]+))?\)")


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as forges make them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_tests_that_a_document_names_are_there(document: Path) -> None:
    for found in _TEST.finditer(document.read_text()):
        path, _, name = found[0].partition("::")
        assert (ROOT / path).exists(), f"{document.name}: {path}"
        if name:
            assert f"def {name}(" in (ROOT / path).read_text(), f"{document.name}: {found[0]}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_documents_that_a_document_links_to_are_there(document: Path) -> None:
    for found in _LINK.finditer(document.read_text()):
        target = document.parent / found[1]
        assert target.exists(), f"{document.name}: {found[1]}"
        if found[2] and target.suffix == ".md":
            assert found[2] in anchors(target), f"{document.name}: {found[0]}"
