"""A small OCI client: pulls an image into a folder and believes nothing that its digest doesn't prove."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec

from chandlery.errors import ChandleryError, InvalidDigestError
from chandlery.oci.digest import Digest
from chandlery.oci.documents import DOCKER_MANIFEST, OCI_MANIFEST

_ACCEPT = f"{OCI_MANIFEST}, {DOCKER_MANIFEST}"


class PullError(ChandleryError):
    """A registry did not give an image, or gave something else than it said."""


@dataclass(frozen=True, slots=True)
class PulledImage:
    """An image in a folder: its config, and its layers' files, the lowest first; sizes in bytes."""

    digest: Digest
    config: dict[str, Any]
    layers: tuple[Path, ...]
    downloaded: int

    @property
    def size(self) -> int:
        """The size of all layers together."""
        return sum(layer.stat().st_size for layer in self.layers)


def pull(registry: str, name: str, reference: str, folder: Path, timeout: float) -> PulledImage:
    """Pull `name` from the registry at a URL; blobs that `folder` has already are not fetched again.

    The first answer may take as long as the image takes to build, at most `timeout` seconds. Raises
    `PullError`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = f"{registry.rstrip('/')}/v2/{name}"
    try:
        with httpx.Client(timeout=httpx.Timeout(60.0, read=timeout), follow_redirects=True) as client:
            content, announced = _manifest(client, f"{base}/manifests/{reference}")
            manifest = msgspec.json.decode(content, type=dict[str, Any])
            downloaded = 0
            for descriptor in (manifest["config"], *manifest["layers"]):
                downloaded += _blob(client, base, descriptor, folder)
    except httpx.HTTPError as error:
        raise PullError(f"{name}: {error or type(error).__name__}") from error
    files = {descriptor["digest"]: _file(folder, descriptor) for descriptor in manifest["layers"]}
    config = msgspec.json.decode(_file(folder, manifest["config"]).read_bytes(), type=dict[str, Any])
    return PulledImage(
        announced, config, tuple(files[each["digest"]] for each in manifest["layers"]), downloaded
    )


def _manifest(client: httpx.Client, url: str) -> tuple[bytes, Digest]:
    response = client.get(url, headers={"accept": _ACCEPT})
    if response.is_error:
        raise PullError(f"{url}: {_reason(response)}")
    announced = _parse(response.headers.get("docker-content-digest", ""))
    if Digest.of(response.content) != announced:
        raise PullError(f"{url}: the manifest is not what its digest {announced} says")
    return response.content, announced


def _blob(client: httpx.Client, base: str, descriptor: dict[str, Any], folder: Path) -> int:
    """Fetch one blob unless it is there; give how many bytes were fetched."""
    file = _file(folder, descriptor)
    if file.exists():
        return 0
    aside = file.with_suffix(".part")
    state = hashlib.sha256()
    with client.stream("GET", f"{base}/blobs/{descriptor['digest']}") as response, aside.open("wb") as out:
        if response.is_error:
            response.read()
            raise PullError(f"blob {descriptor['digest']}: {_reason(response)}")
        for piece in response.iter_raw():
            state.update(piece)
            out.write(piece)
    size = aside.stat().st_size
    if f"sha256:{state.hexdigest()}" != descriptor["digest"] or size != descriptor["size"]:
        raise PullError(f"blob {descriptor['digest']} is not what its digest and size say")
    aside.rename(file)
    return size


def _file(folder: Path, descriptor: dict[str, Any]) -> Path:
    return folder / _parse(descriptor["digest"]).hex


def _parse(text: str) -> Digest:
    try:
        return Digest.parse(text)
    except InvalidDigestError as error:
        raise PullError(f"the registry sent {text!r} as a digest") from error


def _reason(response: httpx.Response) -> str:
    """Return the message of an OCI error body (distribution-spec, "Error Codes"), or the status."""
    try:
        return "; ".join(str(each["message"]) for each in response.json()["errors"])
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}"
