"""Where an object store keeps blobs, how to reach it, and what its errors mean.

    s3://bucket/prefix      S3, and everything that speaks it: `storage_options` has its endpoint
    gs://bucket/prefix      Google Cloud Storage
    az://container/prefix   Azure Blob Storage

Credentials come from where obstore looks for them: AWS_*, GOOGLE_* and AZURE_* variables, or what the cloud
gives its own machines. What obstore says of an error may hold signatures and requests, so none of it is
repeated but a status, a code and a host.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import AzureStore, GCSStore, S3Store

from chandlery.errors import SettingsError, StorageError

Connection = S3Store | GCSStore | AzureStore

_BUCKET = re.compile(r"(s3|gs|az)://([^/?#\s]+)((?:/[^/?#\s]+)*)/?")

_STORES: Mapping[str, type[Any]] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}

# No limit to a whole request, as a blob may be large and its client slow; but to each silence.
_OPTIONS = {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "24h"}
_S3_OPTIONS = {
    # The endpoint says whether it is encrypted, and the operator has written it.
    "allow_http": "true",
    # Not every store that speaks S3 can delete many at once, and it takes a hash that some want otherwise.
    "disable_bulk_delete": "true",
}

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_HOST = re.compile(r"Error performing \w+ https?://([^/?\s]+)")
# Where a cloud gives credentials to its own machines; elsewhere nobody answers.
_CLOUD_CREDENTIALS = re.compile(r"//(169\.254\.|metadata\.google)")


@dataclass(frozen=True, slots=True)
class Retries:
    """How often a request is tried again that failed by no fault of its own, and for how many seconds."""

    most: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket, and the prefix of all keys in it; without a slash at its ends."""

    scheme: str
    name: str
    prefix: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a bucket from the settings; `ValueError` if it is none."""
        match = _BUCKET.fullmatch(text)
        if match is None:
            raise ValueError("write it as s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX")
        return cls(match[1], match[2], match[3].strip("/"))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.name}" + (f"/{self.prefix}" if self.prefix else "")

    def connect(self, options: Mapping[str, str], retries: Retries) -> Connection:
        """Return what speaks to the bucket, without asking it anything; `SettingsError` about the options."""
        config = _OPTIONS | (_S3_OPTIONS if self.scheme == "s3" else {}) | dict(options)
        backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=3)}
        retry = {
            "max_retries": retries.most,
            "retry_timeout": timedelta(seconds=retries.seconds),
            "backoff": backoff,
        }
        try:
            store: Connection = _STORES[self.scheme](
                self.name, prefix=self.prefix or None, config=config, retry_config=retry
            )
        except (BaseError, ValueError) as error:
            said = str(error).partition("\n")[0]
            raise SettingsError(f"{self}: storage_options and {_CREDENTIALS[self.scheme]}: {said}") from None
        return store

    def error(self, error: Exception) -> StorageError:
        """Say what went wrong, and what to do."""
        return StorageError(f"{self}: {self._reason(error)}")

    def _reason(self, error: Exception) -> str:
        text = str(error)
        status = int(found[1]) if (found := _STATUS.search(text)) else 0
        code = found[1] if (found := _CODE.search(text)) else ""
        said = " ".join(filter(None, (str(status or ""), code)))
        host = found[1] if (found := _HOST.search(text)) else "its endpoint"
        credentials = f"{_CREDENTIALS[self.scheme]}, or storage_options"
        if _CLOUD_CREDENTIALS.search(text):
            return f"there are no credentials: set {credentials}"
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in (401, 403):
            return (
                f"{host} refuses these credentials, or what is done with them ({said}): see {credentials}; "
                "they must be good for reading, writing, deleting and listing"
            )
        if isinstance(error, FileNotFoundError) or status == 404:
            return f"there is no such bucket at {host}: make it, or name another in storage"
        if "configured region" in text or "region" in code.lower() or code == "AuthorizationHeaderMalformed":
            return (
                f"{host} is not for the region of this bucket: set AWS_REGION, or region in storage_options"
            )
        if status in (429, 503):
            return f"{host} asks for fewer requests ({said}): pull again in a moment"
        if isinstance(error, TimeoutError) or "kind: Timeout" in text:
            return f"{host} doesn't answer in time: pull again in a moment"
        if status:
            return f"{host} failed ({said}): its own log may say why"
        return f"{host} can't be reached, or broke off: see that it runs, and endpoint in storage_options"
