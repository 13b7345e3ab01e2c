import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chandlery.errors import SettingsError
from chandlery.settings.places import DEFAULT, Origin
from chandlery.settings.settings import Settings

WriteFile = Callable[[str], Path]


@pytest.fixture
def settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteFile:
    """Return a function that writes the settings file."""

    def write(content: str) -> Path:
        file = tmp_path / "chandlery.toml"
        file.write_text(content)
        monkeypatch.setenv("CHANDLERY_SETTINGS", str(file))
        return file

    return write


def test_what_is_said_nowhere_has_a_default() -> None:
    settings = Settings.load()
    assert (settings.host, settings.port) == ("127.0.0.1", 8080)
    assert settings.source == "debian!trixie"


def test_an_option_wins_over_the_environment_and_that_over_the_file(
    settings_file: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_file("port = 1001\nmax_layers = 11\nparallel_builds = 1\n")
    monkeypatch.setenv("CHANDLERY_PORT", "1002")
    monkeypatch.setenv("CHANDLERY_MAX_LAYERS", "12")
    settings = Settings.load(port=1003)
    assert (settings.port, settings.max_layers, settings.parallel_builds) == (1003, 12, 1)


def test_an_option_that_was_not_given_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHANDLERY_PORT", "1002")
    assert Settings.load(port=None).port == 1002


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("port", "0"),
        ("port", "65536"),
        ("port", "http"),
        ("max_layers", "1"),
        ("max_layers", "127"),
        ("build_timeout", "0"),
        ("failure_memory", "-1"),
        ("parallel_builds", "0"),
        ("nix_store", "mine"),
        ("log_format", "xml"),
        ("metrics_networks", '["everybody"]'),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_setting(
    monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    monkeypatch.setenv(f"CHANDLERY_{key.upper()}", value)
    with pytest.raises(SettingsError, match=key):
        Settings.load()


@pytest.mark.parametrize(
    ("key", "choices"), [("compression", "none, gzip, zstd"), ("layer_strategy", "largest-alone")]
)
def test_where_there_is_a_choice_the_error_names_it(
    monkeypatch: pytest.MonkeyPatch, key: str, choices: str
) -> None:
    monkeypatch.setenv(f"CHANDLERY_{key.upper()}", "other")
    with pytest.raises(SettingsError, match=f"{key}: .*{choices}"):
        Settings.load()


def test_all_bad_values_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHANDLERY_PORT", "0")
    with pytest.raises(SettingsError, match=r"port.*; .*|.*; .*port") as caught:
        Settings.load(max_layers=1)
    assert "max_layers" in str(caught.value)
    assert "\n" not in str(caught.value)


def complaint(**options: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        Settings.load(**options)
    assert caught.value.__cause__ is None, "it would be shown with all values"
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("prot = 80", "prot: there is no such setting: did you mean port?"),
        ("data-dir = '/data'", "data-dir: there is no such setting: did you mean data_dir?"),
        ("favourite_colour = 1", "favourite_colour: there is no such setting"),
        ("port = 'abc'", "port: 'abc' is no whole number"),
        ("port = 80.5", "port: 80.5 is no whole number"),
        ("port = 0", "port: 0 is too little: 1 is the least"),
        ("port = 65536", "port: 65536 is too much: 65535 is the most"),
        ("disk_limit = true", "disk_limit: true is no number"),
        ("hold = 'long'", "hold: 'long' is no number"),
        ("hold = 0", "hold: 0 is too little: it must be more than 0"),
        ("traces = 'perhaps'", "traces: 'perhaps' is neither true nor false"),
        ("host = 3", "host: 3 is no text: write it in quotes"),
        ("data_dir = 3", "data_dir: 3 is no path: write it in quotes"),
        ("log_format = 'xml'", "log_format: 'xml' is none of console or json"),
        ("trusted_proxies = '::1'", "trusted_proxies: '::1' is no list: write it in brackets, as ['::1']"),
        ("sources = 3", "sources: 3 is no table"),
        ("access = 'all'", "access: 'all' is no table"),
        ("platforms = ['arm46']", "platforms: 'arm46' is none of amd64 or arm64"),
        ("public_url = 'x'", "public_url: write it as https://registry.example.com, without a path"),
        (
            "nixpkgs_channel_url = 'https://x'",
            "nixpkgs_channel_url: write {channel} where it belongs in the address",
        ),
        ("[sources.ours]\ntags = ['a']", "sources.ours.from: it has to be there"),
        (
            "[sources.ours]\nfrom = 'git!x'\ntag = 1",
            "sources.ours.tag: there is no such key: did you mean tags?",
        ),
        ("[sources.ours]\nfrom = 'git!x'\nrefresh = 'often'", "sources.ours.refresh: 'often' is no number"),
        (
            "[sources.ours]\nfrom = 'git!x'\noverlays = ['/proc/nowhere']",
            "sources.ours.overlays: there is no file or folder /proc/nowhere",
        ),
        ("[sources]\nours = 3", "sources.ours: 3 is no table"),
        (
            "[sources]\nOurs = 'git!x'",
            "sources.Ours: no image name can begin so: its parts hold a-z and 0-9, with single . or _ or any "
            "number of - between them",
        ),
        (
            "[sources]\narm64 = 'git!x'",
            "sources.arm64: in image names this is a platform: choose another name",
        ),
        ("[profiles.amd64]", "profiles.amd64: in image names this is a platform: choose another name"),
        (
            "[profiles.web]\npakages = []",
            "profiles.web.pakages: there is no such key: did you mean packages?",
        ),
        (
            "[profiles.web]\nuser = 'bob'",
            "profiles.web: user 'bob': write root, nobody, nonroot, UID or UID:GID",
        ),
        (
            "[access.users.'a@b']\nalow = []",
            'access.users."a@b".alow: there is no such key: did you mean allow?',
        ),
        (
            "[profiles.web]\n[sources]\nweb = 'git!x'",
            "sources.web: a profile has this name too, and image names can't tell them apart",
        ),
        (
            "[sources]\nshell = 'git!x'",
            "sources.shell: a profile has this name too, and image names can't tell them apart",
        ),
        (
            "source = 'our'\n[sources]\nours = 'git!x'",
            "source: 'our' is neither a package set, as debian!<suite> is, nor one of sources: did you mean "
            "ours?",
        ),
    ],
    ids=lambda value: value.replace("\n", " ")[:40],
)
def test_what_is_wrong_is_told_by_its_full_name(settings_file: WriteFile, line: str, told: str) -> None:
    file = settings_file(line)
    assert complaint() == f"{told} (file {file})"


def test_a_key_like_no_other_is_told_with_those_that_there_are(settings_file: WriteFile) -> None:
    settings_file("[sources.ours]\nfrom = 'git!x'\nbranch = 'main'\n")
    known = "config, from, overlays, platforms, refresh, tags"
    assert complaint().startswith(f"sources.ours.branch: there is no such key: there are {known} (file")


def test_an_error_names_the_place_that_its_value_is_from(
    settings_file: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = settings_file("port = 0\nhold = 0\nmax_layers = 0\n")
    monkeypatch.setenv("CHANDLERY_HOLD", "-1")
    monkeypatch.setenv("NIXERY_CHANNEL", "nixos-unstable")
    monkeypatch.setenv("NIX_TIMEOUT", "soon")
    told = complaint(max_layers=1, metrics_networks=("everybody",))
    assert "port: 0 is too little: 1 is the least (file" in told
    assert str(file) in told
    assert "hold: '-1'" in told or "hold: -1" in told
    assert "(variable CHANDLERY_HOLD)" in told
    assert "(option --max-layers)" in told
    assert "'everybody' does not appear to be an IPv4 or IPv6 network (option --metrics-networks)" in told
    assert "builder_timeout: 'soon' is no whole number (Nixery's variable NIX_TIMEOUT)" in told


@pytest.mark.parametrize(
    ("line", "secret"),
    [
        ("port = 'https://user:hush@example.com'", "hush"),
        ("port = 'https://hush@example.com'", "hush"),
        ("port = 'ssh://git:hush@example.com'", "hush"),
        ("port = 'https://example.com/?token=hush'", "hush"),
        ("[storage_options]\nsecret_access_key = ['hush']", "hush"),
        ("[sources.ours]\nfrom = 'git!https://hush:x-oauth-basic@example.com'\nconfig = 3", "hush"),
        ("source = 'https://user:hush@example.com'", "hush"),
        ("public_url = 'https://user:hush@example.com/path'", "hush"),
    ],
)
def test_no_error_repeats_a_secret(settings_file: WriteFile, line: str, secret: str) -> None:
    settings_file(line)
    assert secret not in complaint()


def test_a_file_that_is_not_toml_is_named(settings_file: WriteFile) -> None:
    file = settings_file("port 80\n")
    with pytest.raises(SettingsError, match=str(file)):
        Settings.load()


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHANDLERY_SETTINGS", str(tmp_path / "missing.toml"))
    with pytest.raises(SettingsError, match=r"CHANDLERY_SETTINGS names .*missing\.toml"):
        Settings.load()


def test_a_variable_that_is_no_setting_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHANDLERY_TEST_DATA", "something of the tests")
    assert Settings.load()


def test_the_data_folder_is_absolute_so_that_nix_and_workers_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert Settings.load(data_dir=Path("data")).data_dir == tmp_path / "data"
    assert Settings.load(data_dir=Path("~/data")).data_dir == Path("/home/somebody/data")


def test_root_keeps_its_data_where_services_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert Settings.load().data_dir == Path("/var/lib/chandlery")


def test_a_user_keeps_the_data_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert Settings.load().data_dir == Path("/home/somebody/.local/share/chandlery")
    monkeypatch.setenv("XDG_DATA_HOME", "/elsewhere")
    assert Settings.load().data_dir == Path("/elsewhere/chandlery")


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
def test_traces_are_made_where_a_collector_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert not Settings.load().traces
    monkeypatch.setenv(name, "http://127.0.0.1:4318")
    assert Settings.load().traces
    monkeypatch.setenv("CHANDLERY_TRACES", "false")
    assert not Settings.load().traces


def test_a_mistyped_variable_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHANDLERY_DISK_LIMITS", "1")
    monkeypatch.setenv("CHANDLERY_DISK_LIMIT", "1")
    monkeypatch.setenv("CHANDLERY_SOURCES__OURS", "git!x")
    monkeypatch.setenv("CHANDLERY_COLOUR", "red")
    assert Settings.load().notices == (
        "the variable CHANDLERY_COLOUR is no setting",
        "the variable CHANDLERY_DISK_LIMITS is no setting: did you mean CHANDLERY_DISK_LIMIT?",
        "the variable CHANDLERY_SOURCES__OURS is no setting: write CHANDLERY_SOURCES as JSON",
    )


def test_a_proxy_that_is_not_trusted_is_noticed(tmp_path: Path) -> None:
    behind: dict[str, Any] = {"public_url": "https://registry.example.com"}
    (notice,) = Settings.load(**behind).notices
    assert "https://registry.example.com" in notice
    assert "set trusted_proxies to the proxy's address" in notice
    assert Settings.load(**behind, trusted_proxies=["127.0.0.1"]).notices == ()
    # Whoever encrypts itself may have no proxy, and without TLS there may be none either.
    certificate = {"tls_certificate": tmp_path / "pem", "tls_key": tmp_path / "pem"}
    assert Settings.load(**behind, **certificate).notices == ()
    assert Settings.load(public_url="http://registry:8080").notices == ()


def test_a_service_of_kubernetes_that_is_called_chandlery_harms_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CHANDLERY_SERVICE_HOST", "10.0.0.7")
    monkeypatch.setenv("CHANDLERY_SERVICE_PORT_HTTP", "80")
    monkeypatch.setenv("CHANDLERY_PORT_80_TCP_ADDR", "10.0.0.7")
    assert Settings.load().notices == ()
    monkeypatch.setenv("CHANDLERY_PORT", "tcp://10.0.0.7:80")
    settings = Settings.load()
    assert settings.port == 8080
    assert settings.origin("port") == DEFAULT
    assert "Kubernetes" in settings.notices[0]


# environment variables


@pytest.mark.parametrize("text", ["amd64,arm64", " amd64 , arm64 ", '["amd64", "arm64"]'])
def test_a_list_is_written_with_commas_or_as_json(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CHANDLERY_PLATFORMS", text)
    monkeypatch.setenv("CHANDLERY_SUBSTITUTERS", text)
    settings = Settings.load()
    assert settings.platforms == ("amd64", "arm64")
    assert settings.substituters == ("amd64", "arm64")


def test_a_table_is_written_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHANDLERY_SOURCES", '{"ours": "git!x", "theirs": {"from": "git!y", "tags": ["*"]}}')
    sources = Settings.load().sources
    assert {name: each.location for name, each in sources.items()} == {"ours": "git!x", "theirs": "git!y"}
    monkeypatch.setenv("CHANDLERY_SOURCES", "ours=git!https://user:hush@x")
    told = "sources: write it as JSON, or in the settings file (variable CHANDLERY_SOURCES)"
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    assert str(caught.value) == told


def test_an_empty_variable_is_as_if_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PORT", "USERS_FILE", "SOURCES", "PLATFORMS"):
        monkeypatch.setenv(f"CHANDLERY_{name}", "")
    settings = Settings.load()
    assert (settings.port, settings.users_file, settings.sources, settings.platforms) == (8080, None, {}, ())


# where settings are from


def test_the_origin_of_each_value_is_known(settings_file: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    file = settings_file(
        "port = 1001\nhold = 5\n[sources.ours]\nfrom = 'git!x'\ntags = ['*']\n[sources]\ntheirs = 'git!y'\n"
    )
    monkeypatch.setenv("CHANDLERY_HOLD", "6")
    monkeypatch.setenv("CHANDLERY_SOURCES", '{"ours": {"from": "git!z"}}')
    monkeypatch.setenv("NIXERY_PKGS_REPO", "https://example.com/packages")
    monkeypatch.setenv("PORT", "1004")
    settings = Settings.load(max_layers=12)
    assert settings.sources["ours"].location == "git!z"
    assert settings.sources["ours"].tags == ("*",)
    in_file, variable = Origin("file", str(file)), Origin("variable", "CHANDLERY_SOURCES")
    expected = {
        ("port",): in_file,
        ("hold",): Origin("variable", "CHANDLERY_HOLD"),
        ("max_layers",): Origin("option", "--max-layers"),
        ("source",): Origin("nixery", "NIXERY_PKGS_REPO"),
        ("sources", "ours", "from"): variable,
        ("sources", "ours", "tags"): in_file,
        ("sources", "theirs", "from"): in_file,
        ("scrub_rate",): DEFAULT,
    }
    found = {each.path: each.origin for each in settings.in_force()}
    assert {path: found[path] for path in expected} == expected
    assert {path[0] for path in found} == set(Settings.model_fields)


def test_the_file_that_an_option_names_counts_instead_of_the_variable(
    settings_file: WriteFile, tmp_path: Path
) -> None:
    settings_file("port = 1001\nhold = 5\n")
    other = tmp_path / "other.toml"
    other.write_text("port = 1002\n")
    settings = Settings.load(other)
    assert (settings.port, settings.hold) == (1002, 25)
    with pytest.raises(SettingsError, match=r"--settings names .*gone\.toml"):
        Settings.load(tmp_path / "gone.toml")


def test_origins_and_notices_reach_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHANDLERY_COLOUR", "red")
    copied = pickle.loads(pickle.dumps(Settings.load(port=1003)))  # noqa: S301
    assert copied.origin("port") == Origin("option", "--port")
    assert len(copied.notices) == 1


def test_the_defaults_are_what_nobody_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHANDLERY_PORT", "1")
    assert Settings.defaults()["port"] == 8080
    assert json.dumps(Settings.defaults())


def test_the_readme_tells_of_every_setting() -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    assert [name for name in Settings.model_fields if f"`{name}`" not in readme] == []


def test_every_setting_says_what_it_is() -> None:
    assert all(field.description for field in Settings.model_fields.values())
