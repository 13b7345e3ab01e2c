"""What people do with Chandlery, done by docker, containerd, podman and skopeo."""

import json
import re
from pathlib import Path

import httpx
import pytest

from chandlery.demo.sandbox import unpack
from chandlery.oci.digest import Digest
from chandlery.oci.documents import DOCKER_MANIFEST, OCI_MANIFEST
from tests.support.clients import ClientError, Containerd, Docker, Engine, Podman, Skopeo
from tests.support.layouts import ELF_AARCH64, blobs_of, machine_of
from tests.support.running import Server, TlsServer

# They use the server of conftest.py, as do other tests of this group.
pytestmark = pytest.mark.xdist_group("daemons")


# Names of large images choose their platform, lest two are built.
TOOLS = "amd64/shell/git/jq/curl"
_CURL_CERTIFICATE_ERROR = 60  # curl(1), "EXIT CODES"


# Images that run


@pytest.fixture
def tools(engine: Engine, server: Server) -> str:
    image = server.image(TOOLS)
    engine.pull(image)
    return image


def test_the_programs_of_an_image_run(engine: Engine, tools: str) -> None:
    assert engine.run(tools, "git", "--version").startswith("git version ")
    assert engine.run(tools, "jq", "--version").startswith("jq-")
    assert engine.run(tools, "curl", "--version").startswith("curl ")
    assert engine.run(tools, "bash", "-c", """echo '{"a": [1, 2]}' | jq --compact-output .a""") == "[1,2]\n"
    assert "nothing to commit" in engine.run(tools, "bash", "-c", "cd /tmp && git init -q . && git status")


def test_curl_finds_the_ca_bundle(engine: Engine, tools: str) -> None:
    count = engine.run(tools, "bash", "-c", 'grep --count "BEGIN CERTIFICATE" "$SSL_CERT_FILE"')
    assert int(count) > 100


def test_curl_trusts_the_bundle_and_no_one_else(engine: Engine, tools: str, tls_server: TlsServer) -> None:
    with pytest.raises(ClientError) as refused:
        engine.run(tools, "curl", "-sS", "--fail", tls_server.url, network="host")
    assert refused.value.exit_code == _CURL_CERTIFICATE_ERROR, refused.value
    script = 'curl -sS --fail --cacert <(echo "$1") "$2"'
    trusting = engine.run(tools, "bash", "-c", script, "bash", tls_server.ca, tls_server.url, network="host")
    assert trusting == "trusted"


def test_python_has_tls_and_sqlite(engine: Engine, server: Server) -> None:
    image = server.image("amd64/python3")
    engine.pull(image)
    program = (
        "import sqlite3, ssl; "
        "print(sqlite3.connect(':memory:').execute('select 6 * 7').fetchone()[0], "
        "ssl.create_default_context().cert_store_stats()['x509_ca'])"
    )
    answer, certificates = engine.run(image, "python3", "-c", program).split()
    assert answer == "42"
    assert int(certificates) > 100


def test_node_speaks_https(engine: Engine, server: Server, tls_server: TlsServer) -> None:
    image = server.image("amd64/nodejs")
    engine.pull(image)
    program = """
        const [url, ca] = process.argv.slice(1);
        const get = (options) => require('https')
            .get(url, options, (answer) => answer.on('data', (text) => console.log(`${text}`)))
            .on('error', (error) => console.log(error.code));
        get(ca ? {ca} : {});
    """
    refused = engine.run(image, "node", "-e", program, tls_server.url, network="host")
    trusting = engine.run(image, "node", "-e", program, tls_server.url, tls_server.ca, network="host")
    assert (refused, trusting) == ("DEPTH_ZERO_SELF_SIGNED_CERT\n", "trusted\n")


def test_psql_runs(engine: Engine, server: Server) -> None:
    image = server.image("amd64/postgresql-client")
    engine.pull(image)
    assert engine.run(image, "psql", "--version").startswith("psql (PostgreSQL) ")


def test_ffmpeg_encodes_a_picture(engine: Engine, server: Server) -> None:
    image = server.image("amd64/ffmpeg")
    engine.pull(image)
    assert engine.run(image, "ffmpeg", "-version").startswith("ffmpeg version ")
    picture = "-v error -f lavfi -i testsrc=size=32x32:rate=1 -frames:v 1 -codec:v png -f md5 -"
    assert re.fullmatch(r"MD5=[0-9a-f]{32}\n", engine.run(image, "ffmpeg", *picture.split()))


def test_a_closure_of_hundreds_of_store_paths_fits_in_one_image(skopeo: Skopeo, server: Server) -> None:
    image = server.image("amd64/ffmpeg")
    layers = json.loads(skopeo.manifest(image))["layers"]
    history = json.loads(skopeo.config(image))["history"]
    store_paths = {word for layer in history for word in re.split(r"[,\s]+", layer["created_by"])}
    assert len(store_paths) > 200
    assert len(layers) < 127


def test_a_shell_image_starts_a_shell(docker: Docker, server: Server) -> None:
    image = server.image("shell")
    docker.pull(image)
    assert docker.run(image, stdin="echo hello; ls -d /tmp\n") == "hello\n/tmp\n"


def test_podman_runs_an_image(podman: Podman, server: Server) -> None:
    image = server.image(TOOLS)
    podman.pull(image)
    assert podman.run(image, "git", "--version").startswith("git version ")
    with podman.mounted(image) as root:
        assert (root / "usr/bin/git").exists()


# Names and digests


@pytest.fixture(scope="session")
def digest(skopeo: Skopeo, server: Server) -> str:
    return str(skopeo.inspect(server.image("git/jq"))["Digest"])


def test_the_order_of_packages_does_not_matter(digest: str, skopeo: Skopeo, server: Server) -> None:
    assert skopeo.inspect(server.image("jq/git"))["Digest"] == digest


def test_engines_pull_by_digest(engine: Engine, digest: str, server: Server) -> None:
    image = server.image("git/jq", digest)
    engine.pull(image)
    assert engine.run(image, "jq", "--version").startswith("jq-")


def test_podman_pulls_by_digest(podman: Podman, digest: str, server: Server) -> None:
    image = server.image("git/jq", digest)
    podman.pull(image)
    assert podman.inspect(image)["Digest"] == digest


def test_skopeo_pulls_by_digest(skopeo: Skopeo, digest: str, server: Server) -> None:
    assert str(Digest.of(skopeo.manifest(server.image("git/jq", digest)).encode())) == digest


def test_a_second_pull_finds_nothing_new(docker: Docker, server: Server) -> None:
    image = server.image("git/jq")
    docker.pull(image)
    assert "Image is up to date" in docker.pull(image)


@pytest.mark.parametrize("media_type", [OCI_MANIFEST, DOCKER_MANIFEST])
def test_head_and_get_agree_on_the_digest(media_type: str, server: Server, digest: str) -> None:
    url = f"{server.url}/v2/git/jq/manifests/latest"
    headers = {"Accept": media_type}
    got, head = httpx.get(url, headers=headers, timeout=60), httpx.head(url, headers=headers, timeout=60)
    served = str(Digest.of(got.content))
    assert got.headers["Content-Type"] == head.headers["Content-Type"] == media_type
    assert got.headers["Docker-Content-Digest"] == head.headers["Docker-Content-Digest"] == served
    assert head.headers["Content-Length"] == str(len(got.content))
    by_digest = httpx.get(f"{server.url}/v2/git/jq/manifests/{served}", headers={"Accept": "*/*"})
    assert by_digest.content == got.content


def test_tags_are_listed(skopeo: Skopeo, server: Server, digest: str) -> None:
    assert "latest" in skopeo.list_tags(server.image("git/jq").removesuffix(":latest"))


def test_docker_loads_an_archive_that_skopeo_made(
    docker: Docker, skopeo: Skopeo, server: Server, tmp_path: Path
) -> None:
    archive = tmp_path / "image.tar"
    skopeo.copy(server.image("git/jq"), f"docker-archive:{archive}:loaded:latest")
    docker.load(archive)
    assert docker.run("loaded:latest", "git", "--version").startswith("git version ")
    docker.remove("loaded:latest")


# Other architectures


def test_skopeo_gets_an_arm64_image(skopeo: Skopeo, server: Server, tmp_path: Path) -> None:
    layout, root = tmp_path / "layout", tmp_path / "root"
    skopeo.copy(server.image("arm64/jq"), f"oci:{layout}:latest")
    config, *layers = blobs_of(layout)
    assert json.loads(config.read_text())["architecture"] == "arm64"
    unpack(layers, root)
    assert machine_of(root / "usr/bin/jq") == ELF_AARCH64


def test_containerd_gets_an_arm64_image(containerd: Containerd, server: Server) -> None:
    image = server.image("arm64/jq")
    containerd.pull(image, platform="linux/arm64")
    with containerd.mounted(image, "linux/arm64") as root:
        assert machine_of(root / "usr/bin/jq") == ELF_AARCH64


# What isn't there


@pytest.mark.parametrize("client", ["docker", "podman"])  # ctr prints the status alone
def test_a_pull_of_missing_packages_names_all_of_them(
    client: str, request: pytest.FixtureRequest, server: Server
) -> None:
    engine: Engine = request.getfixturevalue(client)
    with pytest.raises(ClientError) as failed:
        engine.pull(server.image("git/no-such-package/nor-this-one"))
    assert "no-such-package" in failed.value.output
    assert "nor-this-one" in failed.value.output
