"""What the settings about access and TLS make."""

from pathlib import Path
from typing import Any

import pytest

from chandlery.access.rules import Rule
from chandlery.errors import SettingsError
from chandlery.server.parts import access_control, certificate, configured_popularity
from chandlery.settings.settings import Settings

# Not a real one: nobody logs in here.
HASH = "$2y$04$" + "." * 53


@pytest.fixture
def users(tmp_path: Path) -> Path:
    file = tmp_path / "users"
    file.write_text(f"alice:{HASH}\n")
    return file


def settings(folder: Path, **options: Any) -> Settings:
    return Settings.load(data_dir=folder, **options)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost", "::ffff:127.0.0.1"])
def test_on_loopback_everybody_may_have_everything(tmp_path: Path, host: str) -> None:
    assert access_control(settings(tmp_path, host=host)) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1", "registry.example.com"])  # noqa: S104
def test_where_other_machines_reach_it_somebody_has_to_say_who_may_pull(
    tmp_path: Path, users: Path, host: str
) -> None:
    with pytest.raises(SettingsError, match=r"users_file.*htpasswd -B.*anonymous = \"read\""):
        access_control(settings(tmp_path, host=host))
    assert access_control(settings(tmp_path, host=host, anonymous="read")) is None
    control = access_control(settings(tmp_path, host=host, users_file=users))
    assert control
    assert control.accounts
    assert not control.accounts.anonymous


def test_everybody_and_users_takes_a_place_for_tokens(tmp_path: Path, users: Path) -> None:
    both = {"users_file": users, "anonymous": "read"}
    with pytest.raises(SettingsError, match="public_url"):
        access_control(settings(tmp_path, **both))
    made = settings(tmp_path, public_url="https://registry.example.com/", **both)
    assert made.public_url == "https://registry.example.com"
    control = access_control(made)
    assert control
    assert control.accounts
    assert control.accounts.anonymous


def test_rules_and_limits_count_without_users(tmp_path: Path) -> None:
    control = access_control(settings(tmp_path, access={"default": {"deny": ["nmap"]}}))
    assert control
    assert control.accounts is None


def test_rules_are_tables_of_the_settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "chandlery.toml"
    file.write_text(
        '[access.default]\nbuilds_per_hour = 9\n[access.users.alice]\nallow = ["git", "python3*"]\n'
    )
    monkeypatch.setenv("CHANDLERY_SETTINGS", str(file))
    assert Settings.load().access.of("alice") == Rule(allow=("git", "python3*"), builds_per_hour=9)
    file.write_text('[access.users.alice]\nalow = ["git"]\n')
    with pytest.raises(SettingsError, match=r"access\.users\.alice\.alow"):
        Settings.load()


def test_the_key_of_tokens_is_the_one_in_the_settings_or_kept_in_the_data_folder(
    tmp_path: Path, users: Path
) -> None:
    access_control(settings(tmp_path, users_file=users))
    assert (tmp_path / "token-key").stat().st_mode & 0o777 == 0o600
    given = tmp_path / "given"
    given.write_bytes(b"x" * 40)
    with pytest.raises(SettingsError, match=f"chmod 600 {given}"):
        access_control(settings(tmp_path, users_file=users, token_key_file=given))


@pytest.mark.parametrize(
    "url", ["registry.example.com", "ftp://host", "https://host/path", 'https://a"b', "https://"]
)
def test_a_public_url_has_a_scheme_and_a_host_and_nothing_else(tmp_path: Path, url: str) -> None:
    with pytest.raises(SettingsError, match=r"public_url: .*without a path"):
        settings(tmp_path, public_url=url)


def test_a_certificate_and_its_key_go_together(tmp_path: Path) -> None:
    assert certificate(settings(tmp_path)) is None
    for name in ("tls_certificate", "tls_key"):
        with pytest.raises(SettingsError, match="go together"):
            certificate(settings(tmp_path, **{name: tmp_path / "file"}))
    assert certificate(settings(tmp_path, tls_certificate=tmp_path / "a", tls_key=tmp_path / "b"))


@pytest.mark.parametrize("content", ["", "<html>", '{"version": 9}'])
async def test_what_is_no_table_of_popularity_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "table.json"
    file.write_text(content)
    with pytest.raises(SettingsError, match=rf"popularity: .*{file}"):
        await configured_popularity(settings(tmp_path, popularity=str(file)))


async def test_a_table_of_popularity_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"popularity: /nowhere/table.json: No such file"):
        await configured_popularity(settings(tmp_path, popularity="/nowhere/table.json"))


async def test_without_a_table_of_popularity_there_is_an_empty_one(tmp_path: Path) -> None:
    assert not await configured_popularity(settings(tmp_path))
