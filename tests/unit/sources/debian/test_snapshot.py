import hashlib
import json
from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.layers.package_relations import Relation, parse_relations
from chandlery.plan.package_clusters import MEASURE_VERSION
from chandlery.sources.debian import snapshot as debian_snapshot
from chandlery.sources.debian.snapshot import (
    DebianSnapshot,
    Package,
    Unit,
    parse_packages,
)


def package(
    name: str,
    depends: str = "",
    provides: str = "",
    version: str = "1",
    priority: str = "optional",
    repository: int = 0,
    installed_size: int = 5,
) -> Package:
    content = repr((name, version, depends, provides, priority))
    return Package(
        name,
        version,
        priority,
        repository,
        f"pool/{name}_{version}.deb",
        hashlib.sha256(content.encode()).hexdigest(),
        parse_relations(depends),
        tuple(one for either in parse_relations(provides) for one in either),
        installed_size,
    )


def snapshot_of(*packages: Package, aliases: Mapping[str, Sequence[str]] | None = None) -> DebianSnapshot:
    return DebianSnapshot.of(packages, aliases or {})


def needed(snapshot: DebianSnapshot, name: str) -> tuple[str, ...]:
    return snapshot.units[snapshot.names[name]].references


def versions(unit: Unit) -> list[str]:
    return [each.version for each in unit.packages]


# Reading an index

PARAGRAPHS = """\
Package: bash
Version: 5.2.15-2+b2
Depends: base-files (>= 2.1.12), debianutils (>= 5.6-0.1)
Pre-Depends: libc6 (>= 2.36), libtinfo6 (>= 6)
Description: GNU Bourne Again SHell
 Package: this is a line of a description
 Depends: so is this
Provides: shell, sh (= 5.2)
Installed-Size: 7165
Priority: required
Filename: pool/main/b/bash/bash_5.2.15-2+b2_amd64.deb
SHA256: ab

Package: no-file
Version: 1


Package: last
Version: 1:2~rc1
Installed-Size: much
Filename: pool/last.deb
SHA256: cd"""


def test_a_paragraph_is_a_package_and_pre_dependencies_come_first() -> None:
    bash, last = parse_packages(PARAGRAPHS, 7)

    assert bash == Package(
        "bash",
        "5.2.15-2+b2",
        "required",
        7,
        "pool/main/b/bash/bash_5.2.15-2+b2_amd64.deb",
        "ab",
        (
            (Relation("libc6", ">=", "2.36"),),
            (Relation("libtinfo6", ">=", "6"),),
            (Relation("base-files", ">=", "2.1.12"),),
            (Relation("debianutils", ">=", "5.6-0.1"),),
        ),
        (Relation("shell"), Relation("sh", "=", "5.2")),
        7165,
    )
    assert last == Package("last", "1:2~rc1", "", 7, "pool/last.deb", "cd")


@pytest.mark.parametrize(
    ("text", "relations"),
    [
        ("", ()),
        ("libc6", ((Relation("libc6"),),)),
        ("python3:any (>= 3.11~)", ((Relation("python3", ">=", "3.11~"),),)),
        ("libc6:amd64", ((Relation("libc6"),),)),
        ("g++(>>4:12), ", ((Relation("g++", ">>", "4:12"),),)),
        ("gawk | mawk (= 1),sed", ((Relation("gawk"), Relation("mawk", "=", "1")), (Relation("sed"),))),
        ("a ( << 1-1 )", ((Relation("a", "<<", "1-1"),),)),
    ],
)
def test_a_dependency_field_is_a_conjunction_of_alternatives(
    text: str, relations: tuple[tuple[Relation, ...], ...]
) -> None:
    assert parse_relations(text) == relations


package_names = st.from_regex(r"[a-z0-9][a-z0-9+.-]{1,8}", fullmatch=True)
version_texts = st.from_regex(r"([0-9]:)?[0-9][0-9a-z.+~]{0,5}(-[0-9a-z.+~]{1,3})?", fullmatch=True)
operators = st.sampled_from(["<<", "<=", "=", ">=", ">>"])
relations_of_fields = st.builds(Relation, package_names) | st.builds(
    Relation, package_names, operators, version_texts
)
alternatives_of_fields = st.lists(relations_of_fields, min_size=1, max_size=3).map(tuple)
dependency_fields = st.lists(alternatives_of_fields, max_size=3).map(tuple)
qualifiers = st.sampled_from(["", ":any", ":native", ":amd64"])
spaces = st.sampled_from(["", " ", "  "])


@given(dependency_fields, qualifiers, spaces)
def test_what_is_written_is_what_is_read(
    field: tuple[tuple[Relation, ...], ...], qualifier: str, space: str
) -> None:
    def written(relation: Relation) -> str:
        version = f"{space}({relation.operator}{space}{relation.version})" if relation.operator else ""
        return f"{relation.package}{qualifier}{version}"

    text = f",{space}".join(f"{space}|{space}".join(map(written, either)) for either in field)

    assert parse_relations(text) == field


@pytest.mark.parametrize(
    ("version", "operator", "other", "accepted"),
    [
        ("1.10", ">>", "1.9", True),
        ("1:0.1", ">=", "9", True),
        ("1.0~rc1", "<<", "1.0", True),
        ("1.0-1", "=", "1.0", False),
        ("1.0", "=", "0:1.0", True),
        ("2.36-9+deb12u1", "<=", "2.36-9", False),
        ("5", "<<", "5", False),
        ("5", ">>", "5", False),
        ("anything", "", "", True),
    ],
)
def test_versions_are_compared_as_dpkg_does(version: str, operator: str, other: str, accepted: bool) -> None:
    assert Relation("a", operator, other).accepts(version) is accepted


# Choosing


def test_the_first_alternative_that_exists_is_taken() -> None:
    snapshot = snapshot_of(package("a", "gone | c | b"), package("b"), package("c"))

    assert needed(snapshot, "a") == ("c",)


def test_an_alternative_whose_version_will_not_do_is_passed_over() -> None:
    snapshot = snapshot_of(package("a", "b (>= 2) | c"), package("b"), package("c"))

    assert needed(snapshot, "a") == ("c",)


def test_a_virtual_package_is_its_most_important_provider_and_then_the_first_by_name() -> None:
    providers = [
        package("a-awk", provides="awk", priority="extra"),
        package("b-awk", provides="awk", priority="unheard-of"),
        package("c-awk", provides="awk", priority="required"),
        package("d-awk", provides="awk", priority="required"),
    ]
    snapshot = snapshot_of(package("git", "awk"), *providers)

    assert needed(snapshot, "git") == ("c-awk",)
    assert snapshot.names["awk"] == "c-awk"


def test_a_real_package_comes_before_those_that_provide_its_name() -> None:
    snapshot = snapshot_of(
        package("a", "awk"),
        package("awk", priority="extra"),
        package("mawk", provides="awk", priority="required"),
    )

    assert needed(snapshot, "a") == ("awk",)
    assert snapshot.names["awk"] == "awk"


def test_a_versioned_dependency_is_met_by_a_versioned_provides_alone() -> None:
    snapshot = snapshot_of(
        package("a", "api (>= 2)"),
        package("b", provides="api"),
        package("c", provides="api (= 1)"),
        package("d", provides="api (= 2)"),
    )

    assert needed(snapshot, "a") == ("d",)


def test_a_provider_stands_in_when_the_real_package_has_the_wrong_version() -> None:
    snapshot = snapshot_of(
        package("a", "minitest (<= 5.15)"),
        package("minitest", version="5.17"),
        package("ruby", provides="minitest (= 5.15)"),
    )

    assert needed(snapshot, "a") == ("ruby",)


def test_of_several_versions_the_newest_is_taken() -> None:
    versions_of_git = ["1:1.0~rc1", "9.0", "1:1.0", "1:1.0~rc2"]
    snapshot = snapshot_of(*(package("git", version=version) for version in versions_of_git))

    assert versions(snapshot.units["git"]) == ["1:1.0"]


def test_of_the_same_version_the_first_repository_has_it() -> None:
    copies = [package("git", repository=number) for number in (2, 0, 1)]

    assert [each.repository for each in snapshot_of(*copies).units["git"].packages] == [0]


@pytest.mark.parametrize("odd", ["?", "${shlibs:Depends}", "|", "? | !"])
def test_what_is_no_relation_is_told_and_left_out(odd: str) -> None:
    snapshot = snapshot_of(package("a", f"b, {odd}"), package("b"))

    assert snapshot.unresolved == ("a: ?",)
    assert needed(snapshot, "a") == ("b",)


def test_what_nothing_meets_is_told_and_left_out() -> None:
    snapshot = snapshot_of(package("a", "gone | lost, b"), package("b", "c (>= 2) | gone"), package("c"))

    assert snapshot.unresolved == ("a: gone | lost", "b: c | gone")
    assert needed(snapshot, "a") == ("b",)


def test_a_package_that_needs_itself_has_no_reference_to_itself() -> None:
    assert needed(snapshot_of(package("a", "a, v", provides="v")), "a") == ()


# Cycles


def test_a_cycle_is_one_unit_named_after_its_first_package() -> None:
    snapshot = snapshot_of(
        package("libgcc-s1", "gcc-12-base, libc6"),
        package("libc6", "libgcc-s1"),
        package("gcc-12-base"),
        package("bash", "libgcc-s1"),
    )

    assert [each.name for each in snapshot.units["libc6"].packages] == ["libc6", "libgcc-s1"]
    assert needed(snapshot, "libgcc-s1") == ("gcc-12-base",)
    assert needed(snapshot, "bash") == ("libc6",)
    assert sorted(snapshot.units) == ["bash", "gcc-12-base", "libc6"]


# Aliases


def test_an_alias_of_one_package_is_that_packages_unit() -> None:
    snapshot = snapshot_of(package("b", "a"), package("a", "b"), aliases={"Bee": ["b"]})

    assert snapshot.names["Bee"] == "a"
    assert "Bee" not in snapshot.units


def test_an_alias_of_several_packages_is_a_unit_without_debs_that_needs_them() -> None:
    snapshot = snapshot_of(package("ping"), package("telnet"), aliases={"inetutils": ["telnet", "ping"]})

    assert snapshot.units[snapshot.names["inetutils"]] == Unit("inetutils", (), ("ping", "telnet"))


def test_an_alias_can_lead_to_a_virtual_package() -> None:
    snapshot = snapshot_of(package("mawk", provides="awk"), aliases={"AWK": ["awk"]})

    assert snapshot.names["AWK"] == "mawk"


def test_an_alias_is_shadowed_by_a_package_of_its_name() -> None:
    aliases = {"go": ["golang"], "awk": ["golang"]}
    snapshot = snapshot_of(package("go"), package("golang"), package("mawk", provides="awk"), aliases=aliases)

    assert (snapshot.names["go"], snapshot.names["awk"]) == ("go", "mawk")


def test_an_alias_of_what_the_suite_does_not_have_is_none() -> None:
    snapshot = snapshot_of(package("ping"), aliases={"inetutils": ["ping", "telnet"], "jdk": ["openjdk"]})

    assert sorted(snapshot.names) == ["ping"]


# Whatever the suite

NAMES = [f"package-{letter}" for letter in "abcdefgh"]
some_relations = st.builds(Relation, st.sampled_from([*NAMES, "virtual", "gone"])) | st.builds(
    Relation, st.sampled_from([*NAMES, "virtual"]), operators, st.sampled_from(["1", "2~", "2", "1:1"])
)
some_provides = st.builds(Relation, st.sampled_from([*NAMES, "virtual"])) | st.builds(
    Relation, st.sampled_from([*NAMES, "virtual"]), st.just("="), st.sampled_from(["1", "2"])
)


@st.composite
def packages(draw: st.DrawFn) -> Package:
    name = draw(st.sampled_from(NAMES))
    version = draw(st.sampled_from(["1", "2~", "2", "1:1"]))
    depends = draw(st.lists(st.lists(some_relations, min_size=1, max_size=2).map(tuple), max_size=3))
    provides = draw(st.lists(some_provides, max_size=2))
    priority = draw(st.sampled_from(["required", "optional", ""]))
    content = repr((name, version, depends, provides, priority))
    return Package(
        name,
        version,
        priority,
        draw(st.integers(0, 2)),
        f"pool/{name}_{version}.deb",
        hashlib.sha256(content.encode()).hexdigest(),
        tuple(depends),
        tuple(provides),
    )


suites = st.lists(packages(), max_size=12)
ALIASES = {"Alias": ["package-a"], "Several": ["package-a", "package-b"]}


def meets(candidate: Package, relation: Relation) -> bool:
    if candidate.name == relation.package and relation.accepts(candidate.version):
        return True
    return any(
        provided.package == relation.package
        and (not relation.operator or (provided.version != "" and relation.accepts(provided.version)))
        for provided in candidate.provides
    )


@given(suites)
def test_units_form_an_acyclic_graph_and_hold_every_package_once(suite: list[Package]) -> None:
    snapshot = DebianSnapshot.of(suite, ALIASES)

    TopologicalSorter({name: unit.references for name, unit in snapshot.units.items()}).prepare()
    held = [each.name for unit in snapshot.units.values() for each in unit.packages]
    assert sorted(held) == sorted({each.name for each in suite})
    assert all(unit.name == name for name, unit in snapshot.units.items())


@given(suites)
def test_every_dependency_that_can_be_met_is(suite: list[Package]) -> None:
    snapshot = DebianSnapshot.of(suite, {})
    chosen = [each for unit in snapshot.units.values() for each in unit.packages]

    for unit in snapshot.units.values():
        reached = {each for name in (unit.name, *unit.references) for each in snapshot.units[name].packages}
        for each in unit.packages:
            for alternatives in each.depends:
                text = f"{each.name}: {' | '.join(relation.package for relation in alternatives)}"
                can_be_met = any(meets(other, relation) for other in chosen for relation in alternatives)
                is_met = any(meets(other, relation) for other in reached for relation in alternatives)
                assert is_met or not can_be_met, text
                # Without a choice, a package of the right name is better than none.
                named = len(alternatives) == 1 and alternatives[0].package in {
                    other.name for other in reached
                }
                assert is_met or named or text in snapshot.unresolved


@given(suites, st.randoms(use_true_random=False))
def test_a_lock_does_not_depend_on_the_order_of_the_index(suite: list[Package], random: Random) -> None:
    shuffled = list(suite)
    random.shuffle(shuffled)

    assert DebianSnapshot.of(shuffled, ALIASES) == DebianSnapshot.of(suite, ALIASES)


# The files of a snapshot


def shard(name: str, files: Mapping[str, bytes]) -> dict[str, dict[str, object]]:
    key = hashlib.sha256(name.encode()).hexdigest()[:3]
    decoded: dict[str, dict[str, object]] = json.loads(files[f"{key}.json"])
    return decoded


def test_every_name_and_every_unit_is_found_by_its_sha256() -> None:
    names = [f"lib{number}" for number in range(50)]
    snapshot = snapshot_of(
        *(package(name, "virtual", version="1:2~") for name in names),
        package("real", provides="virtual"),
        aliases={"Several": names[:2], "one": names[:1]},
    )
    files = dict(snapshot.files())

    shards = [json.loads(files[f"{number:03x}.json"]) for number in range(16**3)]
    assert len(files) == len(shards) + 1
    assert sum(len(each["names"]) for each in shards) == len(snapshot.names)
    assert {name: shard(name, files)["names"][name] for name in snapshot.names} == dict(snapshot.names)
    for unit in snapshot.units.values():
        assert shard(unit.name, files)["units"][unit.name] == {
            "debs": [
                {
                    "name": each.name,
                    "version": each.version,
                    "repository": each.repository,
                    "filename": each.filename,
                    "sha256": each.sha256,
                    "installed_size": 5,
                }
                for each in unit.packages
            ],
            "references": list(unit.references),
        }
    assert files["names.txt"].decode().splitlines() == sorted(snapshot.names)


@pytest.mark.parametrize(
    "other",
    [
        snapshot_of(package("a", "b"), package("b", version="2")),
        snapshot_of(package("a"), package("b")),
        snapshot_of(package("a", "b"), package("b"), package("c")),
        snapshot_of(package("a", "b"), package("b", repository=1)),
        snapshot_of(package("a", "b"), package("b", provides="v")),
        snapshot_of(package("a", "b"), package("b", installed_size=6)),
        snapshot_of(package("a", "b"), package("b"), aliases={"A": ["a"]}),
    ],
)
def test_a_revision_is_the_hash_of_all_of_a_lock(other: DebianSnapshot) -> None:
    snapshot = snapshot_of(package("a", "b"), package("b"))

    assert snapshot.revision() == snapshot_of(package("b"), package("a", "b")).revision()
    assert snapshot.revision() != other.revision()
    assert len(snapshot.revision()) == 64


def test_popularity_counts_units_and_knows_what_every_image_and_every_shell_has() -> None:
    apps = [package(f"app{number}", "libc, gui") for number in range(300)]
    others = [package(f"tool{number}", "libc") for number in range(300)]
    gui = [package("gui", "libc, gui-data"), package("gui-data", "libc")]
    cycle = [package("one", "two"), package("two", "one")]
    base = [package("ca-certificates", "openssl"), package("openssl"), package("libc")]
    snapshot = snapshot_of(*apps, *others, *gui, *cycle, *base, aliases={"cacert": ["ca-certificates"]})
    popularity = snapshot.popularity()

    assert popularity["app7"] == 1
    assert popularity["gui"] == 301
    assert popularity["libc"] == 603
    assert popularity["one"] == 1
    assert "two" not in popularity
    assert popularity["openssl"] == popularity["ca-certificates"] == len(snapshot.units)
    assert popularity.groups["gui"] == popularity.groups["gui-data"] != popularity.groups.get("libc")
    assert popularity.groups["openssl"] == popularity.groups["ca-certificates"]
    assert snapshot.popularity().identity == popularity.identity


def test_another_way_to_measure_popularity_is_another_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = snapshot_of(package("a"))
    before = snapshot.revision()
    monkeypatch.setattr(debian_snapshot, "MEASURE_VERSION", MEASURE_VERSION + 1)
    assert snapshot.revision() != before
