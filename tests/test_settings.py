import os
from collections.abc import Callable
from pathlib import Path

import pytest

from chandlery.errors import SettingsError
from chandlery.settings import Settings

WriteFile = Callable[[str], Path]


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("CHANDLERY_", "OTEL_")):
            monkeypatch.delenv(name)


@pytest.fixture
def settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteFile:
    """Give a function that writes the settings file."""

    def write(content: str) -> Path:
        file = tmp_path / "chandlery.toml"
        file.write_text(content)
        monkeypatch.setenv("CHANDLERY_SETTINGS", str(file))
        return file

    return write


def test_what_is_said_nowhere_has_a_default() -> None:
    settings = Settings.load()
    assert (settings.host, settings.port) == ("127.0.0.1", 8080)
    assert settings.source == "debian!bookworm"


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
def test_where_there_is_a_choice_the_error_names_it(key: str, choices: str) -> None:
    with pytest.raises(SettingsError, match=f"{key}: .*{choices}"):
        Settings.load(**{key: "other"})


def test_all_bad_values_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHANDLERY_PORT", "0")
    with pytest.raises(SettingsError, match=r"port.*; .*|.*; .*port") as caught:
        Settings.load(max_layers=1)
    assert "max_layers" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_of_the_file_that_is_no_setting_is_refused(settings_file: WriteFile) -> None:
    settings_file("prot = 80\n")
    with pytest.raises(SettingsError, match="prot"):
        Settings.load()


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
    assert Settings.unknown_variables() == ["CHANDLERY_DISK_LIMITS"]


def test_the_readme_tells_of_every_setting() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert [name for name in Settings.model_fields if f"`{name}`" not in readme] == []


def test_every_setting_says_what_it_is() -> None:
    assert all(field.description for field in Settings.model_fields.values())
