"""Access rules at the API, as clients meet them who write a name in another way."""

from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import bcrypt
import httpx
import pytest
from starlette.applications import Starlette

from chandlery.access.control import AccessControl, Accounts
from chandlery.access.public_address import PublicAddress
from chandlery.access.rules import AccessRules
from chandlery.access.tokens import Tokens
from chandlery.access.users import Users
from chandlery.maintenance.repaired_blobs import RepairedBlobs
from chandlery.registry.api import Access, routes
from chandlery.registry.waiting import WaitPolicy
from chandlery.sources.debian.source import DebianSource
from chandlery.sources.package_source import PackageSource
from tests.support.debian_packages import PACKAGES, Deb
from tests.support.debian_repository import SUITE, debian_repository
from tests.support.nix_package_set import requires_nix
from tests.support.workshop import NAME_PREFIXES, Workshop, opened

pytestmark = requires_nix

INDEX = {"accept": "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json"}
OTHER = "trixie"


class Registry:
    """A registry of one source; `alice` may have everything, and `bob` what the rule of a test says."""

    def __init__(self, client: httpx.AsyncClient, shop: Workshop) -> None:
        self._client = client
        self.shop = shop

    async def get(self, user: str, path: str) -> httpx.Response:
        password = b64encode(f"{user}:{user}".encode()).decode()
        headers = {**INDEX, "authorization": f"Basic {password}"}
        return await self._client.get(f"/v2/{path}", headers=headers, follow_redirects=True)

    async def status(self, user: str, path: str) -> int:
        return (await self.get(user, path)).status_code

    async def tags(self, user: str, name: str) -> set[str]:
        response = await self.get(user, f"{name}/tags/list")
        assert response.status_code == 200, response.text
        return set(response.json()["tags"])


@asynccontextmanager
async def registry(folder: Path, rule: Any, source: PackageSource | None = None) -> AsyncIterator[Registry]:
    users = folder / "users"
    hashes = {name: bcrypt.hashpw(name.encode(), bcrypt.gensalt(4)).decode() for name in ("alice", "bob")}
    users.write_text("".join(f"{name}:{hashed}\n" for name, hashed in hashes.items()))
    rules = AccessRules.model_validate({"users": {"bob": rule}})
    accounts = Accounts(Users(users), Tokens(b"k" * 32, 600))
    text = source.text if source else "path!set"
    control = AccessControl(rules, {"": (text,)}, PublicAddress(""), accounts)
    async with opened(folder, source=source) as shop, shop.leases.lease() as lease:
        blobs = RepairedBlobs(shop.stores, shop.images, lease)
        access = Access(WaitPolicy(hold=60), control)
        app = Starlette(routes=routes(shop.images, blobs, NAME_PREFIXES, access))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://registry", timeout=600) as client:
            yield Registry(client, shop)


async def everything_of(registry: Registry, name: str) -> list[str]:
    """Return the path of every manifest, config and layer of a name, and of its index."""
    response = await registry.get("alice", f"{name}/manifests/latest")
    assert response.status_code == 200, response.text
    paths: list[str] = []
    pending = [response]
    while pending:
        found = pending.pop()
        paths.append(f"{name}/manifests/{found.headers['docker-content-digest']}")
        document = found.json()
        listed = [f"{name}/manifests/{each['digest']}" for each in document.get("manifests", ())]
        pending += [await registry.get("alice", path) for path in listed]
        blobs = [*document.get("layers", ()), *filter(None, [document.get("config")])]
        paths += [f"{name}/blobs/{each['digest']}" for each in blobs]
    return paths


@pytest.mark.parametrize(
    ("deny", "allowed", "spellings"),
    [
        (["library"], ["application"], ["library", "library.out", "library.dev", "library.dev.out"]),
        (["tools.*", "capital"], ["hello.out"], ["tools.wrench", "tools.wrench.out", "capital.out"]),
    ],
)
async def test_a_denied_package_of_a_package_set(
    tmp_path: Path, deny: list[str], allowed: list[str], spellings: list[str]
) -> None:
    async with registry(tmp_path, {"deny": deny}) as served:
        await denies(served, spellings)
        for name in allowed:
            await allows(served, name)


async def test_a_denied_package_of_debian(tmp_path: Path) -> None:
    deny = ["mawk", "perl", "ncurses-bin", "netbase"]
    with debian_repository(tmp_path) as repository:
        repository.publish(*PACKAGES, Deb("scanner", fields={"Depends": "netbase"}))
        source = DebianSource(SUITE, tmp_path / "debian", repository.mirrors)
        async with registry(tmp_path, {"deny": deny}, source) as served:
            # An alias, an output, a virtual package, a package of the same unit, an alias of several.
            await denies(served, ["netbase.out", "iana-etc", "awk", "perl-modules", "perl.out", "ncurses"])
            for name in ("git", "scanner"):  # which need what is denied
                await allows(served, name)


async def denies(served: Registry, spellings: list[str]) -> None:
    """See that nothing of an image is given to bob, whether alice has it or not, and that bob builds none."""
    for name in spellings:
        response = await served.get("bob", f"{name}/manifests/latest")
        assert response.status_code == 403, name
        assert response.json()["errors"][0]["detail"]["denied"] == [name]
    assert served.shop.nix.realised == []
    for name in spellings:
        for path in await everything_of(served, name):
            assert await served.status("alice", path) == 200, path
            assert await served.status("bob", path) in (403, 404), path
        for path in (f"{name}/manifests/latest", f"{name}/tags/list", f"amd64/{name}/manifests/latest"):
            assert await served.status("bob", path) == 403, path


async def allows(served: Registry, name: str) -> None:
    """See that bob gets all of an image, also if alice had it before."""
    for path in await everything_of(served, name):
        assert await served.status("bob", f"{name}/manifests/latest") == 200
        assert await served.status("bob", path) == 200, path
    assert "latest" in await served.tags("bob", name)


async def test_a_tag_that_chooses_another_suite(tmp_path: Path) -> None:
    with debian_repository(tmp_path) as repository:
        repository.publish(*PACKAGES)
        for release in (OTHER, f"{OTHER}-updates", f"{OTHER}-security"):
            repository.serve(release)
        repository.publish(*PACKAGES, Deb("extra"), release=OTHER)
        source = DebianSource(SUITE, tmp_path / "debian", repository.mirrors)
        async with registry(tmp_path, {"sources": [f"debian!{SUITE}"]}, source) as served:
            asked = len(repository.requests)
            assert await served.status("bob", f"git/manifests/{OTHER}") == 403
            assert len(repository.requests) == asked
            assert await served.status("bob", "git/manifests/latest") == 200
            assert await served.status("bob", f"git/manifests/{SUITE}") == 200
            before = await served.tags("bob", "git")

            # Alice may have it; bob neither by its digest nor by the tag of its revision, which isn't listed.
            other = await served.get("alice", f"git/manifests/{OTHER}")
            assert other.status_code == 200
            listed = await served.tags("alice", "git")
            assert await served.tags("bob", "git") == before
            assert listed > before
            for tag in listed - before:
                assert await served.status("bob", f"git/manifests/{tag}") == 403
            for tag in before:
                assert await served.status("bob", f"git/manifests/{tag}") == 200
            digests = [other.headers["docker-content-digest"]]
            digests += [each["digest"] for each in other.json()["manifests"]]
            for digest in digests:
                assert await served.status("alice", f"git/manifests/{digest}") == 200
                assert await served.status("bob", f"git/manifests/{digest}") == 404
