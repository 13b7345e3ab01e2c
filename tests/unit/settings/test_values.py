import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.settings.values import dotted, leaves, shown, toml, without_secrets

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]))
SCALARS = st.one_of(TEXTS, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(-1e300, 1e300))
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=8
)


@given(VALUES)
def test_what_is_written_as_toml_is_read_as_the_same(value: Any) -> None:
    assert tomllib.loads(f"x = {toml(value)}") == {"x": value}


@given(st.dictionaries(TEXTS, VALUES, min_size=1))
def test_a_table_can_be_written_value_by_value(table: dict[str, Any]) -> None:
    lines = [f"{dotted(path)} = {toml(value)}" for path, value in leaves(("x",), table)]
    assert tomllib.loads("\n".join(lines)) == {"x": table}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("git!https://token@example.com/a.git!main", "git!https://***@example.com/a.git!main"),
        ("git!https://user:hush@example.com/a", "git!https://***@example.com/a"),
        ("http://us%40er:p@ss:w@example.com/a", "http://***@example.com/a"),
        ("git!ssh://git@example.com/a", "git!ssh://git@example.com/a"),
        ("ssh://git:hush@example.com", "ssh://git:***@example.com"),
        ("git!git@example.com:a.git", "git!git@example.com:a.git"),
        ("https://example.com/?access_token=hush&ref=main", "https://example.com/?access_token=***&ref=main"),
        ("https://a.blob.example/?sv=1&sig=hush", "https://a.blob.example/?sv=1&sig=***"),
        ("https://example.com/@scope/a", "https://example.com/@scope/a"),
        ("two http://a:b@c and https://d@e", "two http://***@c and https://***@e"),
        ("git!https://user:hu/sh?@example.com/a", "git!https://***@example.com/a"),
        ("https://example.com:8080/@scope/a", "https://example.com:8080/@scope/a"),
        ("debian!bookworm", "debian!bookworm"),
    ],
)
def test_passwords_and_tokens_in_urls_are_not_told(text: str, told: str) -> None:
    assert without_secrets(text) == told


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("storage_options", "secret_access_key"), "hush", "***"),
        (("storage_options", "aws_session_token"), "hush", "***"),
        (("storage_options", "account_key"), "hush", "***"),
        (("storage_options", "sas_token"), "hush", "***"),
        (("storage_options", "endpoint"), "http://localhost:9000", "http://localhost:9000"),
        (("storage_options", "region"), "us-east-1", "us-east-1"),
        (("profiles", "web", "environment", "API_KEY"), "hush", "***"),
        (("profiles", "web", "environment", "PASSWORD"), "", ""),
        (("tls_key",), "/etc/tls.key", "/etc/tls.key"),
        (("trusted_public_keys",), ["cache-1:abc="], ["cache-1:abc="]),
        (("substituters",), ["https://u:p@cache.example"], ["https://***@cache.example"]),
        (("port",), 80, 80),
    ],
)
def test_below_a_setting_a_name_tells_what_is_secret(path: tuple[str, ...], value: Any, told: Any) -> None:
    assert shown(path, value) == told
