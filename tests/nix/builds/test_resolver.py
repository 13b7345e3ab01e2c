from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from chandlery.builds.resolver import PackageResolver
from chandlery.builds.sqlite.index import SqliteIndex
from chandlery.errors import BrokenError, EvaluationError, NixError, PackagesNotFoundError, UnfreeError
from chandlery.nix.nix import Nix, NixLimits, NixOptions, Resolution
from chandlery.nix.pinned_source import PinnedSource
from chandlery.nix.stores import NixStores
from tests.support.nix_package_set import SYSTEM, nixpkgs_shape, packages, requires_nix

pytestmark = requires_nix

SET = """
  git = build "git-2" "echo > $out" // { meta.mainProgram = "git"; };
  gitea = git; gitea1 = git; gitea2 = git; gitea3 = git; github-cli = git;
  jq = build "jq-1" "echo > $out";
  openssl = derivation {
    name = "openssl"; outputs = [ "out" "dev" ]; system = builtins.currentSystem; builder = "b";
  };
  throws = throw "no licence";
  loops = loops;
  number = 3;
  python3Packages = { numpy = git; numba = git; scipy = git; };
"""


class CountingNix(Nix):
    """Keeps what it was asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, NixLimits(), NixOptions(substituters=()))
        self.resolved: list[list[str]] = []
        self.listed: list[list[str]] = []

    async def resolve(
        self, source: PinnedSource, system: str, attribute_paths: Sequence[str]
    ) -> dict[str, Resolution]:
        self.resolved.append(list(attribute_paths))
        return await super().resolve(source, system, attribute_paths)

    async def attribute_names(self, source: PinnedSource, system: str, parent: Sequence[str]) -> list[str]:
        self.listed.append(list(parent))
        return await super().attribute_names(source, system, parent)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def nix(store: Path) -> CountingNix:
    return CountingNix(store)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[SqliteIndex]:
    with SqliteIndex(tmp_path / "index") as index:
        yield index


@pytest.fixture
def resolver(nix: CountingNix, index: SqliteIndex) -> PackageResolver:
    return PackageResolver(NixStores.of_one(nix), index)


@pytest.fixture
def pin(tmp_path: Path) -> PinnedSource:
    return packages(tmp_path / "set", SET)


async def test_a_mix_of_known_packages_asks_nix_nothing(
    resolver: PackageResolver, nix: CountingNix, pin: PinnedSource
) -> None:
    first = await resolver.resolve(pin, SYSTEM, ["git", "openssl.dev"])
    other = await resolver.resolve(pin, SYSTEM, ["jq"])

    assert await resolver.resolve(pin, SYSTEM, ["jq", "openssl.dev", "git"]) == {**first, **other}
    assert nix.resolved == [["git", "openssl.dev"], ["jq"]]
    assert (first["git"].main_program, first["openssl.dev"].output) == ("git", "dev")


async def test_only_what_is_not_known_is_asked_for(
    resolver: PackageResolver, nix: CountingNix, pin: PinnedSource
) -> None:
    await resolver.resolve(pin, SYSTEM, ["git"])

    assert set(await resolver.resolve(pin, SYSTEM, ["git", "jq"])) == {"git", "jq"}
    assert nix.resolved == [["git"], ["jq"]]


async def test_what_was_resolved_is_known_after_a_restart(
    resolver: PackageResolver, nix: CountingNix, pin: PinnedSource, tmp_path: Path
) -> None:
    first = await resolver.resolve(pin, SYSTEM, ["git"])
    with SqliteIndex(tmp_path / "index") as index:
        assert await PackageResolver(NixStores.of_one(nix), index).resolve(pin, SYSTEM, ["git"]) == first

    assert nix.resolved == [["git"]]


async def test_another_revision_or_system_or_place_is_asked_anew(
    resolver: PackageResolver, nix: CountingNix, pin: PinnedSource, tmp_path: Path
) -> None:
    elsewhere = packages(tmp_path / "elsewhere", SET)
    for each, system in [
        (pin, SYSTEM),
        (replace(pin, revision="other"), SYSTEM),
        (replace(pin, variant="other config"), SYSTEM),
        (pin, "other-linux"),
        (elsewhere, SYSTEM),
    ]:
        await resolver.resolve(each, system, ["git"])

    assert nix.resolved == [["git"]] * 5


async def test_nix_can_be_asked_although_the_answer_is_known(
    resolver: PackageResolver, nix: CountingNix, pin: PinnedSource
) -> None:
    first = await resolver.resolve(pin, SYSTEM, ["git"])

    assert await resolver.resolve(pin, SYSTEM, ["git"], remembered=False) == first
    assert nix.resolved == [["git"]] * 2


async def test_all_that_is_missing_is_told_with_the_nearest_names(
    resolver: PackageResolver, pin: PinnedSource
) -> None:
    with pytest.raises(PackagesNotFoundError) as caught:
        await resolver.resolve(pin, SYSTEM, ["gti", "jq", "zzzzzz", "throws"])

    assert caught.value.missing == ("gti", "zzzzzz")
    assert caught.value.suggestions["gti"][0] == "git"
    assert caught.value.suggestions["zzzzzz"] == []
    assert str(caught.value).startswith("not in the package set: gti (did you mean git")
    assert str(caught.value).endswith("?), zzzzzz")


async def test_the_nearest_names_come_first_and_are_few(resolver: PackageResolver, pin: PinnedSource) -> None:
    with pytest.raises(PackagesNotFoundError) as caught:
        await resolver.resolve(pin, SYSTEM, ["gitea0"])

    assert caught.value.suggestions["gitea0"][0] == "gitea"
    assert len(caught.value.suggestions["gitea0"]) == 3


async def test_below_a_package_its_outputs_are_suggested_and_nothing_of_nix_own(
    resolver: PackageResolver, pin: PinnedSource
) -> None:
    with pytest.raises(PackagesNotFoundError) as caught:
        await resolver.resolve(pin, SYSTEM, ["git.outt", "git.drvpat"])

    assert caught.value.suggestions == {"git.outt": ["git.out"], "git.drvpat": []}


async def test_names_of_a_nested_set_are_suggested_with_their_whole_path(
    resolver: PackageResolver, pin: PinnedSource
) -> None:
    with pytest.raises(PackagesNotFoundError) as caught:
        await resolver.resolve(pin, SYSTEM, ["python3Packages.nunpy", "missing.nunpy", "number.nunpy"])

    assert caught.value.suggestions["python3Packages.nunpy"][0] == "python3Packages.numpy"
    assert caught.value.suggestions["missing.nunpy"] == []
    assert caught.value.suggestions["number.nunpy"] == []


async def test_the_names_of_a_pin_are_listed_once(
    resolver: PackageResolver, nix: CountingNix, pin: PinnedSource
) -> None:
    for missing in ("gti", "jqq"):
        with pytest.raises(PackagesNotFoundError):
            await resolver.resolve(pin, SYSTEM, [missing])
    assert nix.listed == [[]]

    for each in (replace(pin, revision="next"), pin):
        with pytest.raises(PackagesNotFoundError):
            await resolver.resolve(each, SYSTEM, ["gti"])
    assert nix.listed == [[]] * 3


async def test_all_that_can_not_be_evaluated_is_told_with_its_reasons(
    resolver: PackageResolver, pin: PinnedSource
) -> None:
    with pytest.raises(EvaluationError) as caught:
        await resolver.resolve(pin, SYSTEM, ["git", "loops", "number", "throws"])

    assert type(caught.value) is EvaluationError
    assert caught.value.reasons == {
        "loops": {"reason": "infinite_recursion", "message": "infinite recursion encountered"},
        "number": {"reason": "not_a_package", "message": "it is a int"},
        "throws": {"reason": "failed", "message": "no licence"},
    }


@pytest.mark.parametrize(
    ("packages", "kind"),
    [
        (["unrar", "needs-unfree"], UnfreeError),
        (["broken"], BrokenError),
        (["unrar", "broken"], EvaluationError),
    ],
)
async def test_what_is_refused_for_one_reason_is_an_error_of_its_own(
    resolver: PackageResolver, packages: list[str], kind: type[EvaluationError]
) -> None:
    with pytest.raises(kind) as caught:
        await resolver.resolve(nixpkgs_shape(), SYSTEM, ["hello", *packages])

    assert type(caught.value) is kind
    assert set(caught.value.reasons) == set(packages)


class ForgetfulNix(CountingNix):
    """Can't list any names."""

    async def attribute_names(self, source: PinnedSource, system: str, parent: Sequence[str]) -> list[str]:
        raise NixError("nix-instantiate: interrupted")


async def test_without_suggestions_what_is_missing_is_told_all_the_same(
    store: Path, index: SqliteIndex, pin: PinnedSource
) -> None:
    resolver = PackageResolver(NixStores.of_one(ForgetfulNix(store)), index)
    with pytest.raises(PackagesNotFoundError) as caught:
        await resolver.resolve(pin, SYSTEM, ["gti", "jq", "hop.hop"])

    assert str(caught.value) == "not in the package set: gti, hop.hop"


async def test_what_was_missing_or_failed_is_asked_for_again(
    resolver: PackageResolver, nix: CountingNix, tmp_path: Path
) -> None:
    pin = packages(tmp_path / "set", "failing = throw 1;")
    for path, error in [("late", PackagesNotFoundError), ("failing", EvaluationError)]:
        with pytest.raises(error):
            await resolver.resolve(pin, SYSTEM, [path])

    packages(tmp_path / "set", 'late = build "late" "echo > $out"; failing = late;')

    assert set(await resolver.resolve(pin, SYSTEM, ["late", "failing"])) == {"late", "failing"}
    assert nix.resolved == [["late"], ["failing"], ["late", "failing"]]
