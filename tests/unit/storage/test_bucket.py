import pytest
from obstore.exceptions import BaseError, GenericError, PermissionDeniedError

from chandlery.errors import SettingsError
from chandlery.storage.bucket import Bucket, Retries

RETRIES = Retries(0, 1.0)


@pytest.mark.parametrize(
    ("text", "bucket"),
    [
        ("s3://images", Bucket("s3", "images")),
        ("s3://images/", Bucket("s3", "images")),
        ("gs://images/some/prefix/", Bucket("gs", "images", "some/prefix")),
        ("az://container/prefix", Bucket("az", "container", "prefix")),
    ],
)
def test_a_bucket_is_a_scheme_a_name_and_a_prefix(text: str, bucket: Bucket) -> None:
    assert Bucket.parse(text) == bucket
    assert Bucket.parse(str(bucket)) == bucket


@pytest.mark.parametrize(
    "text", ["images", "s3:images", "s3://", "s3:///p", "file:///srv", "s3://a//b", "s3://a?b"]
)
def test_anything_else_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="s3://BUCKET/PREFIX"):
        Bucket.parse(text)


HEAD = (
    "Generic S3 error: Error performing PUT https://store.example.com/bucket/key?sig=no-one-sees-me in 1ms - "
)
DEBUG = '\n\nDebug source:\nGeneric { uri: "https://store.example.com/bucket/key?sig=no-one-sees-me", '


def said(error: Exception, scheme: str = "s3") -> str:
    message = str(Bucket(scheme, "images").error(error))
    assert message.startswith(f"{scheme}://images: ")
    assert "no-one-sees-me" not in message
    return message


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            PermissionDeniedError(f"{HEAD}status code: 403 Forbidden: <Code>AccessDenied</Code>{DEBUG}"),
            "AccessDenied",
        ),
        (
            FileNotFoundError(f"{HEAD}status code: 404 Not Found: <Code>NoSuchBucket</Code>{DEBUG}"),
            "no such bucket",
        ),
        (
            GenericError(f"{HEAD}status code: 404 Not Found: <Code>NoSuchBucket</Code>{DEBUG}"),
            "no such bucket",
        ),
        (
            GenericError(f"{HEAD}status code: 503 X: <Code>SlowDown</Code>{DEBUG}"),
            "fewer requests (503 SlowDown)",
        ),
        (
            GenericError(f"{HEAD}status code: 500 Internal Server Error: {DEBUG}"),
            "store.example.com failed (500)",
        ),
        (
            GenericError(f"{HEAD}HTTP error: error sending request{DEBUG}kind: Timeout"),
            "doesn't answer in time",
        ),
        (TimeoutError(), "doesn't answer in time"),
        (
            GenericError(f"{HEAD}HTTP error: error sending request{DEBUG}"),
            "store.example.com can't be reached",
        ),
        (
            GenericError(f"{HEAD}Received redirect without LOCATION, ... configured region{DEBUG}"),
            "set AWS_REGION",
        ),
        (
            GenericError(f"{HEAD}status code: 400 X: <Code>AuthorizationHeaderMalformed</Code>"),
            "set AWS_REGION",
        ),
    ],
)
def test_a_message_says_what_was_wrong_and_no_secret(error: BaseError | OSError, expected: str) -> None:
    assert expected in said(error)


@pytest.mark.parametrize(
    ("scheme", "url", "variable"),
    [
        ("s3", "http://169.254.169.254/latest/api/token", "AWS_ACCESS_KEY_ID"),
        ("gs", "http://metadata.google.internal/computeMetadata", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("az", "http://169.254.169.254/metadata/identity/oauth2/token", "AZURE_STORAGE_ACCOUNT_KEY"),
    ],
)
def test_credentials_that_nobody_gave_are_told(scheme: str, url: str, variable: str) -> None:
    message = said(GenericError(f"Error performing PUT {url} in 1ms - status code: 403 Forbidden"), scheme)
    assert "there are no credentials" in message
    assert variable in message


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("s3", {"virtual_hosted_style_request": "maybe"}),
        ("gs", {"service_account": "/nowhere.json"}),
        ("az", {"account_name": "account", "account_key": "!"}),
        ("az", {"colour": "red"}),
    ],
)
def test_options_that_can_not_be_used_are_told(scheme: str, options: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=f"^{scheme}://images: storage_options and ") as caught:
        Bucket(scheme, "images").connect(options, RETRIES)
    assert "\n" not in str(caught.value)
