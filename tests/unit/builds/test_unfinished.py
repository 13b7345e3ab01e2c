import asyncio
from pathlib import Path

import pytest

from chandlery.builds.locks import FileBuildLocks
from chandlery.builds.recipe import BuildOptions, Recipe
from chandlery.builds.unfinished import UnfinishedBuilds
from chandlery.image import name as image_name
from chandlery.image.name import NamePrefixes
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.documents import Platform


def a_recipe(*packages: str) -> Recipe:
    request = image_name.of_parts(packages, "latest", NamePrefixes(Platform("linux", "amd64")))
    return Recipe(PinnedSource("path", "/srv/packages", "0" * 64), request, BuildOptions())


def unfinished(folder: Path) -> UnfinishedBuilds:
    return UnfinishedBuilds(folder, FileBuildLocks(folder, 1))


def stop_during(folder: Path, recipe: Recipe) -> None:
    with pytest.raises(asyncio.CancelledError), unfinished(folder).begun(recipe):
        raise asyncio.CancelledError


async def test_a_build_that_ended_is_not_taken_over_whether_well_or_not(tmp_path: Path) -> None:
    with unfinished(tmp_path).begun(a_recipe("git")):
        pass
    with pytest.raises(RuntimeError), unfinished(tmp_path).begun(a_recipe("jq")):
        raise RuntimeError
    assert await unfinished(tmp_path).take_over() == []


async def test_builds_that_a_server_stopped_in_are_taken_over_once_by_the_next(tmp_path: Path) -> None:
    for name in ("git", "jq"):
        stop_during(tmp_path, a_recipe(name))
    taken = await unfinished(tmp_path).take_over()
    assert sorted(recipe.request.name for recipe in taken) == ["git", "jq"]
    assert taken[0] in (a_recipe("git"), a_recipe("jq"))
    assert await unfinished(tmp_path).take_over() == []


async def test_a_build_that_brought_two_servers_down_is_not_begun_by_a_third(tmp_path: Path) -> None:
    recipe = a_recipe("git")
    stop_during(tmp_path, recipe)
    second = unfinished(tmp_path)
    assert await second.take_over() == [recipe]
    with pytest.raises(asyncio.CancelledError), second.begun(recipe):
        raise asyncio.CancelledError
    assert await unfinished(tmp_path).take_over() == []


async def test_a_build_that_was_given_up_is_not_taken_over(tmp_path: Path) -> None:
    recipe = a_recipe("git")
    stop_during(tmp_path, recipe)
    unfinished(tmp_path).forget(recipe)
    assert await unfinished(tmp_path).take_over() == []


async def test_a_build_that_another_process_is_at_is_left_to_it(tmp_path: Path) -> None:
    recipe = a_recipe("git")
    lock = await FileBuildLocks(tmp_path, 1).acquire(recipe.key)
    assert lock
    with unfinished(tmp_path).begun(recipe):
        assert await unfinished(tmp_path).take_over() == []
    await lock.release()
    assert not list(tmp_path.iterdir())


async def test_a_record_that_is_broken_is_no_obstacle(tmp_path: Path) -> None:
    stop_during(tmp_path, a_recipe("git"))
    (tmp_path / "broken.unfinished").write_bytes(b'{"origin": {"pi')
    assert await unfinished(tmp_path).take_over() == [a_recipe("git")]
    assert not list(tmp_path.iterdir())


async def test_a_folder_that_cannot_be_written_keeps_no_build_from_running(tmp_path: Path) -> None:
    ran = False
    with unfinished(tmp_path / "missing").begun(a_recipe("git")):
        ran = True
    assert ran
