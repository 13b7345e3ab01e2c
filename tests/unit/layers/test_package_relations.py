import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.layers.package_relations import RelatedPackage, Relation


def related(**fields: str) -> RelatedPackage:
    [package] = RelatedPackage.parse("".join(f"{name}: {value}\n" for name, value in fields.items()).encode())
    return package


def test_each_paragraph_is_a_package_and_fields_may_go_over_several_lines() -> None:
    content = (
        b"Package: exim4\nVersion: 4.96-15\nProvides: mail-transport-agent\n"
        b"Conflicts: mail-transport-agent,\n smail (<< 3),\n\tzmailer\n\n"
        b"Package: exim4-config\nVersion: 4.96-15\n\n"
    )

    exim, config = RelatedPackage.parse(content)

    agent = Relation("mail-transport-agent")
    conflicts = (agent, Relation("smail", "<<", "3"), Relation("zmailer"))
    assert exim == RelatedPackage("exim4", "4.96-15", (agent,), conflicts)
    assert config == RelatedPackage("exim4-config", "4.96-15")


@given(st.binary(max_size=200) | st.text("Package:\n, (<=a1)\t", max_size=60).map(str.encode))
def test_whatever_stands_there_can_be_read(content: bytes) -> None:
    for one in RelatedPackage.parse(content):
        assert one.conflicts_with(one) in (True, False)


@pytest.mark.parametrize(
    ("conflicts", "other", "answer"),
    [
        ("b", {}, True),
        ("c", {}, False),
        ("b (<< 2)", {"Version": "1"}, True),
        ("b (<< 2)", {"Version": "2"}, False),
        ("c", {"Provides": "c"}, True),
        ("c (<< 2)", {"Provides": "c"}, False),
        ("c (<< 2)", {"Provides": "c (= 1)"}, True),
        ("b (<< $)", {"Version": "1"}, False),
        ("a, b:any", {}, True),
    ],
)
def test_packages_conflict_by_name_version_and_what_they_provide(
    conflicts: str, other: dict[str, str], answer: bool
) -> None:
    one = related(Package="a", Version="1", Conflicts=conflicts)

    assert one.conflicts_with(related(Package="b", **other)) is answer


def test_a_package_replaces_others_by_name_and_version_alone() -> None:
    one = related(Package="a", Replaces="b (<< 2), c")

    assert one.does_replace(related(Package="b", Version="1"))
    assert not one.does_replace(related(Package="b", Version="2"))
    # dpkg has it so: a name that is provided is for what conflicts.
    assert not one.does_replace(related(Package="d", Provides="c"))
