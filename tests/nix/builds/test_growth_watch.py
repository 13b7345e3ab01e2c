from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from chandlery.builds.images import BuildCapacity
from chandlery.builds.limits import BuildLimits
from chandlery.errors import BuildTooLargeError
from chandlery.nix.nix import NixLimits
from chandlery.sources.debian.index import DebianMirrors
from chandlery.sources.kinds import parse
from tests.support.nix_package_set import packages, requires_nix
from tests.support.workshop import Workshop, opened

pytestmark = requires_nix

MB = 1_000_000
# It would go on for ever.
ENDLESS = "until [ -e /nowhere ]; do sleep 0.05; done"
# Only in case that nothing stops it.
LIMITS = NixLimits(build_timeout=60.0)


def capacity(closure: int, build: int = 0) -> BuildCapacity:
    return BuildCapacity(build=BuildLimits(closure_size=closure, build_size=build, free_disk=0))


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("head -c 40000000 /dev/zero > $out", id="one file"),
        pytest.param(
            "mkdir $out; for n in {1..80}; do head -c 500000 /dev/zero > $out/$n; done", id="many files"
        ),
        pytest.param("mkdir $out; head -c 40000000 /dev/zero > scratch", id="beside its output"),
        pytest.param(
            "mkdir $out; head -c 40000000 /dev/zero > $out/a; ln $out/a $out/b; rm $out/a", id="linked"
        ),
    ],
)
async def test_a_builder_that_writes_more_than_a_build_may_is_stopped_while_it_writes(
    tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    (temporary / "nix-build-big.drv-0").mkdir(parents=True)
    (temporary / "nix-build-big.drv-0/left").write_bytes(bytes(20 * MB))
    monkeypatch.setenv("TMPDIR", str(temporary))
    packages(
        tmp_path / "set",
        f"""
        cacert = build "cacert" "mkdir $out"; iana-etc = build "iana-etc" "mkdir $out";
        big = build "big" ''{script}; {ENDLESS}'' // {{ pname = "big"; }};
        """,
    )
    async with opened_with(tmp_path, capacity(10 * MB)) as workshop:
        with pytest.raises(
            BuildTooLargeError, match=r"had written \d+\.\d MB.*30\.0 MB.*max_build"
        ) as stopped:
            await workshop.image("big")
        # Nothing is counted twice, whoever else has builders of the name.
        assert 30 * MB < stopped.value.size < 41 * MB
        assert not workshop.left_over()
        # A Nix that doesn't end when it is asked to leaves sandboxes.
        await workshop.nix.remove_left_sandboxes()
        assert not list(workshop.nix.store_root.glob("*.chroot"))
        assert [each.name for each in temporary.iterdir()] == ["nix-build-big.drv-0"]


async def test_what_is_built_on_the_way_to_an_image_counts_for_its_build_alone(tmp_path: Path) -> None:
    packages(
        tmp_path / "set",
        f"""
        cacert = build "cacert" "mkdir $out"; iana-etc = build "iana-etc" "mkdir $out";
        part = number: build "part-${{toString number}}" "head -c 9000000 /dev/zero > $out";
        large = build "large" ''
          for each in ${{part 1}} ${{part 2}} ${{part 3}}; do test -e $each; done; {ENDLESS}
        '';
        small = build "small" "test -e ${{part 1}}; sleep 3; mkdir $out";
        """,
    )
    async with opened_with(tmp_path, capacity(5 * MB, 20 * MB)) as workshop:
        with pytest.raises(BuildTooLargeError) as refused:
            await workshop.image("large")
        assert (refused.value.setting, refused.value.limit) == ("max_build_size", 20 * MB)
        assert refused.value.size >= 27 * MB
        # It needs what the other has left, which isn't in the image.
        assert "small" in workshop.names(await workshop.image("small"))


def opened_with(folder: Path, limits: BuildCapacity) -> AbstractAsyncContextManager[Workshop]:
    source = parse(f"path!{folder / 'set'}", folder / "data", DebianMirrors("", "", ""))
    (folder / "data").mkdir()
    return opened(folder / "data", capacity=limits, limits=LIMITS, source=source)
