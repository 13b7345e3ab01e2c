import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from chandlery.builds.build_queue import QueueLimits
from chandlery.builds.images import BuildCapacity
from chandlery.builds.recipe import BuildOptions
from chandlery.errors import (
    BuildError,
    BuildStoppedError,
    BuildTimeoutError,
    EvaluationError,
    EvaluationPendingError,
    NixMissingError,
    PackagesNotFoundError,
    RateLimitError,
    StorageFullError,
)
from chandlery.layers.root_layer import RootLayerOptions
from chandlery.machine.deadline import Deadline
from chandlery.nix.nix import NixLimits, Resolution
from chandlery.oci.digest import Digest
from chandlery.oci.documents import CREATED, ManifestFormat, PackedLayer
from tests.support import layers
from tests.support.small_disk import enlarge, needs_root, small_disk
from tests.support.workshop import HOST, Workshop, a_request, opened

# One event loop for all of them: the processes that pack belong to it, and take half a second to start.
pytestmark = pytest.mark.asyncio(loop_scope="module")

ALWAYS = {"cacert-1.0", "iana-etc-1.0"}


@pytest.fixture(scope="module")
def used_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data folder that one test after another uses, so that little has to be built."""
    return tmp_path_factory.mktemp("used")


@pytest_asyncio.fixture(loop_scope="module")
async def used(used_folder: Path) -> AsyncIterator[Workshop]:
    async with opened(used_folder) as workshop:
        yield workshop


@pytest_asyncio.fixture(loop_scope="module")
async def fresh(tmp_path: Path) -> AsyncIterator[Workshop]:
    async with opened(tmp_path) as workshop:
        yield workshop


# What is in an image


async def test_the_layers_hold_the_closure_and_nothing_twice(used: Workshop) -> None:
    image = await used.image("greeter")
    assert sorted(used.names(image)) == sorted(ALWAYS | {"greeter-1.0", "hello-1.0"})
    assert image.store_paths == 4


async def test_files_in_layers_are_those_of_the_store(used: Workshop) -> None:
    image = await used.image("greeter")
    for each in image.layers[:-1]:
        archive = layers.layer(used.blob(each))
        for member in archive.getmembers():
            physical = used.nix.store_root.parent.parent / member.name
            assert not member.isfile() or layers.text(archive, member.name) == physical.read_text()
            assert member.isdir() == physical.is_dir()


async def test_of_several_outputs_the_one_that_was_asked_for_is_in_the_image(used: Workshop) -> None:
    assert set(used.names(await used.image("application"))) == ALWAYS | {"application-1.0", "library-1.0"}
    assert set(used.names(await used.image("library.dev"))) == ALWAYS | {"library-1.0-dev", "library-1.0"}


async def test_attribute_paths_are_found_without_regard_to_capitals(used: Workshop) -> None:
    names = used.names(await used.image("capital", "tools.wrench"))
    assert set(names) == ALWAYS | {"capital-1.0", "wrench-1.0"}


async def test_the_last_layer_links_the_programs_from_the_root(used: Workshop) -> None:
    image = await used.image("hello")
    archive = layers.layer(used.blob(image.layers[-1]))
    [store_path] = [name for name in used.base_names(image) if name.endswith("-hello-1.0")]
    assert archive.getmember("bin/hello").linkname == f"/nix/store/{store_path}/bin/hello"


async def test_every_blob_has_its_digest_and_its_size(used: Workshop) -> None:
    image = await used.image("greeter")
    for descriptor in (*image.manifests.values(), image.config, *(each.descriptor for each in image.layers)):
        content = used.blobs.path(descriptor.digest).read_bytes()
        assert (Digest.of(content), len(content)) == (descriptor.digest, descriptor.size)


async def test_the_config_describes_the_layers(used: Workshop) -> None:
    image = await used.image("greeter")
    config = used.config(image)
    assert (config["os"], config["architecture"]) == ("linux", HOST.architecture)
    assert config["rootfs"]["diff_ids"] == [
        f"sha256:{hashlib.sha256(layers.uncompressed(used.blob(each))).hexdigest()}" for each in image.layers
    ]
    # image-spec, config.md: one entry per layer, unless it says that its layer is empty.
    assert len(config["history"]) == len(image.layers)
    said = " ".join(entry["created_by"] for entry in config["history"])
    assert all(name in said for name in used.names(image))


async def test_nothing_in_the_config_is_from_a_clock(used: Workshop) -> None:
    config = used.config(await used.image("hello"))
    assert {config["created"], *(entry["created"] for entry in config["history"])} == {CREATED}


async def test_programs_find_programs_and_certificates(used: Workshop) -> None:
    config = used.config(await used.image("hello"))["config"]
    environment = dict(variable.split("=", 1) for variable in config["Env"])
    assert {"/bin", "/usr/bin"} <= set(environment["PATH"].split(":"))
    assert environment["SSL_CERT_FILE"] == "/etc/ssl/certs/ca-bundle.crt"


async def test_only_a_shell_which_brings_the_locale_sets_it(used: Workshop) -> None:
    environments = [
        used.config(await used.image(*parts))["config"]["Env"] for parts in (("shell", "hello"), ("hello",))
    ]
    assert ["LANG=C.UTF-8" in environment for environment in environments] == [True, False]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("shell/hello", ["/bin/bash"]),
        ("hello", ["/bin/hello"]),
        ("suite", ["/bin/two"]),
        ("documentation", None),
        ("hello/jq", None),
    ],
)
async def test_a_container_starts_the_shell_or_the_one_main_program(
    used: Workshop, name: str, command: list[str] | None
) -> None:
    image = await used.image(*name.split("/"))
    assert used.config(image)["config"].get("Cmd") == command


async def test_both_manifests_are_of_the_same_config_and_layers(used: Workshop) -> None:
    image = await used.image("greeter")
    oci, docker = (used.manifest(image, each) for each in (ManifestFormat.OCI, ManifestFormat.DOCKER))
    assert oci["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert docker["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"
    for manifest in (oci, docker):
        assert manifest["config"]["digest"] == str(image.config.digest)
        assert [each["digest"] for each in manifest["layers"]] == [
            str(each.descriptor.digest) for each in image.layers
        ]


async def test_another_architecture_is_another_image_and_the_config_says_which(used: Workshop) -> None:
    arm64, amd64 = await used.image("arm64", "hello"), await used.image("amd64", "hello")
    assert arm64.manifests != amd64.manifests
    assert used.config(arm64)["architecture"] == "arm64"
    assert used.config(amd64)["architecture"] == "amd64"


@pytest.mark.parametrize("max_layers", [2, 3, 10, 96])
async def test_an_image_has_no_more_layers_than_the_limit(used_folder: Path, max_layers: int) -> None:
    async with opened(used_folder, options=BuildOptions(max_layers=max_layers)) as workshop:
        image = await workshop.image("assembly")
        assert len(image.layers) <= max_layers
        expected = ALWAYS | {"assembly-1.0", *(f"part-{number}-1.0" for number in range(12))}
        assert sorted(workshop.names(image)) == sorted(expected)


async def test_two_data_folders_and_two_nix_stores_give_the_same_manifests(
    used: Workshop, fresh: Workshop
) -> None:
    request = ("shell", "greeter", "assembly")
    assert (await used.image(*request)).manifests == (await fresh.image(*request)).manifests


# What an operator adds to images


def with_root_layer(root_layer: RootLayerOptions) -> BuildOptions:
    return BuildOptions(root_layer=root_layer)


async def test_the_root_filesystem_belongs_to_the_chosen_user_and_store_paths_to_root(
    used_folder: Path,
) -> None:
    async with opened(used_folder, options=with_root_layer(RootLayerOptions(1000, 100))) as workshop:
        *lower, last = (await workshop.image("hello")).layers
        owners = {(each.uid, each.gid) for each in layers.layer(workshop.blob(last))}
        assert owners == {(1000, 100)}
        assert {each.uid for layer in lower for each in layers.layer(workshop.blob(layer))} == {0}


async def test_contents_are_in_the_image_and_linked_from_the_root(used: Workshop, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    (folder / "etc").mkdir(parents=True)
    (folder / "etc" / "motd").write_text("welcome\n")
    file = tmp_path / "notes.txt"
    file.write_text("note\n")
    contents = tuple([await used.nix.add(each, tmp_path / "roots") for each in (folder, file)])
    async with opened(used.folder, options=with_root_layer(RootLayerOptions(contents=contents))) as workshop:
        image = await workshop.image("hello")
        assert {"site", "notes.txt", "hello-1.0"} <= set(workshop.names(image))
        archive = layers.layer(workshop.blob(image.layers[-1]))
        assert archive.getmember("etc/motd").linkname == f"{contents[0]}/etc/motd"
        assert archive.getmember("notes.txt").linkname == str(contents[1])


async def test_contents_win_over_packages(used: Workshop, tmp_path: Path) -> None:
    (tmp_path / "mine" / "bin").mkdir(parents=True)
    (tmp_path / "mine" / "bin" / "hello").write_text("mine\n")
    mine = await used.nix.add(tmp_path / "mine", tmp_path / "roots")
    async with opened(used.folder, options=with_root_layer(RootLayerOptions(contents=(mine,)))) as workshop:
        image = await workshop.image("hello")
        archive = layers.layer(workshop.blob(image.layers[-1]))
        assert archive.getmember("bin/hello").linkname == f"{mine}/bin/hello"


async def test_extra_commands_change_the_root_filesystem(used_folder: Path) -> None:
    commands = "readlink bin/hello > led; echo secret > etc/key; chmod 600 etc/key; rm etc/services"
    options = with_root_layer(RootLayerOptions(1000, 100, extra_commands=commands))
    async with opened(used_folder, options=options) as workshop:
        image = await workshop.image("hello")
        archive = layers.layer(workshop.blob(image.layers[-1]))
        assert layers.text(archive, "led").strip().endswith("-hello-1.0/bin/hello")
        assert layers.text(archive, "etc/key") == "secret\n"
        assert archive.getmember("etc/key").mode == 0o600
        assert archive.getmember("tmp").mode == 0o1777
        assert "etc/services" not in archive.getnames()
        assert "bin/hello" in archive.getnames()
        assert {(each.uid, each.gid) for each in archive} == {(1000, 100)}
        assert not workshop.left_over()


async def test_extra_commands_that_fail_tell_what_they_said(used_folder: Path) -> None:
    options = with_root_layer(RootLayerOptions(extra_commands="echo no room for this >&2; false; touch made"))
    async with opened(used_folder, options=options) as workshop:
        with pytest.raises(BuildError, match="no room for this"):
            await workshop.image("hello")
        assert not workshop.left_over()


# What is known isn't done again


async def test_the_order_of_packages_does_not_matter(used: Workshop) -> None:
    assert await used.image("jq", "hello") is not None
    built = len(used.nix.realised)
    assert await used.image("hello", "jq") == await used.image("jq", "hello")
    assert len(used.nix.realised) == built


async def test_a_known_image_needs_no_nix_and_packs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as workshop:
        built = await workshop.image("greeter")
    async with opened(tmp_path) as workshop:
        monkeypatch.setenv("PATH", "")
        assert await workshop.image("greeter") == built
        assert workshop.blobs.packed == []
        with pytest.raises(NixMissingError):
            await workshop.image("greeter", "jq")


async def test_a_new_mix_of_what_is_known_needs_no_nix_and_packs_its_last_layer_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as workshop:
        expected = (await workshop.image("greeter", "jq")).manifests
    (tmp_path / "other").mkdir()
    async with opened(tmp_path / "other") as workshop:
        await workshop.image("greeter")
        await workshop.image("jq")
        packed = len(workshop.blobs.packed)
        monkeypatch.setenv("PATH", "")
        image = await workshop.image("greeter", "jq")
        assert image.manifests == expected
        assert workshop.blobs.packed[packed:] == [image.layers[-1].descriptor.digest]
        assert workshop.nix.realised[2:] == []
        monkeypatch.undo()
        # It was kept from collectors while it was made, and no longer.
        await workshop.nix.collect_garbage(1 << 40)
        assert await workshop.nix.sizes() == {}


async def test_known_packages_in_a_new_mix_are_not_evaluated(used: Workshop) -> None:
    await used.image("hello")
    await used.image("jq")
    used.nix.evaluated.clear()
    assert await used.image("hello", "jq", "tools.Wrench")
    assert used.nix.evaluated == ["tools.Wrench"]


async def test_a_layer_that_another_image_has_is_not_packed_again(fresh: Workshop) -> None:
    first = await fresh.image("hello")
    fresh.blobs.packed.clear()
    second = await fresh.image("greeter")
    new = {each.descriptor.digest for each in second.layers} - {
        each.descriptor.digest for each in first.layers
    }
    assert len(new) == 2
    assert sorted(fresh.blobs.packed) == sorted(new)


async def test_other_options_give_another_image(used: Workshop) -> None:
    gzip = await used.image("hello")
    async with opened(used.folder, options=BuildOptions(compression="zstd")) as workshop:
        zstd = await workshop.image("hello")
    assert {each.descriptor.media_type for each in gzip.layers} == {f"{layers_type}+gzip"}
    assert {each.descriptor.media_type for each in zstd.layers} == {f"{layers_type}+zstd"}
    assert [each.diff_id for each in gzip.layers] == [each.diff_id for each in zstd.layers]


layers_type = "application/vnd.oci.image.layer.v1.tar"


@pytest.mark.parametrize("lost", ["manifest", "config", "layer", "root layer"])
async def test_a_blob_that_was_lost_is_made_again(fresh: Workshop, lost: str) -> None:
    image = await fresh.image("hello")
    digest = {
        "manifest": image.manifests[ManifestFormat.DOCKER].digest,
        "config": image.config.digest,
        "layer": image.layers[0].descriptor.digest,
        "root layer": image.layers[-1].descriptor.digest,
    }[lost]
    await fresh.blobs.delete(digest)
    assert await fresh.image("hello") == image
    assert Digest.of(fresh.blobs.path(digest).read_bytes()) == digest


async def test_what_was_pulled_is_current_as_long_as_a_pull_would_give_the_same(fresh: Workshop) -> None:
    pulled = await fresh.images.pull(a_request("hello"))
    for whole in (False, True):
        assert await fresh.images.is_current(pulled, whole=whole)
    fresh.blobs.path(pulled.manifests[ManifestFormat.OCI].digest).unlink()
    assert await fresh.images.is_current(pulled, whole=False)
    assert not await fresh.images.is_current(pulled, whole=True)
    again = await fresh.images.pull(a_request("hello"))
    assert again == pulled
    (recipe,) = pulled.recipes
    assert await fresh.index.forget_image(recipe.key, float("inf"))
    assert not await fresh.images.is_current(pulled, whole=True)


async def test_nothing_is_taken_for_whole_longer_than_its_use_goes_unnoticed(
    fresh: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    for interval, max_age in ((0.0, 0.0), (0.02, 0.02), (60.0, 1.0)):
        monkeypatch.setattr(type(fresh.index), "use_interval", interval)
        assert fresh.images.max_age == max_age


async def test_tags_are_latest_the_revision_and_what_was_built(used: Workshop) -> None:
    [latest_or_revision, other] = await used.images.tags(a_request("hello"))
    assert "latest" in (latest_or_revision, other)
    with pytest.raises(PackagesNotFoundError):
        await used.images.tags(a_request("nothing"))


async def test_listing_tags_counts_like_a_build_where_something_has_to_be_evaluated(tmp_path: Path) -> None:
    admitted: list[str] = []

    def admit(client: str) -> None:
        if len(admitted) == 2:
            raise RateLimitError("builds", 2, "hour", 60)
        admitted.append(client)

    async with opened(tmp_path, capacity=BuildCapacity(queue=QueueLimits(admit=admit))) as workshop:
        tags = workshop.images.tags
        for _ in range(3):
            assert await tags(a_request("hello"), "a")
        await workshop.images.pull(a_request("hello"), "b")
        assert await tags(a_request("hello"), "c")
        assert admitted == ["a", "b"]
        with pytest.raises(RateLimitError):
            await tags(a_request("greeter"), "c")
        assert workshop.nix.evaluated.count("greeter") == 0
        # What is known is told to who may have nothing more.
        assert await tags(a_request("hello"), "c")


async def test_tags_that_take_long_to_evaluate_are_told_to_who_comes_again(
    fresh: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve, gate = fresh.nix.resolve, asyncio.Event()

    async def slowly(*arguments: Any) -> dict[str, Resolution]:
        await gate.wait()
        return await resolve(*arguments)

    monkeypatch.setattr(fresh.nix, "resolve", slowly)
    with pytest.raises(EvaluationPendingError):
        await fresh.images.tags(a_request("hello"), "a", Deadline.after(2.0))
    gate.set()
    assert await fresh.images.tags(a_request("hello"), "a")
    assert fresh.nix.evaluated.count("hello") == 1


async def test_a_blob_belongs_to_the_names_of_images_that_need_it(used: Workshop) -> None:
    hello, greeter = await used.image("hello"), await used.image("greeter")
    [alone] = set(map(_digest, greeter.layers[:-1])) - set(map(_digest, hello.layers))
    shared = set(map(_digest, greeter.layers)) & set(map(_digest, hello.layers))
    assert shared
    for digest in (alone, greeter.config.digest, greeter.manifests[ManifestFormat.OCI].digest):
        assert await used.images.needs(a_request("greeter"), digest)
        assert not await used.images.needs(a_request("hello"), digest)
    for digest in shared:
        assert await used.images.needs(a_request("hello"), digest)


def _digest(layer: PackedLayer) -> Digest:
    return layer.descriptor.digest


# Many at once


async def test_what_many_ask_for_at_once_is_built_once(fresh: Workshop) -> None:
    images = await asyncio.gather(*(fresh.image("greeter") for _ in range(20)))
    assert len(set(map(id, images))) == 1
    assert len(fresh.nix.realised) == 1


async def test_images_with_packages_in_common_can_be_built_at_once(fresh: Workshop) -> None:
    # Nix 2.8 waits for itself for ever, one time of a few, if it is asked for all packages of each.
    images = await asyncio.gather(fresh.image("hello"), fresh.image("greeter"), fresh.image("hello", "jq"))
    assert all("hello-1.0" in fresh.names(image) for image in images)


async def test_images_at_once_pack_what_they_have_in_common_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as workshop:
        await workshop.image("greeter", "jq")
    # All is built and nothing is packed, so that they come to their layers together.
    async with opened(tmp_path, options=BuildOptions(compression="zstd")) as workshop:
        names = (["hello"], ["greeter"], ["hello", "jq"], ["greeter", "jq"])
        await asyncio.gather(*(workshop.image(*name) for name in names))
        assert len(workshop.blobs.packed) == len(set(workshop.blobs.packed))


async def test_who_goes_away_cancels_nothing_for_others(fresh: Workshop) -> None:
    impatient, patient = fresh.building("waiting-a"), fresh.building("waiting-a")
    await fresh.gates.reached("waiting-a")
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    fresh.gates.open("waiting-a")
    assert await patient
    assert len(fresh.nix.realised) == 1


async def test_a_build_that_nobody_waits_for_any_more_goes_on(fresh: Workshop) -> None:
    only = fresh.building("waiting-a")
    await fresh.gates.reached("waiting-a")
    only.cancel()
    with pytest.raises(asyncio.CancelledError):
        await only
    fresh.gates.open("waiting-a")
    assert await fresh.image("waiting-a")
    assert len(fresh.nix.realised) == 1


async def test_no_more_builds_run_at_once_than_the_limit(tmp_path: Path) -> None:
    async with opened(tmp_path, capacity=BuildCapacity(queue=QueueLimits(running=2))) as workshop:
        await workshop.image("hello")
        builds = [workshop.building(name) for name in ("waiting-a", "waiting-b", "waiting-c")]
        first, second = [await workshop.gates.next_reached() for _ in range(2)]
        workshop.gates.open(first)
        third = await workshop.gates.next_reached()
        workshop.gates.open(second)
        workshop.gates.open(third)
        await asyncio.gather(*builds)
        assert workshop.nix.most_at_once == 2


async def test_a_known_image_does_not_wait_for_builds(tmp_path: Path) -> None:
    async with opened(tmp_path, capacity=BuildCapacity(queue=QueueLimits(running=1))) as workshop:
        image = await workshop.image("hello")
        build = workshop.building("waiting-a")
        await workshop.gates.reached("waiting-a")
        assert await workshop.image("hello") == image
        workshop.gates.open("waiting-a")
        await build


async def test_leaving_stops_what_is_being_built(tmp_path: Path) -> None:
    async with opened(tmp_path) as workshop:
        build = workshop.building("waiting-a")
        await workshop.gates.reached("waiting-a")
    with pytest.raises(BuildStoppedError):
        await build
    assert not workshop.left_over()
    assert workshop.nix.running == 0


# Failures


async def test_a_build_that_fails_says_what_and_why_and_the_last_lines(used: Workshop) -> None:
    with pytest.raises(BuildError) as caught:
        await used.image("hello", "broken")
    assert caught.value.what == "broken-1.0"
    assert "exit code 3" in caught.value.reason
    assert "cc: no such file: main.c" in caught.value.log_tail
    assert not used.left_over()


async def test_a_failure_is_remembered_for_a_moment(fresh: Workshop) -> None:
    for _ in range(2):
        with pytest.raises(BuildError):
            await fresh.image("flaky")
    fresh.gates.open("flaky")
    with pytest.raises(BuildError):
        await fresh.image("flaky")
    assert len(fresh.nix.realised) == 1


async def test_what_failed_is_tried_again_when_that_moment_is_over(tmp_path: Path) -> None:
    async with opened(tmp_path, capacity=BuildCapacity(queue=QueueLimits(failure_memory=0.0))) as workshop:
        with pytest.raises(BuildError):
            await workshop.image("flaky")
        workshop.gates.open("flaky")
        assert await workshop.image("flaky")


async def test_missing_packages_are_named_all_at_once_with_the_nearest(used: Workshop) -> None:
    with pytest.raises(PackagesNotFoundError) as caught:
        await used.image("hallo", "hello", "tools.wrenches", "xyzzy")
    assert caught.value.missing == ("hallo", "tools.wrenches", "xyzzy")
    assert "hello" in caught.value.suggestions["hallo"]
    assert caught.value.suggestions["tools.wrenches"] == ["tools.Wrench"]
    assert caught.value.suggestions["xyzzy"] == []


async def test_a_package_that_can_not_be_evaluated_says_why(used: Workshop) -> None:
    with pytest.raises(EvaluationError) as caught:
        await used.image("hello", "refused")
    assert list(caught.value.reasons) == ["refused"]
    assert caught.value.reasons["refused"] == {"reason": "failed", "message": "refused is not for you"}


async def test_a_build_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    async with opened(tmp_path, limits=NixLimits(build_timeout=0.5)) as workshop:
        with pytest.raises(BuildTimeoutError) as caught:
            await workshop.image("waiting-a")
        assert caught.value.what == "image-waiting-a"
        assert caught.value.limit == 0.5
        assert not workshop.left_over()


async def test_every_build_has_a_log(fresh: Workshop) -> None:
    await fresh.image("hello")
    with pytest.raises(BuildError):
        await fresh.image("broken")
    good, bad = sorted((path.read_text() for path in fresh.logs()), key=lambda text: "broken-1.0" in text)
    assert "building '/nix/store/" in good
    assert "hello-1.0.drv" in good
    assert "cc: no such file: main.c" in bad


async def test_only_the_newest_logs_are_kept(tmp_path: Path) -> None:
    (tmp_path / "builds").mkdir()
    for number in range(210):
        log = tmp_path / "builds" / f"{number:03}.log"
        log.touch()
        os.utime(log, (number, number))
    async with opened(tmp_path) as workshop:
        assert [path.stem for path in workshop.logs()] == [f"{number:03}" for number in range(10, 210)]


# Nix's garbage collector


async def test_garbage_collection_takes_nothing_from_a_build(fresh: Workshop) -> None:
    build = fresh.building("hello", "waiting-a")
    await fresh.gates.reached("waiting-a")
    await fresh.nix.collect_all_garbage()
    fresh.gates.open("waiting-a")
    assert set(fresh.names(await build)) == ALWAYS | {"hello-1.0", "waiting-a-1.0"}


async def test_what_is_built_is_kept_from_garbage_collection_until_it_is_packed(fresh: Workshop) -> None:
    fresh.nix.collects_garbage = True
    assert set(fresh.names(await fresh.image("greeter"))) == ALWAYS | {"greeter-1.0", "hello-1.0"}
    assert not fresh.left_over()
    await fresh.nix.collect_all_garbage()
    assert not list(fresh.nix.store_root.glob("*-hello-1.0"))


async def test_what_was_resolved_and_then_collected_is_resolved_again(fresh: Workshop) -> None:
    await fresh.image("greeter")
    await fresh.nix.collect_all_garbage()
    assert not list(fresh.nix.store_root.glob("*-greeter-1.0*"))
    assert set(fresh.names(await fresh.image("greeter", "jq"))) == ALWAYS | {
        *("greeter-1.0", "hello-1.0", "jq-1.0")
    }


# Trouble with the disk


@needs_root
async def test_a_log_for_which_there_is_no_space_is_lost_and_the_build_is_not(tmp_path: Path) -> None:
    with small_disk(tmp_path / "builds", "16K"):
        with suppress(OSError), (tmp_path / "builds" / "other").open("wb", buffering=0) as other:
            while other.write(bytes(4096)):
                pass
        async with opened(tmp_path) as workshop:
            assert "hello-1.0" in workshop.names(await workshop.image("hello"))


@needs_root
async def test_a_full_disk_fails_one_pull_and_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    options = BuildOptions(compression="none")
    with small_disk(disk, "3M"):
        async with opened(tmp_path, options=options, blobs_folder=disk) as workshop:
            small = await workshop.image("hello")
            with pytest.raises(StorageFullError):
                await workshop.image("large")
            assert [path.name for path in disk.glob("tmp/*/*")] == ["lock"]
            assert not workshop.left_over()
            assert await workshop.image("hello") == small

            enlarge(disk, "64M")
            assert "large-1.0" in workshop.names(await workshop.image("large"))
