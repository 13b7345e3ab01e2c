import asyncio
from pathlib import Path

import pytest

from chandlery.builds.locks import BuildClaims
from chandlery.builds.recipe import BuildOptions, ImageOrigin
from chandlery.builds.unfinished import UnfinishedBuilds
from chandlery.image import name as image_name
from chandlery.image.name import Vocabulary
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.documents import Platform


def an_origin(*packages: str) -> ImageOrigin:
    request = image_name.of_parts(packages, "latest", Vocabulary(Platform("linux", "amd64")))
    return ImageOrigin(PinnedSource("path", "/srv/packages", "0" * 64), request, BuildOptions())


def unfinished(folder: Path) -> UnfinishedBuilds:
    return UnfinishedBuilds(folder, BuildClaims(folder, 1))


def stop_during(folder: Path, origin: ImageOrigin) -> None:
    with pytest.raises(asyncio.CancelledError), unfinished(folder).begun(origin):
        raise asyncio.CancelledError


def test_a_build_that_ended_is_not_taken_over_whether_well_or_not(tmp_path: Path) -> None:
    with unfinished(tmp_path).begun(an_origin("git")):
        pass
    with pytest.raises(RuntimeError), unfinished(tmp_path).begun(an_origin("jq")):
        raise RuntimeError
    assert unfinished(tmp_path).take_over() == []


def test_builds_that_a_server_stopped_in_are_taken_over_once_by_the_next(tmp_path: Path) -> None:
    for name in ("git", "jq"):
        stop_during(tmp_path, an_origin(name))
    taken = unfinished(tmp_path).take_over()
    assert sorted(origin.request.name for origin in taken) == ["git", "jq"]
    assert taken[0] in (an_origin("git"), an_origin("jq"))
    assert unfinished(tmp_path).take_over() == []


def test_a_build_that_brought_two_servers_down_is_not_begun_by_a_third(tmp_path: Path) -> None:
    origin = an_origin("git")
    stop_during(tmp_path, origin)
    second = unfinished(tmp_path)
    assert second.take_over() == [origin]
    with pytest.raises(asyncio.CancelledError), second.begun(origin):
        raise asyncio.CancelledError
    assert unfinished(tmp_path).take_over() == []


def test_a_build_that_was_given_up_is_not_taken_over(tmp_path: Path) -> None:
    origin = an_origin("git")
    stop_during(tmp_path, origin)
    unfinished(tmp_path).forget(origin)
    assert unfinished(tmp_path).take_over() == []


def test_a_build_that_another_process_is_at_is_left_to_it(tmp_path: Path) -> None:
    origin = an_origin("git")
    claim = BuildClaims(tmp_path, 1).claim(origin.key)
    assert claim
    with claim, unfinished(tmp_path).begun(origin):
        assert unfinished(tmp_path).take_over() == []
    assert not list(tmp_path.iterdir())


def test_a_record_that_is_broken_is_no_obstacle(tmp_path: Path) -> None:
    stop_during(tmp_path, an_origin("git"))
    (tmp_path / "broken.unfinished").write_bytes(b'{"origin": {"pi')
    assert unfinished(tmp_path).take_over() == [an_origin("git")]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_keeps_no_build_from_running(tmp_path: Path) -> None:
    ran = False
    with unfinished(tmp_path / "missing").begun(an_origin("git")):
        ran = True
    assert ran
