"""A server whose blobs are in a bucket: who pulls gets them from there, or through the server."""

import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import obstore
import pytest

from chandlery.demo.registry_client import PullError, pull
from chandlery.oci.digest import Digest
from tests.support.clients import ClientError, Containerd, Docker, Podman, Skopeo
from tests.support.package_sets import SOURCE
from tests.support.servers import LIMIT, RunningServer, environment, serving, wait_until
from tests.support.swift_server import KEY, Swift, swift

PREFIX = "images/here"
_numbers = itertools.count()


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swift]:
    with swift(tmp_path_factory.mktemp("swift")) as started:
        yield started


@dataclass(frozen=True)
class Storage:
    """A bucket, and what a server needs to keep its blobs there."""

    objects: Swift
    bucket: str

    @property
    def variables(self) -> dict[str, str]:
        return {**self.objects.variables, "CHANDLERY_STORAGE": f"s3://{self.bucket}/{PREFIX}"}

    def blobs(self) -> dict[Digest, int]:
        keys = self.objects.keys(self.bucket).items()
        return {Digest(key.rpartition("/")[2]): size for key, size in keys}

    def key(self, digest: Digest) -> str:
        return f"{PREFIX}/blobs/sha256/{digest.hex[:2]}/{digest.hex}"

    def delete(self, digest: Digest) -> None:
        obstore.delete(self.objects.store(self.bucket), self.key(digest))

    @contextmanager
    def serving(self, folder: Path, **settings: object) -> Iterator[RunningServer]:
        """Serve with blobs in the bucket, and a data folder that is this server's own."""
        own = {f"CHANDLERY_{name.upper()}": str(value) for name, value in settings.items()}
        # What failed is tried again at once.
        variables = {**self.variables, "CHANDLERY_FAILURE_MEMORY": "0", **own}
        data = folder / f"data-{next(_numbers)}"
        with serving(data, SOURCE, folder / "server.log", variables=variables) as server:
            yield server

    def run(self, data: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        own = {"CHANDLERY_DATA_DIR": str(data), "CHANDLERY_SOURCE": SOURCE, "COLUMNS": "100"}
        return subprocess.run(
            [sys.executable, "-m", "chandlery", *arguments],
            env=environment(**{**own, **self.variables, **variables}),
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )


@pytest.fixture
def storage(objects: Swift) -> Storage:
    return Storage(objects, objects.make_bucket())


def address(server: RunningServer) -> str:
    return server.url.partition("://")[2]


def manifest(server: RunningServer, name: str) -> tuple[Digest, dict[str, Any]]:
    response = server.get(f"/v2/{name}/manifests/latest")
    assert response.status_code == 200, response.text
    return Digest.of(response.content), dict(json.loads(response.content))


def layers(document: dict[str, Any]) -> list[Digest]:
    return [Digest.parse(layer["digest"]) for layer in document["layers"]]


@pytest.mark.parametrize("redirects", [True, False])
def test_real_clients_pull_from_a_bucket(
    storage: Storage,
    tmp_path: Path,
    docker: Docker,
    containerd: Containerd,
    podman: Podman,
    skopeo: Skopeo,
    redirects: bool,
) -> None:
    with storage.serving(tmp_path, storage_redirects=redirects) as server:
        image = f"{address(server)}/assembly"
        skopeo.copy(f"{image}:latest", f"oci:{tmp_path}/layout:latest")
        docker.pull(image)
        docker.remove(image)
        containerd.pull(f"{image}:latest")
        podman.pull(image)
        podman.remove(image)
        assert skopeo.inspect(f"{image}:latest")["Architecture"]
    copied = [Path(file) for file in (tmp_path / "layout" / "blobs" / "sha256").iterdir()]
    assert len(copied) > 12
    assert {Digest(file.name) for file in copied} <= storage.blobs().keys()
    assert not list(tmp_path.glob("data-*/blobs"))
    log = (tmp_path / "server.log").read_text()
    assert KEY not in log
    assert "Signature" not in log


def test_a_blob_is_sent_for_and_a_manifest_is_not(storage: Storage, tmp_path: Path) -> None:
    with storage.serving(tmp_path) as server:
        digest, document = manifest(server, "large")
        assert server.get(f"/v2/large/manifests/sha256:{digest.hex}").status_code == 200
        layer = max(document["layers"], key=lambda each: int(each["size"]))
        url = f"{server.url}/v2/large/blobs/{layer['digest']}"

        sent_on = httpx.get(url)
        assert sent_on.status_code == 307
        assert sent_on.headers["location"].startswith(
            f"{storage.objects.endpoint}/{storage.bucket}/{PREFIX}/"
        )
        assert sent_on.headers["docker-content-digest"] == layer["digest"]
        assert sent_on.headers["cache-control"] == "no-store"
        content = httpx.get(url, follow_redirects=True).content
        assert str(Digest.of(content)) == layer["digest"]

        asked = httpx.head(url)
        assert (asked.status_code, int(asked.headers["content-length"])) == (200, layer["size"])
        part = httpx.get(url, headers={"range": "bytes=100-199"}, follow_redirects=True)
        assert (part.status_code, part.content) == (206, content[100:200])
        assert httpx.get(url, headers={"range": f"bytes={len(content)}-"}).status_code == 416
        # The bucket has entity tags of its own, and takes one range at a time.
        entity_tag = {"range": "bytes=100-199", "if-range": asked.headers["etag"]}
        assert httpx.get(url, headers=entity_tag).content == content[100:200]
        assert httpx.get(url, headers={"range": "bytes=0-1,5-6"}).status_code == 206
        assert httpx.get(url, headers={"if-none-match": asked.headers["etag"]}).status_code == 304


def test_without_redirects_blobs_come_through_the_server(storage: Storage, tmp_path: Path) -> None:
    with storage.serving(tmp_path, storage_redirects=False) as server:
        _, document = manifest(server, "large")
        layer = max(document["layers"], key=lambda each: int(each["size"]))
        url = f"{server.url}/v2/large/blobs/{layer['digest']}"
        content = httpx.get(url).content
        assert str(Digest.of(content)) == layer["digest"]
        part = httpx.get(url, headers={"range": "bytes=100-199"})
        assert (part.status_code, part.content) == (206, content[100:200])


def test_a_blob_that_was_deleted_from_the_bucket_is_made_again(storage: Storage, tmp_path: Path) -> None:
    with storage.serving(tmp_path) as server:
        digest, document = manifest(server, "assembly")
        whole = storage.blobs()
        for each in (*layers(document)[:3], digest):
            storage.delete(each)

        def pulls() -> bool:
            try:
                pulled = pull(server.url, "assembly", "latest", tmp_path / "pulled", LIMIT)
            except PullError:
                return False
            return pulled.digest == digest

        # What was seen a moment ago is taken to be there.
        wait_until(lambda: pulls() and storage.blobs() == whole)


def copy_until_it_is_refused(skopeo: Skopeo, image: str, folder: Path) -> None:
    """Copy an image for some seconds, until the server says why it can't be had.

    What was seen a moment ago is taken to be there: clients are sent to where nobody answers.
    """
    for _ in range(20):
        try:
            skopeo.copy(image, f"oci:{folder}/copy-{next(_numbers)}:latest")
        except ClientError as error:
            if "connection refused" not in error.output:
                raise
        time.sleep(1)


def test_while_the_bucket_is_down_pulls_say_so_and_afterwards_they_work(
    tmp_path: Path, skopeo: Skopeo
) -> None:
    with swift(tmp_path / "swift") as own:
        storage = Storage(own, own.make_bucket())
        with storage.serving(tmp_path) as server:
            known, unknown = f"{address(server)}/hello:latest", f"{address(server)}/greeter:latest"
            skopeo.copy(known, f"oci:{tmp_path}/before:latest")
            own.stop()
            for image in (known, unknown):
                with pytest.raises(ClientError, match=f"s3://{storage.bucket}/{PREFIX}: .*can't be reached"):
                    copy_until_it_is_refused(skopeo, image, tmp_path)
            ready = server.get("/readyz")
            assert ready.status_code == 503
            assert "can't be reached" in ready.text
            own.start()
            for image in (known, unknown):
                skopeo.copy(image, f"oci:{tmp_path}/copy-{next(_numbers)}:latest")
            wait_until(lambda: server.get("/readyz").status_code == 200)


def test_servers_that_share_a_bucket_share_its_blobs(storage: Storage, tmp_path: Path) -> None:
    with storage.serving(tmp_path) as first:
        digest, _ = manifest(first, "greeter")
    before = obstore.list(storage.objects.store(storage.bucket)).collect()
    with storage.serving(tmp_path) as second:
        assert manifest(second, "greeter")[0] == digest
    written = {each["path"]: each["last_modified"] for each in before}
    after = obstore.list(storage.objects.store(storage.bucket)).collect()
    layers_again = [each for each in after if each["last_modified"] != written[each["path"]]]
    # Documents are put at once; what is larger is looked for first.
    assert max((each["size"] for each in layers_again), default=0) < 2000


def test_a_build_writes_an_archive_from_a_bucket_and_says_where_blobs_are(
    storage: Storage, tmp_path: Path
) -> None:
    output = tmp_path / "image.tar"
    ran = storage.run(tmp_path / "data", "build", "hello", "--json", "--output", str(output))
    assert ran.returncode == 0, ran.stderr
    places = json.loads(ran.stdout)["layerLocations"]
    for hexadecimal, place in places.items():
        key = storage.key(Digest(hexadecimal))
        assert place["url"] == f"s3://{storage.bucket}/{key}"
    listed = subprocess.run(["tar", "--list", "-f", output], capture_output=True, text=True, check=True)
    assert {f"blobs/sha256/{hexadecimal}" for hexadecimal in places} <= set(listed.stdout.split())
    assert not list((tmp_path / "data" / "tmp").glob("*"))


def test_what_takes_no_room_here_is_not_collected_but_scrubbed(storage: Storage, tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert storage.run(data, "build", "hello").returncode == 0
    whole = storage.blobs()
    ran = storage.run(data, "collect", CHANDLERY_DISK_LIMIT="1", CHANDLERY_GC_GRACE="0.1")
    assert "0 images, and 0 blobs" in ran.stdout, ran.stderr
    assert storage.blobs() == whole
    damaged = max(whole, key=lambda digest: whole[digest])
    obstore.put(storage.objects.store(storage.bucket), storage.key(damaged), b"x" * whole[damaged])
    ran = storage.run(data, "scrub")
    assert f"{len(whole)} blobs" in ran.stdout, ran.stderr
    assert "1 damaged or missing, 1 repaired" in ran.stdout
    found = obstore.get(storage.objects.store(storage.bucket), storage.key(damaged))
    assert Digest.of(bytes(found.bytes())) == damaged


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "refuses these credentials"),
        ({"CHANDLERY_STORAGE": "s3://nowhere"}, "there is no such bucket"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "can't be reached"),
        ({"CHANDLERY_STORAGE": "bucket"}, "storage: .*s3://BUCKET/PREFIX"),
        ({"CHANDLERY_STORAGE_OPTIONS": '{"colour": "red"}'}, "storage_options.*colour"),
    ],
)
def test_a_server_that_can_not_use_its_bucket_says_so_in_one_line_and_does_not_start(
    storage: Storage, tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    ran = storage.run(tmp_path / "data", "serve", **variables)
    assert ran.returncode == 1
    [line] = ran.stderr.splitlines()
    assert re.search(said, line)
    assert KEY not in line
