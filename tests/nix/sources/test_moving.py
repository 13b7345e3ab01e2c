"""Images of sources that move, and whose upstream dies, with real Nix."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from chandlery.errors import ReferenceNotFoundError
from chandlery.image.name import LATEST
from chandlery.oci.documents import BuiltImage
from chandlery.sources.debian.index import DebianMirrors
from chandlery.sources.kinds import parse
from tests.support.git_server import HttpServer, Repository, http_server
from tests.support.package_sets import PACKAGE_SET
from tests.support.workshop import Workshop, a_request, opened

PACKAGES = (PACKAGE_SET / "default.nix").read_text()


def version(number: int) -> str:
    return PACKAGES.replace('name = "${name}-1.0"', f'name = "${{name}}-{number}.0"')


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    (tmp_path / "served").mkdir()
    repository = Repository(tmp_path / "served" / "set.git")
    repository.commit({"default.nix": version(1)})
    return repository


@pytest.fixture
def server(tmp_path: Path, repository: Repository) -> Iterator[HttpServer]:
    with http_server(tmp_path / "served") as server:
        yield server


@pytest_asyncio.fixture
async def workshop(tmp_path: Path, server: HttpServer) -> AsyncIterator[Workshop]:
    source = parse(f"git!{server.url('set.git')}!main", tmp_path, DebianMirrors("", "", ""))
    async with opened(tmp_path, source=source) as workshop:
        yield workshop
        await source.close()


async def image(workshop: Workshop, tag: str = LATEST) -> BuiltImage:
    return await workshop.images.image(replace(a_request("hello"), reference=tag))


async def test_what_was_pulled_is_not_current_when_its_source_has_moved(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "default.nix").write_text(version(1))
    source = parse(f"path!{folder}", tmp_path, DebianMirrors("", "", ""))
    async with opened(tmp_path, source=source) as workshop:
        pulled = await workshop.images.pull(a_request("hello"))
        assert await workshop.images.is_current(pulled, whole=False)
        (folder / "default.nix").write_text(version(2))
        assert not await workshop.images.is_current(pulled, whole=False)
        (folder / "default.nix").write_text(version(1))
        assert await workshop.images.is_current(pulled, whole=False)
        # It goes on to serve the last good pin, and says so.
        (folder / "default.nix").unlink()
        folder.rmdir()
        assert not await workshop.images.is_current(pulled, whole=False)
        await source.close()


async def test_an_image_is_of_the_commit_that_its_tag_means(
    workshop: Workshop, repository: Repository
) -> None:
    first = await image(workshop)
    commit = repository.commit({"default.nix": version(2)}, branch="feature/two")
    repository.tag("v2", commit)

    second = await image(workshop, "feature-two")

    assert "hello-1.0" in workshop.names(first)
    assert "hello-2.0" in workshop.names(second)
    for same in ("v2", commit, commit[:16]):
        assert await image(workshop, same) == second
    assert await image(workshop) == first
    with pytest.raises(ReferenceNotFoundError):
        await image(workshop, "v3")


async def test_while_its_upstream_is_dead_images_are_made_of_the_last_good_pin(
    workshop: Workshop, server: HttpServer
) -> None:
    await image(workshop)
    server.stop()
    await workshop.images._sources.of("").refresh(0)

    made = await workshop.image("jq")

    assert "jq-1.0" in workshop.names(made)
