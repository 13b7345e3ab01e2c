import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from chandlery.settings.settings import Settings
from tests.support.command_line import run
from tests.support.package_sets import SOURCE
from tests.support.servers import free_port


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "chandlery.toml"
    file.write_text(
        """
port = 1001
hold = 5
users_file = "/etc/users"
[storage_options]
secret_access_key = "hush"
region = "eu-1"
[sources.ours]
from = "git!https://user:hush@example.com/a"
config = { allowUnfree = true }
[sources]
theirs = "path!/srv/packages"
[access.users."alice@example.com"]
allow = ["git"]
"""
    )
    return file


# config


def test_config_prints_every_setting_with_its_value_and_its_origin(file: Path) -> None:
    command = ("config", "--settings", str(file), "--source", "ours")
    finished = run(*command, CHANDLERY_HOLD="6", CHANDLERY_HOST="::1")
    assert (finished.returncode, finished.stderr) == (0, "")
    told = {line.partition("  # ")[0].rstrip(): line.partition("  # ")[2] for line in _lines(finished.stdout)}
    expected = {
        "port = 1001": f"file {file}",
        "hold = 6.0": "variable CHANDLERY_HOLD",
        'host = "::1"': "variable CHANDLERY_HOST",
        'source = "ours"': "option --source",
        "max_layers = 96": "default",
        "# tls_key is not set": "default",
        'users_file = "/etc/users"': f"file {file}",
        'sources.ours.from = "git!https://***@example.com/a"': f"file {file}",
        "sources.ours.config.allowUnfree = true": f"file {file}",
        'sources.theirs.from = "path!/srv/packages"': f"file {file}",
        'access.users."alice@example.com".allow = ["git"]': f"file {file}",
        'storage_options.secret_access_key = "***"': f"file {file}",
        'storage_options.region = "eu-1"': f"file {file}",
    }
    assert {line: told[line] for line in expected} == expected
    names = {line.removeprefix("# ").split()[0].partition(".")[0] for line in told}
    assert names == set(Settings.model_fields)


def _lines(output: str) -> Iterator[str]:
    yield from (line for line in output.splitlines() if line.strip())


def test_what_config_prints_is_a_settings_file_again(file: Path, tmp_path: Path) -> None:
    printed = tmp_path / "printed.toml"
    printed.write_text(run("config", "--settings", str(file)).stdout)
    before, after = Settings.load(file), Settings.load(printed)
    for name in set(Settings.model_fields) - {"sources", "storage_options"}:  # less what is secret
        assert getattr(before, name) == getattr(after, name), name


def test_config_for_programs(file: Path) -> None:
    finished = run("config", "--json", "--settings", str(file), CHANDLERY_HOLD="6")
    told = json.loads(finished.stdout)
    assert told["port"] == {"value": 1001, "from": "file", "name": str(file)}
    assert told["hold"] == {"value": 6.0, "from": "variable", "name": "CHANDLERY_HOLD"}
    assert told["max_layers"] == {"value": 96, "from": "default", "name": ""}
    assert told["tls_key"] == {"value": None, "from": "default", "name": ""}
    assert told["sources.ours.config.allowUnfree"]["value"] is True
    assert "hush" not in finished.stdout


def test_config_tells_what_is_odd() -> None:
    assert "# the variable CHANDLERY_COLOUR is no setting" in run("config", CHANDLERY_COLOUR="red").stdout


def test_bad_settings_are_told_in_one_line(file: Path) -> None:
    finished = run("config", "--settings", str(file), CHANDLERY_HOLD="long")
    assert finished.returncode == 1
    assert finished.stderr == "chandlery: hold: 'long' is no number (variable CHANDLERY_HOLD)\n"


def test_the_example_is_a_settings_file_without_settings(tmp_path: Path) -> None:
    example = run("config", "--example").stdout
    assert tomllib.loads(example) == {}
    assert [name for name in Settings.model_fields if name not in example] == []


def test_the_defaults_in_the_example_are_the_defaults(tmp_path: Path) -> None:
    example = tmp_path / "example.toml"
    lines = run("config", "--example").stdout.splitlines()
    first_table = next(number for number, line in enumerate(lines) if line.startswith("#["))
    settings = [line[1:] for line in lines[:first_table] if line.startswith("#") and line[1:2] != " "]
    example.write_text("\n".join(settings))
    assert Settings.load(example).model_dump() == Settings.load().model_dump()
    assert len(settings) > 40


def test_the_examples_of_tables_are_valid(tmp_path: Path) -> None:
    example = tmp_path / "example.toml"
    lines = run("config", "--example").stdout.splitlines()
    first_table = next(number for number, line in enumerate(lines) if line.startswith("#["))
    example.write_text("\n".join(line[1:] for line in lines[first_table:] if line[:2] != "# "))
    settings = Settings.load(example)
    assert settings.sources
    assert settings.profiles
    assert settings.access.users
    assert settings.storage_options


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--log-format=xml", "log_format: 'xml' is none of console or json (option --log-format)"),
        ("--platforms=amd64,arm46", "platforms: 'arm46' is none of amd64 or arm64 (option --platforms)"),
        ("--anonymous=write", "anonymous: 'write' is none of none or read (option --anonymous)"),
        ("--port=0", "port: 0 is too little: 1 is the least (option --port)"),
        ("--source=ours", "(option --source)"),
        ("--storage=bucket", "(option --storage)"),
        ("--users-file=/proc/nowhere", "users_file: /proc/nowhere can't be read"),
        ("--settings=/proc/nowhere", "--settings names /proc/nowhere, which can't be read"),
    ],
)
def test_options_of_serve_are_settings(tmp_path: Path, option: str, told: str) -> None:
    defaults = {"CHANDLERY_SOURCE": SOURCE, "CHANDLERY_DATA_DIR": str(tmp_path)}
    finished = run("serve", option, CHANDLERY_PORT=str(free_port()), **defaults)
    assert finished.returncode == 1
    assert told in finished.stderr


def test_doctor_says_what_is_wrong_and_how_to_mend_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finished = run(
        *("doctor", "--data-dir", str(tmp_path / "file")),
        CHANDLERY_SOURCE="path!/proc/nowhere",
        CHANDLERY_HOST="nowhere.invalid",
        CHANDLERY_COLOUR="red",
        PATH=str(tmp_path),
    )
    assert finished.returncode == 1
    assert finished.stderr == ""
    assert "Traceback" not in finished.stdout
    assert f"failure  data folder  {tmp_path / 'file'} is no folder" in finished.stdout
    assert "to mend it: choose another with data_dir" in finished.stdout
    assert "install Nix" in finished.stdout
    assert "there is no folder /proc/nowhere" in finished.stdout
    assert "warning  settings     the variable CHANDLERY_COLOUR is no setting" in finished.stdout
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]


def test_doctor_for_programs(tmp_path: Path) -> None:
    finished = run("doctor", "--json", CHANDLERY_SOURCE="path!/proc/nowhere", PATH=str(tmp_path))
    assert finished.returncode == 1
    told = json.loads(finished.stdout)
    assert told["ok"] is False
    checks = {each["check"]: each["outcome"] for each in told["checks"]}
    assert checks["nix"]["status"] == "failure"
    assert set(checks["storage"]) == {"text", "status", "remedy"}


def test_doctor_counts_bad_settings_as_a_failure() -> None:
    finished = run("doctor", CHANDLERY_PORT="http")
    assert finished.returncode == 1
    assert finished.stdout.startswith("failure  settings     port: 'http' is no whole number (variable CHAND")
