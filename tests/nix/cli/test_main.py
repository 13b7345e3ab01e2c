import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from chandlery import __version__
from chandlery.oci.digest import Digest
from tests.support import layers
from tests.support.ordinary_user import run_as_ordinary_user
from tests.support.package_sets import SOURCE, Gates
from tests.support.servers import LIMIT, environment, free_port, serving, wait_until

needs_skopeo = pytest.mark.skipif(shutil.which("skopeo") is None, reason="not installed: skopeo")


@dataclass(frozen=True)
class Finished:
    exit_code: int
    stdout: str
    stderr: str

    @property
    def complaint(self) -> str:
        """Return the one line that tells what is wrong."""
        assert self.exit_code == 1, self
        assert self.stdout == "", self
        [line] = [line for line in self.stderr.splitlines() if line.startswith("chandlery: ")]
        assert self.stderr.splitlines()[-1] == line, self
        assert "Traceback" not in self.stderr
        return line


@dataclass(frozen=True)
class Command:
    """The command, with a data folder and a package set."""

    data_dir: Path
    gates: Gates

    def __call__(self, *arguments: str, prefix: tuple[str, ...] = (), **variables: str) -> Finished:
        settings = {"CHANDLERY_DATA_DIR": str(self.data_dir), "CHANDLERY_SOURCE": SOURCE, **variables}
        finished = subprocess.run(
            [*prefix, sys.executable, "-m", "chandlery", *arguments],
            env=environment(**settings),
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        return Finished(finished.returncode, finished.stdout, finished.stderr)

    def json(self, *arguments: str) -> Any:
        """Build with --json; give what is printed, which has to be JSON and nothing else."""
        finished = self("build", "--json", *arguments)
        assert finished.exit_code == 0, finished
        return json.loads(finished.stdout)

    def last_layer(self, built: Any) -> Path:
        hexadecimal = built["manifest"]["layers"][-1]["digest"].partition(":")[2]
        return Path(built["layerLocations"][hexadecimal]["path"])


@pytest.fixture(scope="module")
def chandlery(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Return the command with one data folder for all tests, so that little has to be built."""
    folder = tmp_path_factory.mktemp("chandlery")
    return Command(folder / "data", Gates(folder / "gates", folder / "data"))


def test_the_version_is_told(chandlery: Command) -> None:
    assert chandlery("--version").stdout == f"{__version__}\n"


@pytest.mark.parametrize("command", [[], ["serve"], ["build"]], ids=["chandlery", "serve", "build"])
def test_help_is_there_and_fits_a_terminal(chandlery: Command, command: list[str]) -> None:
    finished = chandlery(*command, "--help", COLUMNS="80")
    assert finished.exit_code == 0
    assert "Usage: " in finished.stdout
    assert all(len(line) <= 80 for line in finished.stdout.splitlines())


# build


def test_json_gives_the_manifest_and_the_place_of_config_and_layers(chandlery: Command) -> None:
    built = chandlery.json("greeter")
    manifest, locations = built["manifest"], built["layerLocations"]
    assert manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    described = [manifest["config"], *manifest["layers"]]
    assert set(locations) == {each["digest"].removeprefix("sha256:") for each in described}
    for hexadecimal, location in locations.items():
        content = Path(location["path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == hexadecimal
        assert b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode() == location["md5"]


def test_timings_tell_what_was_done_and_that_nothing_had_to_be(chandlery: Command) -> None:
    first = chandlery("build", "suite", "--timings").stdout
    rows = [line.split() for line in first.splitlines()[-4:]]
    assert [row[0] for row in rows] == ["resolve", "build", "pack", "store"]
    assert all(row[2:4] == ["s", "from"] for row in rows)
    assert "Nothing had to be made." in chandlery("build", "suite", "--timings").stdout
    assert chandlery.json("suite", "--timings")["timings"] == []
    [*_, packed, _] = chandlery.json("suite", "jq", "--timings")["timings"]
    assert packed["work"] == "pack"
    assert 0 <= packed["begin"] <= packed["end"]
    assert 0 <= packed["busy"] <= packed["end"] - packed["begin"] + 0.01


def test_json_of_missing_packages_names_them_all(chandlery: Command) -> None:
    finished = chandlery("build", "--json", "hello", "xyzzy", "hallo")
    assert finished.exit_code == 1
    assert json.loads(finished.stdout) == {"error": "not_found", "pkgs": ["hallo", "xyzzy"]}
    assert "Traceback" not in finished.stderr


def test_without_json_missing_packages_are_told_with_the_nearest(chandlery: Command) -> None:
    complaint = chandlery("build", "hello", "xyzzy", "hallo").complaint
    assert "hallo (did you mean hello?)" in complaint
    assert "xyzzy" in complaint


def test_a_failed_build_is_told_with_its_log(chandlery: Command) -> None:
    finished = chandlery("build", "broken")
    assert finished.exit_code == 1
    assert "chandlery: broken-1.0 could not be built" in finished.stderr
    assert "cc: no such file: main.c" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_summary_has_name_digest_and_layers(chandlery: Command) -> None:
    finished = chandlery("build", "hello", "greeter", "--name", "mine", "--tag", "v1")
    name, digest, store_paths, layer_count = (line.strip() for line in finished.stdout.splitlines())
    assert name == "mine:v1"
    assert Digest.parse(digest)
    assert store_paths.startswith("4 store paths")
    assert layer_count.startswith("5 layers")


def test_the_tag_is_the_hash_of_the_build_unless_it_is_chosen(chandlery: Command) -> None:
    name, digest, *_ = chandlery("build", "jq", "hello").stdout.split()
    assert name == f"hello/jq:{Digest.parse(digest).hex[:32]}"


def test_a_package_with_capitals_has_an_image_name_too(chandlery: Command) -> None:
    assert chandlery("build", "tools.Wrench", "Capital").stdout.startswith("capital/tools.wrench:")


def test_the_same_command_gives_the_same_image(chandlery: Command, tmp_path: Path) -> None:
    other = Command(tmp_path, chandlery.gates)
    assert other.json("shell", "greeter")["manifest"] == chandlery.json("shell", "greeter")["manifest"]


def test_owner_and_number_of_layers_are_chosen(chandlery: Command) -> None:
    built = chandlery.json("assembly", "--uid", "1000", "--gid", "100", "--max-layers", "4")
    assert len(built["manifest"]["layers"]) <= 4
    owners = {(each.uid, each.gid) for each in layers.layer(chandlery.last_layer(built))}
    assert owners == {(1000, 100)}


@pytest.mark.parametrize(
    ("compression", "ending", "magic"),
    [("gzip", "+gzip", b"\x1f\x8b"), ("zstd", "+zstd", b"\x28\xb5\x2f\xfd"), ("none", "", b"bin/")],
)
def test_compression_is_chosen(chandlery: Command, compression: str, ending: str, magic: bytes) -> None:
    built = chandlery.json("hello", "--compression", compression)
    kinds = {each["mediaType"] for each in built["manifest"]["layers"]}
    assert kinds == {f"application/vnd.oci.image.layer.v1.tar{ending}"}
    assert chandlery.last_layer(built).read_bytes().startswith(magic)


def test_contents_are_files_folders_and_store_paths(chandlery: Command, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("welcome")
    (tmp_path / "notes.txt").write_text("note")
    before = chandlery.json("jq")
    [jq] = (
        name.removesuffix("/bin/jq")
        for layer in before["manifest"]["layers"]
        for name in layers.layer(
            Path(before["layerLocations"][layer["digest"].removeprefix("sha256:")]["path"])
        ).getnames()
        if name.endswith("-jq-1.0/bin/jq")
    )
    contents = [str(tmp_path / "site"), str(tmp_path / "notes.txt"), f"/{jq}"]
    built = chandlery.json("hello", *(word for each in contents for word in ("--contents", each)))
    names = layers.layer(chandlery.last_layer(built)).getnames()
    assert {"index.html", "notes.txt", "bin/jq", "bin/hello"} <= set(names)


def test_extra_commands_run_over_the_root_filesystem(chandlery: Command) -> None:
    built = chandlery.json("hello", "--extra-commands", "mkdir data; ls bin > data/programs")
    assert layers.text(layers.layer(chandlery.last_layer(built)), "data/programs") == "hello\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["hello", "--max-layers", "1"], "max_layers"),
        (["hello", "--compression", "lz4"], "none, gzip, zstd"),
        (["hello", "--source", "nonsense"], "debian!<suite>"),
        (["hello", "--source", "path!/proc/nowhere"], "there is no folder /proc/nowhere"),
        (["hello", "--name", "Not A Name"], "'Not A Name' is not an image name"),
        (["hello", "--tag", "not/a/tag"], "'not/a/tag' is neither a tag nor a digest"),
        (["hello", "--contents", "/proc/nowhere"], "--contents /proc/nowhere: there is no such file"),
        (["hello", "--contents", "/nix/store/nothing"], "'/nix/store/nothing' is not a store path"),
        (["arm64"], "it names no package"),
        (["hello", "shell"], "shell/hello"),
        (["hello", "--data-dir", "/proc/nowhere"], "choose another data folder"),
        (["hello", "--output", "/proc/nowhere/image.tar"], "/proc/nowhere/image.tar can't be written"),
        (["hello", "--output", "/"], "/ can't be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_not_be_is_told_in_one_line(chandlery: Command, arguments: list[str], reason: str) -> None:
    assert reason in chandlery("build", *arguments).complaint


def test_bad_names_are_told_before_anything_is_built(chandlery: Command) -> None:
    assert "is not an image name" in chandlery("build", "broken", "--name", "Not A Name").complaint


# build --output


def blobs_of(folder: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "blobs" / "sha256").iterdir()}


def test_output_is_a_whole_oci_layout(chandlery: Command, tmp_path: Path) -> None:
    output = tmp_path / "image"
    name = chandlery("build", "greeter", "--output", str(output)).stdout.split()[0]
    blobs = blobs_of(output)
    assert all(hashlib.sha256(content).hexdigest() == digest for digest, content in blobs.items())
    [described] = json.loads((output / "index.json").read_bytes())["manifests"]
    assert described["annotations"]["io.containerd.image.name"] == name
    manifest = json.loads(blobs[described["digest"].removeprefix("sha256:")])
    config = json.loads(blobs[manifest["config"]["digest"].removeprefix("sha256:")])
    assert len(config["rootfs"]["diff_ids"]) == len(manifest["layers"]) == 5
    assert {each["digest"].removeprefix("sha256:") for each in manifest["layers"]} <= set(blobs)


@needs_skopeo
@pytest.mark.parametrize(
    ("name", "transports"), [("image", ["oci"]), ("image.tar", ["oci-archive", "docker-archive"])]
)
def test_skopeo_copies_what_was_written(
    chandlery: Command, tmp_path: Path, name: str, transports: list[str]
) -> None:
    output = tmp_path / name
    assert chandlery("build", "hello", "--output", str(output)).exit_code == 0
    for transport in transports:
        copy = tmp_path / transport
        # Copying, unlike inspecting, reads every blob and checks its digest.
        subprocess.run(
            ["skopeo", "--insecure-policy", "copy", f"{transport}:{output}", f"dir:{copy}"],
            check=True,
            capture_output=True,
            timeout=LIMIT,
        )
        assert len(json.loads((copy / "manifest.json").read_bytes())["layers"]) == 4


# serve: what can't work is told at the start


@pytest.fixture
def port() -> int:
    return free_port()


def test_a_port_in_use(chandlery: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        complaint = chandlery("serve", "--port", str(port)).complaint
    assert f"port {port}: Address already in use" in complaint
    assert "--port" in complaint


def test_an_address_that_this_machine_does_not_have(chandlery: Command, port: int) -> None:
    # RFC 5737: no machine has it.
    assert "192.0.2.1" in chandlery("serve", "--host", "192.0.2.1", "--port", str(port)).complaint


def test_an_address_that_other_machines_reach_and_nobody_said_who_may_pull(
    chandlery: Command, port: int
) -> None:
    complaint = chandlery("serve", "--host", "0.0.0.0", "--port", str(port)).complaint  # noqa: S104
    assert "other machines can reach 0.0.0.0" in complaint
    assert "users_file" in complaint
    assert 'anonymous = "read"' in complaint


def test_a_bucket_and_rules_by_which_servers_hide_what_others_have_built(
    chandlery: Command, port: int, tmp_path: Path
) -> None:
    said = "a server that shares the bucket with others answers 404 for what another one has built"
    for rule, expected in (('deny = ["nmap"]', True), ("builds_per_hour = 20", False)):
        settings = tmp_path / "settings.toml"
        settings.write_text(
            'storage = "s3://images"\n'
            f'storage_options = {{ endpoint = "http://127.0.0.1:{port}", access_key_id = "a", '
            'secret_access_key = "b" }\n'
            f"[access.default]\n{rule}\n"
        )
        started = chandlery("serve", "--port", str(port), "--settings", str(settings))
        assert started.exit_code == 1
        assert (said in started.stdout + started.stderr) == expected


def test_files_about_access_that_are_not_there(chandlery: Command, port: int, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    users = chandlery("serve", "--port", str(port), CHANDLERY_USERS_FILE=missing)
    assert missing in users.complaint
    tls = {"CHANDLERY_TLS_CERTIFICATE": missing, "CHANDLERY_TLS_KEY": missing}
    assert missing in chandlery("serve", "--port", str(port), prefix=(), **tls).complaint


def test_a_host_that_is_no_address(chandlery: Command, port: int) -> None:
    assert "nowhere.invalid" in chandlery("serve", "--host", "nowhere.invalid", "--port", str(port)).complaint


def test_a_file_where_the_data_folder_should_be(chandlery: Command, port: int, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    complaint = chandlery("serve", "--port", str(port), "--data-dir", str(tmp_path / "file")).complaint
    assert str(tmp_path / "file") in complaint
    assert "choose another data folder" in complaint


def test_a_data_folder_that_is_read_only(chandlery: Command, port: int) -> None:
    complaint = chandlery("serve", "--port", str(port), "--data-dir", "/proc/nowhere").complaint
    assert "/proc/nowhere" in complaint


def test_a_data_folder_where_the_user_may_not_write(port: int, tmp_path: Path) -> None:
    output = run_as_ordinary_user(
        """
import subprocess, sys
command = [sys.executable, "-m", "chandlery", *sys.argv[1:]]
finished = subprocess.run(command, stderr=subprocess.PIPE, text=True)
print(finished.returncode, finished.stderr)
""",
        *("serve", "--port", str(port), "--data-dir", str(tmp_path / "data"), "--source", SOURCE),
    )
    assert output.startswith("1 chandlery: ")
    assert "let the user that runs chandlery write there" in output
    assert len(output.splitlines()) == 2


def test_no_nix(chandlery: Command, port: int, tmp_path: Path) -> None:
    assert "install Nix" in chandlery("serve", "--port", str(port), PATH=str(tmp_path)).complaint


@pytest.mark.parametrize("source", ["nixpkgs!unstable", "debian", "debian!Not/A/Suite", "path!/proc/nowhere"])
def test_a_source_that_is_none(chandlery: Command, port: int, source: str) -> None:
    assert source in chandlery("serve", "--port", str(port), "--source", source).complaint


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="not installed: apt-get")
def test_a_source_that_can_not_be_reached(chandlery: Command, port: int, tmp_path: Path) -> None:
    finished = chandlery(
        *("serve", "--port", str(port), "--data-dir", str(tmp_path), "--source", "debian!bookworm"),
        CHANDLERY_DEBIAN_MIRROR=f"http://127.0.0.1:{free_port()}/debian",
    )
    assert "debian!bookworm can't be reached" in finished.complaint


# serve: the end


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """Return a file for what servers say; it is shown when a test fails."""
    file = tmp_path / "server.log"
    file.touch()
    yield file
    sys.stdout.write(file.read_text())


signals = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)


@signals
def test_a_signal_ends_the_server_and_all_that_it_started(
    chandlery: Command, log: Path, number: signal.Signals
) -> None:
    with serving(chandlery.data_dir, SOURCE, log) as server:
        assert server.get("/v2/hello/manifests/latest").is_success
        os.killpg(server.process.pid, number)
        assert server.process.wait(LIMIT) == 0
        wait_until(lambda: not server.processes())
    assert "Traceback" not in log.read_text()


@signals
def test_a_signal_in_mid_build_ends_the_build_at_once(
    tmp_path: Path, log: Path, number: signal.Signals
) -> None:
    gates = Gates(tmp_path / "gates", tmp_path / "data")
    with (
        ThreadPoolExecutor() as threads,
        serving(tmp_path / "data", SOURCE, log) as server,
    ):
        pull = threads.submit(server.get, "/v2/waiting-a/manifests/latest")
        wait_until(lambda: gates.is_reached("waiting-a"))
        os.killpg(server.process.pid, number)
        # The request would be held for longer.
        assert server.process.wait(20) == 0
        wait_until(lambda: not server.processes())
        assert pull.result().status_code == httpx.codes.TOO_MANY_REQUESTS
    assert not list((tmp_path / "data").glob("tmp/*"))
    assert "Traceback" not in log.read_text()


def test_the_port_is_free_at_once_even_when_the_server_was_killed(chandlery: Command, log: Path) -> None:
    port = free_port()
    with serving(chandlery.data_dir, SOURCE, log, port=port) as server:
        assert server.get("/v2/hello/manifests/latest").is_success
        server.process.kill()
        wait_until(lambda: not server.processes())
        with serving(chandlery.data_dir, SOURCE, log, port=port) as again:
            assert again.get("/v2/hello/manifests/latest").is_success
