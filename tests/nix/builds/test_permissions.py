"""Access rules and what names turn out to be: with real Nix, so that every spelling is one that Nix finds."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from chandlery.access.rules import EVERYTHING, Permission, Rule
from chandlery.builds.images import Pulled
from chandlery.builds.sqlite.schema import file_of
from chandlery.errors import BuildError, EvaluationError, PackagesNotFoundError, PullDeniedError
from chandlery.image import name as image_name
from chandlery.image.name import LATEST, ImageRequest, NamePrefixes
from chandlery.image.profile import Profile
from chandlery.machine.deadline import Deadline
from chandlery.nix.nix import NixLimits
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.documents import ManifestFormat, Platform
from chandlery.sources.package_source import PackageSource
from tests.support.nix_package_set import packages, requires_nix
from tests.support.workshop import HOST, NAME_PREFIXES, Workshop, opened

pytestmark = requires_nix

SET = """
  victim = build "victim-1" "echo secret > $out" // { pname = "victim"; meta.mainProgram = "victim"; };
  # Another derivation, for whose name nothing speaks but the packages on the way to it.
  wrapped = victim // { unwrapped = build "core-1" "echo > $out"; };
  other-name = hidden;
  hidden = build "plain-1" "echo hidden > $out";
  needs-victim = build "scanner-1" "echo ${victim} > $out";
  pkgs = { inherit victim hidden pkgs; };
  static = { lib.jdk = build "static-1" "echo > $out"; openjdk = static.lib.jdk; inherit static; };
  lib.jdk = build "dynamic-1" "echo > $out";
  Spelled = build "other-1" "echo > $out"; _1tool = build "tool-1" "echo > $out";
  python311Packages = {
    numpy = build "python3.11-numpy-1" "echo > $out"; six = build "six-1" "echo > $out";
  };
  python3Packages = python311Packages;
  throws = throw "no licence"; sets = { throws = throw "no licence for anybody"; };
  innocent = build "innocent-1" "echo > $out"; innocence = innocent;
  cacert = build "cacert-1" "echo > $out"; iana-etc = build "iana-1" "echo > $out";
"""
ALICE = Permission("alice", Rule(deny=("nothing",)))
DENYING = Permission(
    "bob", Rule(deny=("victim", "hidden", "python3Packages.numpy", "lib.jdk", "spelled", "1tool"))
)


class Branches:
    """A folder whose tags choose branches, all of which hold the same."""

    text = "git!ours!main"
    platforms = (HOST,)

    def __init__(self, pin: PinnedSource) -> None:
        self.kind, self.location = pin.kind, pin.location
        self.now = pin
        self.revisions = {"draft": "d" * 64, "d" * 16: "d" * 64}
        self.gone = False
        self.asked: list[str] = []

    def serves(self, location: str) -> bool:
        return location == self.location

    async def upstreams(self) -> Sequence[str]:
        return ()

    async def pin(self, reference: str, platform: Platform) -> PinnedSource:
        self.asked.append(reference)
        return replace(self.now, revision=self.revisions.get(reference, self.now.revision))

    def chosen_by(self, reference: str, pin: PinnedSource | None = None) -> str:
        return "" if reference == LATEST else f"git!ours!{reference}"

    async def at(self, revision: str, platform: Platform) -> PinnedSource | None:
        return None if self.gone else replace(self.now, revision=revision)

    async def refresh(self, max_age: float) -> None: ...

    def keep(self, revisions: Sequence[str]) -> None: ...

    async def close(self) -> None: ...


@pytest.fixture
def source(tmp_path: Path) -> Branches:
    return Branches(packages(tmp_path / "set", SET))


@pytest.fixture
async def shop(tmp_path: Path, source: Branches) -> AsyncIterator[Workshop]:
    as_source: PackageSource = source
    async with opened(tmp_path, source=as_source) as shop:
        yield shop


def asking(name: str, tag: str = LATEST, **profiles: Profile) -> ImageRequest:
    prefixes = NamePrefixes(NAME_PREFIXES.host, profiles={**NAME_PREFIXES.profiles, **profiles})
    return image_name.parse(name, tag, prefixes)


async def pull(shop: Workshop, request: ImageRequest, permission: Permission = DENYING) -> Pulled:
    return await shop.images.pull(request, "bob", permission=permission)


SPELLINGS = [
    *("victim.out", "victim.out.out", "pkgs.victim", "pkgs.pkgs.victim.out", "wrapped.unwrapped", "wrapped"),
    *("other-name", "pkgs.hidden", "python311packages.numpy", "python311packages.numpy.out", "spelled"),
    *("static.openjdk", "static.static.static.openjdk.out.out.out"),
    *("spelled.out", "1tool.out"),
]


@pytest.mark.parametrize("name", SPELLINGS)
async def test_what_is_denied_is_denied_however_it_is_spelled_and_nothing_is_built(
    shop: Workshop, name: str
) -> None:
    with pytest.raises(PullDeniedError) as refused:
        await pull(shop, asking(f"innocent/{name}"))
    assert refused.value.denied == (name,)
    assert refused.value.user == "bob"
    assert shop.nix.realised == []


@pytest.mark.parametrize("name", SPELLINGS)
async def test_what_another_client_has_built_is_denied_as_well(shop: Workshop, name: str) -> None:
    pulled = await pull(shop, asking(name), EVERYTHING)
    manifest = pulled.manifests[ManifestFormat.OCI].digest
    image = await shop.index.use_image(pulled.recipes[0].key)
    assert image is not None
    for _ in range(2):
        with pytest.raises(PullDeniedError):
            await pull(shop, asking(name))
        with pytest.raises(PullDeniedError):
            await shop.images.tags(asking(name), permission=DENYING)
        for digest in (manifest, *(each.digest for each in image.descriptors)):
            assert await shop.images.needs(asking(name), digest)
            assert not await shop.images.needs(asking(name), digest, DENYING)


@pytest.mark.parametrize("name", ["needs-victim", "innocent", "innocence.out", "python311packages.six"])
async def test_what_is_not_denied_is_pulled_also_if_it_needs_what_is(shop: Workshop, name: str) -> None:
    pulled = await pull(shop, asking(name))
    image = await shop.index.use_image(pulled.recipes[0].key)
    assert image is not None
    for each in image.descriptors:
        assert await shop.images.needs(asking(name), each.digest, DENYING)
    assert await shop.images.tags(asking(name), permission=DENYING) == sorted({LATEST, pulled.pin.tag})


@pytest.mark.parametrize(
    ("deny", "name", "allowed"),
    [
        ("python3Packages.*", "python311packages.six", False),
        ("python3Packages.n*", "python311packages.six", True),
        ("python3Packages.*", "innocent", True),
        ("vic*", "pkgs.victim", False),
        ("pkgs", "pkgs.hidden", False),
        ("innocen?", "innocence", False),
        ("missing", "innocent", True),
        ("throws", "innocent", True),
    ],
)
async def test_a_pattern_is_compared_with_every_name(
    shop: Workshop, deny: str, name: str, *, allowed: bool
) -> None:
    permission = Permission("bob", Rule(deny=(deny,)))
    if allowed:
        assert (await pull(shop, asking(name), permission)).manifests
    else:
        with pytest.raises(PullDeniedError):
            await pull(shop, asking(name), permission)


async def test_what_a_profile_adds_is_denied_and_what_every_image_has_is_not(shop: Workshop) -> None:
    scan = Profile(packages=("pkgs.victim",))
    with pytest.raises(PullDeniedError) as refused:
        await pull(shop, asking("scan/innocent", scan=scan))
    assert refused.value.denied == ("what scan adds",)
    assert shop.nix.realised == []
    everything = Permission("bob", Rule(deny=("cacert", "iana*")))
    assert (await pull(shop, asking("innocent"), everything)).manifests
    with pytest.raises(PullDeniedError):
        await pull(shop, asking("cacert.out"), everything)


async def test_of_a_known_image_the_names_are_known_and_nothing_is_evaluated(
    tmp_path: Path, source: Branches
) -> None:
    for _ in range(2):
        async with opened(tmp_path, source=source) as shop:
            await pull(shop, asking("innocent"))
            with pytest.raises(PullDeniedError):
                await pull(shop, asking("other-name"))
            evaluated = list(shop.nix.evaluated)
            await pull(shop, asking("innocent"))
            assert shop.nix.evaluated == evaluated
    # After a restart there was nothing to evaluate, not even the first time.
    assert evaluated == []


async def test_what_an_older_version_remembered_without_names_is_no_way_in(
    shop: Workshop, source: Branches
) -> None:
    pulled = await pull(shop, asking("other-name"), EVERYTHING)
    manifest = pulled.manifests[ManifestFormat.OCI].digest
    innocent = (await pull(shop, asking("innocent"), EVERYTHING)).manifests[ManifestFormat.OCI].digest
    source.gone = True
    forget_names(shop)
    # The package set can't be evaluated again, so that nobody knows.
    assert not await shop.images.needs(asking("other-name"), manifest, DENYING)
    assert not await shop.images.needs(asking("innocent"), innocent, DENYING)
    source.gone = False
    assert not await shop.images.needs(asking("other-name"), manifest, DENYING)
    assert await shop.images.needs(asking("innocent"), innocent, DENYING)
    forget_names(shop)
    with pytest.raises(PullDeniedError):
        await pull(shop, asking("other-name"))


def forget_names(shop: Workshop) -> None:
    """Leave of what is remembered what a version did that knew no names."""
    with closing(sqlite3.connect(file_of(shop.folder))) as database, database:
        query = "SELECT pin, attribute_path, record FROM resolutions"
        for pin, path, record in database.execute(query).fetchall():
            known = msgspec.json.decode(record)
            kept = {name: value for name, value in known.items() if name not in ("otherNames", "path")}
            update = "UPDATE resolutions SET record = ? WHERE pin = ? AND attribute_path = ?"
            database.execute(update, (msgspec.json.encode(kept), pin, path))


# What is built for several clients at once, and fails


WAITING = Permission("bob", Rule(deny=("waiting-a", "broken", "refused")))


@pytest.fixture
async def gated(tmp_path: Path) -> AsyncIterator[Workshop]:
    async with opened(tmp_path) as shop:
        yield shop


async def test_a_build_is_for_the_client_that_may_have_it_and_not_for_one_that_joins_it(
    gated: Workshop,
) -> None:
    name = asking("waiting-a.out")
    alice = asyncio.create_task(pull(gated, name, ALICE))
    await gated.gates.reached("waiting-a")
    with pytest.raises(PullDeniedError):
        await gated.images.pull(name, "bob", Deadline.after(0.1), permission=WAITING)
    bob = asyncio.create_task(pull(gated, name, WAITING))
    await asyncio.sleep(0)
    gated.gates.open("waiting-a")
    assert (await alice).manifests
    with pytest.raises(PullDeniedError):
        await bob


async def test_what_one_client_is_refused_the_next_one_gets(gated: Workshop) -> None:
    gated.gates.open("waiting-a")
    name = asking("waiting-a.out")
    results = await asyncio.gather(
        *(pull(gated, name, each) for each in (WAITING, ALICE, WAITING, EVERYTHING)), return_exceptions=True
    )
    kinds = [type(each) for each in results]
    assert kinds == [PullDeniedError, Pulled, PullDeniedError, Pulled]


async def test_why_a_build_failed_is_told_to_who_may_have_it(gated: Workshop) -> None:
    name = asking("broken.out")
    with pytest.raises(BuildError):
        await pull(gated, name, ALICE)
    # That is remembered for a moment.
    with pytest.raises(PullDeniedError):
        await pull(gated, name, WAITING)


async def test_why_something_denied_can_not_be_evaluated_is_not_told(shop: Workshop) -> None:
    permission = Permission("bob", Rule(deny=("throws",)))
    for ask in (
        pull(shop, asking("sets.throws"), permission),
        shop.images.tags(asking("sets.throws"), permission=permission),
    ):
        with pytest.raises(PullDeniedError) as refused:
            await ask
        assert "licence" not in str(refused.value)
    with pytest.raises(EvaluationError, match="licence"):
        await pull(shop, asking("sets.throws"), ALICE)


async def test_what_may_not_be_pulled_is_not_suggested(shop: Workshop) -> None:
    request = asking("victm/innocents")
    with pytest.raises(PackagesNotFoundError) as everything:
        await pull(shop, request, ALICE)
    assert everything.value.suggestions["victm"] == ["victim"]
    for ask in (pull(shop, request), shop.images.tags(request, permission=DENYING)):
        with pytest.raises(PackagesNotFoundError) as less:
            await ask
        assert less.value.suggestions == {**everything.value.suggestions, "victm": []}
        assert "victim" not in str(less.value)


# Tags that choose another source

MAIN = Permission("bob", Rule(sources=("git!ours!main",)), ("git!ours!main", "ours"))
BY_NAME = Permission("bob", Rule(sources=("ours",)), ("git!ours!main", "ours"))


async def test_a_tag_that_chooses_another_source_is_refused_before_it_is_looked_up(
    shop: Workshop, source: Branches
) -> None:
    with pytest.raises(PullDeniedError) as refused:
        await pull(shop, asking("innocent", "draft"), MAIN)
    assert refused.value.denied == ("the tag draft",)
    assert source.asked == []
    with pytest.raises(PullDeniedError):
        await pull(shop, asking("innocent", "d" * 16), MAIN)
    assert shop.nix.realised == []
    assert (await pull(shop, asking("innocent", "draft"), BY_NAME)).manifests


async def test_the_tag_of_a_revision_is_as_good_as_one_that_led_to_it(
    shop: Workshop, source: Branches
) -> None:
    before = await pull(shop, asking("innocent"), MAIN)
    assert (await pull(shop, asking("innocent", before.pin.tag), MAIN)).manifests == before.manifests
    first, source.now = source.now, replace(source.now, revision="e" * 64)
    source.revisions[first.revision[:16]] = first.revision
    again = await pull(shop, asking("innocent", before.pin.tag), MAIN)
    assert again.pin == before.pin
    # Whoever else pulls it: for another name nothing has led to it.
    with pytest.raises(PullDeniedError):
        await pull(shop, asking("hidden", before.pin.tag), MAIN)


async def test_tags_and_digests_are_those_that_may_be_pulled(shop: Workshop, source: Branches) -> None:
    main = await pull(shop, asking("innocent"), ALICE)
    draft = await pull(shop, asking("innocent", "draft"), ALICE)
    assert await shop.images.tags(asking("innocent"), permission=MAIN) == sorted({LATEST, main.pin.tag})
    everything = sorted({LATEST, main.pin.tag, "draft", draft.pin.tag})
    assert await shop.images.tags(asking("innocent"), permission=BY_NAME) == everything
    # Both are the same image, but for what they say of themselves.
    for pulled, allowed in ((main, True), (draft, False)):
        digest = pulled.manifests[ManifestFormat.OCI].digest
        assert await shop.images.needs(asking("innocent"), digest, MAIN) is allowed
        assert await shop.images.needs(asking("innocent"), digest, BY_NAME)


async def test_what_was_made_for_another_tag_belongs_to_the_one_that_is_pulled_as_well(
    shop: Workshop, source: Branches
) -> None:
    made = await pull(shop, asking("innocent", "release"), ALICE)
    digest = made.manifests[ManifestFormat.OCI].digest
    assert not await shop.images.needs(asking("innocent"), digest, MAIN)
    assert (await pull(shop, asking("innocent"), MAIN)).manifests == made.manifests
    assert await shop.images.needs(asking("innocent"), digest, MAIN)


@pytest.mark.slow
async def test_where_a_denied_package_takes_all_the_time_nothing_is_let_through(tmp_path: Path) -> None:
    numbers = "let n = builtins.genList (n: n) 65536; e = f: s: builtins.foldl' (a: _: f a) s n; in "
    endless = (
        f'endless = {numbers} e (e (e (e (x: x + 1)))) 0; cacert = build "a" ""; iana-etc = build "b" "";'
    )
    source = Branches(packages(tmp_path / "set", f'innocent = build "i" "echo > $out"; {endless}'))
    limits = NixLimits(evaluation_timeout=3)
    async with opened(tmp_path, source=source, limits=limits) as shop:
        with pytest.raises(PullDeniedError) as refused:
            await pull(shop, asking("innocent"), Permission("bob", Rule(deny=("endless",))))
        assert refused.value.denied == ("innocent",)
        assert "endless" not in str(refused.value)
        assert shop.nix.realised == []
