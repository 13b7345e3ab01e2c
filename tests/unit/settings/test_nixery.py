"""Nixery's variables, as its newest version reads them (config/config.go, config/pkgsource.go, storage/)."""

import os
from pathlib import Path
from typing import Any

import pytest

from chandlery.errors import SettingsError
from chandlery.settings.places import DEFAULT, Origin
from chandlery.settings.settings import Settings

ALL = (
    *("PORT", "NIXERY_CHANNEL", "NIXERY_PKGS_REPO", "NIXERY_PKGS_PATH", "NIXERY_STORAGE_BACKEND"),
    *("STORAGE_PATH", "GCS_BUCKET", "S3_BUCKET", "S3_USE_PRESIGNED_URLS", "NIX_TIMEOUT"),
    *("NIX_POPULARITY_URL", "WEB_DIR"),
)


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("CHANDLERY_") or name in ALL:
            monkeypatch.delenv(name)


def load(monkeypatch: pytest.MonkeyPatch, variables: str, **options: Any) -> Settings:
    """Load settings with variables that are written as a shell takes them: `A=1 B=2`."""
    for each in variables.split():
        name, _, value = each.partition("=")
        monkeypatch.setenv(name, value)
    return Settings.load(**options)


@pytest.mark.parametrize(
    ("variables", "setting", "value", "variable"),
    [
        ("NIXERY_CHANNEL=nixos-24.05", "source", "nixpkgs!nixos-24.05", "NIXERY_CHANNEL"),
        ("NIXERY_PKGS_REPO=git@host:a.git", "source", "git!git@host:a.git", "NIXERY_PKGS_REPO"),
        ("NIXERY_PKGS_PATH=/srv/set", "source", "path!/srv/set", "NIXERY_PKGS_PATH"),
        # The order in which Nixery looks for them.
        ("NIXERY_PKGS_PATH=/a NIXERY_PKGS_REPO=b NIXERY_CHANNEL=c", "source", "nixpkgs!c", "NIXERY_CHANNEL"),
        ("NIXERY_PKGS_PATH=/a NIXERY_PKGS_REPO=b", "source", "git!b", "NIXERY_PKGS_REPO"),
        ("NIXERY_CHANNEL= NIXERY_PKGS_PATH=/a", "source", "path!/a", "NIXERY_PKGS_PATH"),
        ("NIXERY_CHANNEL=c PORT=99", "port", 99, "PORT"),
        ("NIXERY_CHANNEL=c", "host", "0.0.0.0", "NIXERY_CHANNEL"),  # noqa: S104
        ("NIXERY_CHANNEL=c", "anonymous", "read", "NIXERY_CHANNEL"),
        ("NIXERY_CHANNEL=c NIX_TIMEOUT=90", "builder_timeout", 90, "NIX_TIMEOUT"),
        ("NIXERY_CHANNEL=c NIX_POPULARITY_URL=http://x", "popularity", "http://x", "NIX_POPULARITY_URL"),
        (
            "NIXERY_STORAGE_BACKEND=filesystem STORAGE_PATH=/var/nixery",
            "data_dir",
            Path("/var/nixery/chandlery"),
            "STORAGE_PATH",
        ),
        ("NIXERY_STORAGE_BACKEND=gcs GCS_BUCKET=images", "storage", "gs://images", "GCS_BUCKET"),
        ("NIXERY_STORAGE_BACKEND=s3 S3_BUCKET=images", "storage", "s3://images", "S3_BUCKET"),
        (
            "NIXERY_STORAGE_BACKEND=s3 S3_BUCKET=images S3_USE_PRESIGNED_URLS=false",
            "storage_redirects",
            False,
            "S3_USE_PRESIGNED_URLS",
        ),
    ],
)
def test_a_variable_means_what_it_means_to_nixery(
    monkeypatch: pytest.MonkeyPatch, variables: str, setting: str, value: object, variable: str
) -> None:
    settings = load(monkeypatch, variables)
    assert getattr(settings, setting) == value
    assert settings.origin(setting) == Origin("nixery", variable)


@pytest.mark.parametrize(
    ("variables", "setting"),
    [
        # Of many programs, and of platforms that run them.
        ("PORT=99 NIX_TIMEOUT=60 STORAGE_PATH=/x S3_BUCKET=x GCS_BUCKET=x", "port"),
        ("PORT=99 NIX_TIMEOUT=60 STORAGE_PATH=/x S3_BUCKET=x GCS_BUCKET=x", "storage"),
        ("PORT=99", "host"),
        # Of a storage that isn't chosen.
        ("NIXERY_STORAGE_BACKEND=s3 S3_BUCKET=x STORAGE_PATH=/x", "data_dir"),
        ("NIXERY_STORAGE_BACKEND=s3 S3_BUCKET=x S3_USE_PRESIGNED_URLS=no", "storage_redirects"),
    ],
)
def test_what_nixery_would_not_read_is_not_read(
    monkeypatch: pytest.MonkeyPatch, variables: str, setting: str
) -> None:
    assert load(monkeypatch, variables).origin(setting) == DEFAULT


def test_chandlerys_own_settings_win(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "chandlery.toml"
    file.write_text('data_dir = "/data"\nanonymous = "none"\n')
    settings = load(
        monkeypatch,
        f"CHANDLERY_SETTINGS={file} NIXERY_CHANNEL=c CHANDLERY_SOURCE=path!/a PORT=99 "
        "NIXERY_STORAGE_BACKEND=filesystem STORAGE_PATH=/b",
        port=100,
    )
    assert (settings.source, settings.data_dir, settings.port) == ("path!/a", Path("/data"), 100)
    assert settings.anonymous == "none"


def test_who_names_users_is_not_open_to_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, "NIXERY_CHANNEL=c CHANDLERY_USERS_FILE=/etc/users")
    assert settings.anonymous == "none"
    assert settings.host == "0.0.0.0"  # noqa: S104


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ("NIXERY_STORAGE_BACKEND=azure", "NIXERY_STORAGE_BACKEND: 'azure' is none of filesystem, gcs, s3"),
        (
            "NIXERY_STORAGE_BACKEND=filesystem",
            "NIXERY_STORAGE_BACKEND is filesystem, and STORAGE_PATH isn't set: set it, or data_dir instead "
            "of both",
        ),
        (
            "NIXERY_STORAGE_BACKEND=gcs",
            "NIXERY_STORAGE_BACKEND is gcs, and GCS_BUCKET isn't set: set it, or storage instead of both",
        ),
        (
            "NIXERY_STORAGE_BACKEND=s3",
            "NIXERY_STORAGE_BACKEND is s3, and S3_BUCKET isn't set: set it, or storage instead of both",
        ),
        ("NIXERY_CHANNEL=c PORT=http", "port: 'http' is no whole number (Nixery's variable PORT)"),
        (
            "NIXERY_CHANNEL=c NIX_TIMEOUT=1m",
            "builder_timeout: '1m' is no whole number (Nixery's variable NIX_TIMEOUT)",
        ),
    ],
)
def test_what_is_wrong_is_told_by_nixerys_name(
    monkeypatch: pytest.MonkeyPatch, variables: str, told: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load(monkeypatch, variables)
    assert str(caught.value) == told


def test_a_storage_that_is_said_otherwise_needs_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, "NIXERY_STORAGE_BACKEND=filesystem", data_dir=Path("/data"))
    assert settings.data_dir == Path("/data")


def test_what_comes_of_the_variables_and_what_does_not_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(monkeypatch, "PORT=99 WEB_DIR=/web").notices == ()
    told = "; ".join(load(monkeypatch, "NIXERY_CHANNEL=c WEB_DIR=/web").notices)
    assert "since NIXERY_CHANNEL is set" in told
    assert "listens at 0.0.0.0, and anonymous is 'read'" in told
    assert "WEB_DIR means nothing here" in told
