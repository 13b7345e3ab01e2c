"""The distribution API with users, rules and limits: what each client gets for what it asks."""

import io
import sys
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import bcrypt
import httpx
import pytest
import structlog
from starlette.applications import Starlette
from starlette.middleware import Middleware

from chandlery.access.client_address import parse_networks
from chandlery.access.control import AccessControl, Accounts, Client
from chandlery.access.public_address import PublicAddress
from chandlery.access.rules import AccessRules
from chandlery.access.tokens import Tokens
from chandlery.access.users import Users
from chandlery.errors import RateLimitError
from chandlery.oci.digest import Digest
from chandlery.oci.documents import ManifestFormat
from chandlery.registry.api import Access, routes
from chandlery.server.request_log import RequestLog
from chandlery.telemetry import logs
from tests.support.clock import Clock
from tests.support.memory_blob_store import MemoryBlobStore
from tests.support.one_image import HOST, LAYER, OneImage, oci_error, one_image
from tests.support.served_blobs import AsTheyAre

PUBLIC = "https://registry.example.com"
ALICE = ("alice", "wonderland")
BOB = ("bob", "builder")
RULES = {"default": {"deny": ["nmap"]}, "users": {"bob": {"allow": ["shell", "git"]}}}
BLOB = f"/v2/git/blobs/{Digest.of(LAYER)}"


class Registry:
    """A registry in this process; `control` is what its access control was made of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "users"
        self.file.write_text("".join(f"{user}:{hashed(password)}\n" for user, password in (ALICE, BOB)))
        self.clock = Clock(1_000_000.0)
        self.tokens = Tokens(b"k" * 32, 300, clock=self.clock)

    def control(
        self, *, users: bool = True, anonymous: bool = False, url: str = PUBLIC, rules: Any = RULES
    ) -> AccessControl:
        accounts = Accounts(Users(self.file), self.tokens, anonymous) if users else None
        address = PublicAddress(url, PROXIES)
        return AccessControl(
            AccessRules.model_validate(rules), {"": ("debian!bookworm", "stable")}, address, accounts
        )

    @asynccontextmanager
    async def serving(
        self, control: AccessControl, peer: str = "192.0.2.7", error: Exception | None = None
    ) -> AsyncIterator[httpx.AsyncClient]:
        blobs = MemoryBlobStore()
        self.images = OneImage(await one_image(blobs), error)
        app = Starlette(
            routes=routes(self.images, AsTheyAre(blobs), HOST, Access(control=control)),
            middleware=[Middleware(RequestLog, trusted_proxies=PROXIES)],
        )
        transport = httpx.ASGITransport(app, client=(peer, 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://registry") as client:
            yield client


PROXIES = parse_networks(["10.0.0.1"])


def hashed(password: str) -> str:
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path)


def challenge(response: httpx.Response) -> tuple[str, Mapping[str, str]]:
    """Return the scheme and the parameters of a WWW-Authenticate header."""
    assert response.status_code == 401
    assert oci_error(response)["code"] == "UNAUTHORIZED"
    scheme, _, rest = response.headers["www-authenticate"].partition(" ")
    return scheme, dict(item.replace('"', "").split("=", 1) for item in rest.split(","))


async def token(
    client: httpx.AsyncClient, *scopes: str, auth: tuple[str, str] | None = None
) -> dict[str, str]:
    """Get a token as clients do; give the header that has it."""
    query = {"service": "chandlery", "scope": scopes}
    response = await client.get("/v2/token", params=query, auth=auth or httpx.USE_CLIENT_DEFAULT)
    assert response.status_code == 200, response.text
    return {"authorization": f"Bearer {response.json()['token']}"}


# Who may ask


@pytest.mark.parametrize(
    "path",
    ["/v2/", "/v2", "/v2/git/manifests/latest", BLOB, "/v2/git/tags/list", "/v2/shell/git/manifests/1"],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_who_does_not_log_in_gets_nothing(registry: Registry, path: str, method: str) -> None:
    async with registry.serving(registry.control()) as client:
        response = await client.request(method, path)
        assert response.status_code == 401
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["www-authenticate"].startswith("Bearer ")
        assert registry.images.requests == []
        assert (await client.request(method, path, auth=ALICE)).status_code == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "path", ["manifests/latest", f"blobs/{Digest.of(LAYER)}", "tags/list", f"referrers/{Digest.of(LAYER)}"]
)
async def test_who_has_not_logged_in_can_not_tell_what_names_mean_here(
    registry: Registry, path: str, method: str
) -> None:
    # `shell` is a profile and `arm64` a platform; packages can't stand before them.
    for auth, others in ((None, 401), (("alice", "wrong"), 401), (ALICE, 400)):
        async with registry.serving(registry.control()) as client:
            statuses = [
                (await client.request(method, f"/v2/{name}/{path}", auth=auth)).status_code
                for name in ("git/shell", "git/arm64", "nonroot", "arm64/amd64/git")
            ]
        assert statuses == [others] * 4
    async with registry.serving(registry.control()) as client:
        for name in ("git/shell", "git/no-such"):
            scheme, parameters = challenge(await client.get(f"/v2/{name}/{path}"))
            assert (scheme, parameters["scope"]) == ("Bearer", f"repository:{name}:pull")
        # What can be no name anywhere tells nothing, and is in no header.
        response = await client.get(f'/v2/git","realm="https:/evil/{path}')
        assert response.status_code == 400
        assert "www-authenticate" not in response.headers


async def test_an_empty_user_and_password_are_none(registry: Registry) -> None:
    async with registry.serving(registry.control()) as client:
        # Podman and skopeo do this; it must not count as a guess.
        for _ in range(100):
            response = await client.get("/v2/git/manifests/latest", auth=("", ""))
        assert oci_error(response)["message"] == "log in first: this server has users"


@pytest.mark.parametrize("auth", [("alice", "Wonderland"), ("alice", ""), ("carol", "wonderland"), ("", "x")])
async def test_a_wrong_password_gets_nothing(registry: Registry, auth: tuple[str, str]) -> None:
    async with registry.serving(registry.control()) as client:
        for path in ("/v2/", "/v2/git/manifests/latest", "/v2/token"):
            response = await client.get(path, auth=auth)
            assert response.status_code == 401
            assert oci_error(response)["message"] == "the user or the password is wrong"


async def test_clients_are_told_where_tokens_are_if_that_is_known(registry: Registry) -> None:
    async with registry.serving(registry.control()) as client:
        assert challenge(await client.get("/v2/")) == (
            "Bearer",
            {"realm": f"{PUBLIC}/v2/token", "service": "chandlery"},
        )
        scheme, parameters = challenge(await client.get("/v2/shell/git/manifests/latest"))
        assert (scheme, parameters["scope"]) == ("Bearer", "repository:shell/git:pull")


async def test_behind_a_trusted_proxy_tokens_are_at_the_proxy(registry: Registry) -> None:
    forwarded = {"host": "registry.example.com", "x-forwarded-proto": "https"}
    async with registry.serving(registry.control(url=""), peer="10.0.0.1") as client:
        response = await client.get("/v2/", headers=forwarded)
        assert challenge(response)[1]["realm"] == "https://registry.example.com/v2/token"
    async with registry.serving(registry.control(url="")) as client:
        assert challenge(await client.get("/v2/", headers=forwarded)) == ("Basic", {"realm": "chandlery"})


async def test_a_token_opens_what_it_was_made_for_and_nothing_else(registry: Registry) -> None:
    async with registry.serving(registry.control()) as client:
        git = await token(client, "repository:git:pull", auth=ALICE)
        assert (await client.get("/v2/", headers=git)).status_code == 200
        for path in ("/v2/git/manifests/latest", BLOB, "/v2/git/tags/list"):
            assert (await client.get(path, headers=git)).status_code == 200
        scheme, parameters = challenge(await client.get("/v2/jq/manifests/latest", headers=git))
        assert scheme == "Bearer"
        assert parameters["error"] == "insufficient_scope"
        assert parameters["scope"] == "repository:jq:pull"
        both = await token(client, parameters["scope"], "repository:git:pull", auth=ALICE)
        assert (await client.get("/v2/jq/manifests/latest", headers=both)).status_code == 200


async def test_a_token_that_is_too_old_is_to_be_renewed(registry: Registry) -> None:
    async with registry.serving(registry.control()) as client:
        header = await token(client, auth=ALICE)
        registry.clock.now += 300
        response = await client.get("/v2/", headers=header)
        assert challenge(response)[1]["error"] == "invalid_token"


async def test_a_token_ends_with_its_user_or_password(registry: Registry) -> None:
    async with registry.serving(registry.control()) as client:
        alice, bob = await token(client, auth=ALICE), await token(client, auth=BOB)
        registry.file.write_text(f"alice:{hashed('another password')}\n")
        for header in (alice, bob):
            assert challenge(await client.get("/v2/", headers=header))[1]["error"] == "invalid_token"


async def test_a_build_is_that_of_a_user_or_of_a_network(registry: Registry) -> None:
    async with registry.serving(registry.control()) as client:
        await client.get("/v2/git/manifests/latest", auth=ALICE)
    named = registry.images.clients
    async with registry.serving(registry.control(users=False), peer="2001:db8::1:2:3:4") as client:
        await client.get("/v2/git/manifests/latest")
    assert [name for name, _ in named + registry.images.clients] == ["user:alice", "2001:db8::/64"]


def test_no_user_is_counted_as_an_address() -> None:
    assert Client("192.0.2.7", "198.51.100.1").key != Client(None, "192.0.2.7").key
    assert Client("2001:db8::/64", "198.51.100.1").key != Client(None, "2001:db8::1").key


# The token endpoint


async def test_a_token_comes_with_all_that_clients_look_at(registry: Registry) -> None:
    async with registry.serving(registry.control()) as client:
        response = await client.get("/v2/token", params={"scope": "repository:git:pull,push"}, auth=ALICE)
    answer = response.json()
    assert response.headers["cache-control"] == "no-store"
    assert answer["token"] == answer["access_token"]
    assert (answer["expires_in"], answer["scope"]) == (300, "repository:git:pull")
    assert answer["issued_at"].endswith("+00:00")


async def test_the_oauth_form_works_as_well(registry: Registry) -> None:
    form = {"grant_type": "password", "service": "chandlery", "client_id": "containerd-client"}
    async with registry.serving(registry.control()) as client:
        right = {**form, "username": "alice", "password": "wonderland", "scope": "repository:git:pull"}
        answer = (await client.post("/v2/token", data=right)).json()
        header = {"authorization": f"Bearer {answer['access_token']}"}
        assert (await client.get("/v2/git/manifests/latest", headers=header)).status_code == 200
        wrong = {**right, "password": "wrong"}
        assert (await client.post("/v2/token", data=wrong)).status_code == 401
        assert (await client.post("/v2/token", data=form)).status_code == 401
        refresh = {"grant_type": "refresh_token", "refresh_token": "something"}
        assert (await client.post("/v2/token", data=refresh)).status_code == 401
        assert (await client.post("/v2/token", content=b"x=" + b"y" * 20_000)).status_code == 401


async def test_a_scope_that_is_denied_is_not_in_the_token(registry: Registry) -> None:
    scopes = [f"repository:{name}:pull" for name in ("git", "nmap", "jq", "Not A Name", "shell/git")]
    async with registry.serving(registry.control()) as client:
        response = await client.get("/v2/token", params={"scope": " ".join(scopes)}, auth=BOB)
        grant = registry.tokens.read(response.json()["token"])
    assert grant.user == "bob"
    assert grant.repositories == {"git", "shell/git"}


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH"])
async def test_the_token_endpoint_takes_nothing_else(registry: Registry, method: str) -> None:
    async with registry.serving(registry.control()) as client:
        response = await client.request(method, "/v2/token", auth=ALICE)
        assert (response.status_code, response.headers["allow"]) == (405, "GET, POST")


async def test_without_users_there_are_no_tokens(registry: Registry) -> None:
    async with registry.serving(registry.control(users=False)) as client:
        assert (await client.get("/v2/token", auth=ALICE)).status_code == 404
        # What a client sends that has logged in elsewhere.
        assert (await client.get("/v2/", auth=ALICE)).status_code == 200


# Who has not logged in


async def test_if_everybody_may_pull_a_token_takes_no_password(registry: Registry) -> None:
    async with registry.serving(registry.control(anonymous=True)) as client:
        assert challenge(await client.get("/v2/"))[0] == "Bearer"
        header = await token(client, "repository:git:pull")
        assert (await client.get("/v2/git/manifests/latest", headers=header)).status_code == 200
        # A wrong password is no reason to let somebody in as nobody.
        assert (await client.get("/v2/token", auth=("alice", "wrong"))).status_code == 401


async def test_a_token_of_nobody_ends_when_not_everybody_may_pull_any_more(registry: Registry) -> None:
    async with registry.serving(registry.control(anonymous=True)) as client:
        header = await token(client)
    async with registry.serving(registry.control()) as client:
        assert challenge(await client.get("/v2/", headers=header))[1]["error"] == "invalid_token"


async def test_who_has_not_logged_in_has_rules_of_their_own(registry: Registry) -> None:
    rules = {"anonymous": {"allow": ["jq"]}}
    async with registry.serving(registry.control(anonymous=True, rules=rules)) as client:
        nobody = await token(client, "repository:git:pull")
        alice = await token(client, "repository:git:pull", auth=ALICE)
        assert (await client.get("/v2/git/manifests/latest", headers=alice)).status_code == 200
        response = await client.get("/v2/git/manifests/latest", headers=nobody)
    assert response.status_code == 403
    assert "a client that has not logged in may not pull git" in oci_error(response)["message"]


async def test_what_not_everybody_may_have_is_kept_by_no_cache_that_many_share(registry: Registry) -> None:
    async with registry.serving(registry.control()) as client:
        assert (await client.get(BLOB, auth=ALICE)).headers["cache-control"].startswith("private, ")


# For what


@pytest.mark.parametrize("with_token", [True, False])
async def test_what_is_denied_is_named(registry: Registry, with_token: bool) -> None:
    async with registry.serving(registry.control()) as client:
        headers = await token(client, "repository:git/jq/nmap:pull", auth=BOB) if with_token else {}
        auth = httpx.USE_CLIENT_DEFAULT if with_token else BOB
        for path in ("manifests/latest", "tags/list", f"blobs/{Digest.of(LAYER)}"):
            response = await client.get(f"/v2/git/jq/nmap/{path}", headers=headers, auth=auth)
            assert response.status_code == 403
            error = oci_error(response)
            assert error["code"] == "DENIED"
            assert error["message"].startswith("bob may not pull jq, nmap: ")
            assert error["detail"]["denied"] == ["jq", "nmap"]
        assert registry.images.requests == []


async def test_a_source_may_be_denied(registry: Registry) -> None:
    rules = {"users": {"bob": {"sources": ["path!*"]}}}
    async with registry.serving(registry.control(rules=rules)) as client:
        response = await client.get("/v2/git/manifests/latest", auth=BOB)
        assert "bob may not pull from the default source: " in oci_error(response)["message"]
        assert (await client.get("/v2/git/manifests/latest", auth=ALICE)).status_code == 200


async def test_a_source_may_be_named_in_a_rule_the_default_one_too(registry: Registry) -> None:
    rules = {"default": {"sources": ["stable"]}, "users": {"bob": {"sources": ["other"]}}}
    async with registry.serving(registry.control(rules=rules)) as client:
        assert (await client.get("/v2/git/manifests/latest", auth=ALICE)).status_code == 200
        assert (await client.get("/v2/git/manifests/latest", auth=BOB)).status_code == 403


async def test_a_digest_is_given_only_in_the_name_of_an_image_that_needs_it(registry: Registry) -> None:
    async with registry.serving(registry.control()) as client:
        digest = registry.images.image_.manifests[ManifestFormat.OCI].digest
        paths = (BLOB, f"/v2/git/manifests/{digest}")
        registry.images.needed_by = {"git"}
        for path in paths:
            assert (await client.get(path, auth=BOB)).status_code == 200
        registry.images.needed_by = {"nmap"}
        for path, code in zip(paths, ("BLOB_UNKNOWN", "MANIFEST_UNKNOWN"), strict=True):
            for auth in (ALICE, BOB):
                response = await client.get(path, auth=auth)
                assert (response.status_code, oci_error(response)["code"]) == (404, code)


async def test_where_nothing_is_denied_a_digest_may_be_asked_for_in_any_name(registry: Registry) -> None:
    async with registry.serving(registry.control(rules={})) as client:
        registry.images.needed_by = set()
        assert (await client.get(BLOB, auth=BOB)).status_code == 200


async def test_rules_count_without_users_too(registry: Registry) -> None:
    async with registry.serving(registry.control(users=False)) as client:
        assert (await client.get("/v2/git/manifests/latest")).status_code == 200
        assert (await client.get("/v2/nmap/manifests/latest")).status_code == 403


# How often


async def test_each_user_has_a_number_of_requests(registry: Registry) -> None:
    rules = {"default": {"requests_per_minute": 3}, "users": {"bob": {"requests_per_minute": 5}}}
    async with registry.serving(registry.control(rules=rules)) as client:
        for auth, limit in ((ALICE, 3), (BOB, 5)):
            statuses = [(await client.get("/v2/", auth=auth)).status_code for _ in range(limit + 2)]
            assert statuses == [200] * limit + [429] * 2
        response = await client.get("/v2/git/manifests/latest", auth=ALICE)
    assert 0 < int(response.headers["retry-after"]) <= 20
    error = oci_error(response)
    assert error["code"] == "TOOMANYREQUESTS"
    assert error["message"].startswith("too many requests: the limit here is 3 per minute")


async def test_without_users_each_address_has_a_number_of_requests(registry: Registry) -> None:
    control = registry.control(users=False, rules={"default": {"requests_per_minute": 2}})
    for peer, forwarded, status in (
        ("192.0.2.7", "", 200),
        ("192.0.2.7", "198.51.100.9", 200),  # not a proxy: it may say what it wants
        ("192.0.2.7", "", 429),
        ("10.0.0.1", "198.51.100.1", 200),
        ("10.0.0.1", "198.51.100.1", 200),
        ("10.0.0.1", "198.51.100.1", 429),
        ("10.0.0.1", "198.51.100.2", 200),
        ("2001:db8::1", "", 200),
        ("2001:db8::2", "", 200),
        ("2001:db8::3", "", 429),
        ("::ffff:192.0.2.7", "", 429),
    ):
        async with registry.serving(control, peer=peer) as client:
            response = await client.get("/v2/", headers={"x-forwarded-for": forwarded} if forwarded else {})
            assert response.status_code == status, (peer, forwarded)


async def test_passwords_can_not_be_tried_without_end(registry: Registry) -> None:
    control = registry.control()
    async with registry.serving(control) as client:
        statuses = [(await client.get("/v2/", auth=("alice", str(guess)))).status_code for guess in range(40)]
        assert statuses == [401] * 10 + [429] * 30
        refused = await client.get("/v2/token", auth=ALICE)
        assert refused.status_code == 429
        assert 0 < int(refused.headers["retry-after"]) <= 6
        # Others at this address, and alice at others, are let in.
        assert (await client.get("/v2/token", auth=BOB)).status_code == 200
    async with registry.serving(control, peer="192.0.2.8") as client:
        assert (await client.get("/v2/", auth=ALICE)).status_code == 200


async def test_right_passwords_are_not_counted(registry: Registry) -> None:
    names = [f"user-{number}" for number in range(40)]
    registry.file.write_text("".join(f"{name}:{hashed('right')}\n" for name in names))
    async with registry.serving(registry.control()) as client:
        assert {(await client.get("/v2/", auth=(name, "right"))).status_code for name in names} == {200}


async def test_a_right_password_that_was_used_lately_is_no_way_to_guess_it(registry: Registry) -> None:
    control = registry.control()
    async with registry.serving(control) as client:
        assert (await client.get("/v2/", auth=ALICE)).status_code == 200
    async with registry.serving(control, peer="192.0.2.8") as client:
        for guess in range(40):
            await client.get("/v2/", auth=("alice", str(guess)))
        assert (await client.get("/v2/", auth=ALICE)).status_code == 429


async def test_a_user_is_guessed_at_no_faster_from_many_addresses(registry: Registry) -> None:
    control = registry.control()
    async with registry.serving(control, peer="192.0.2.7") as client:
        assert (await client.get("/v2/", auth=ALICE)).status_code == 200
    statuses = []
    for number in range(100):
        async with registry.serving(control, peer=f"2001:db8:0:{number:x}::1") as client:
            statuses.append((await client.get("/v2/", auth=("alice", str(number)))).status_code)
    assert statuses == [401] * 60 + [429] * 40
    async with registry.serving(control, peer="192.0.2.7") as client:
        assert (await client.get("/v2/", auth=ALICE)).status_code == 200


def test_each_client_has_a_number_of_builds(registry: Registry) -> None:
    rules = {"default": {"builds_per_hour": 2}, "users": {"bob": {"builds_per_hour": 0}}}
    control = registry.control(rules=rules)
    for client in ("user:alice", "192.0.2.7", "192.0.2.8"):
        control.admit_build(client)
        control.admit_build(client)
        with pytest.raises(RateLimitError, match="too many builds: the limit here is 2 per hour") as refused:
            control.admit_build(client)
        assert 0 < refused.value.retry_after <= 1800
    for _ in range(100):
        control.admit_build("user:bob")


# Secrets

CANARY = "canary-Zf9cBq"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def logged(log_format: Any) -> Iterator[io.StringIO]:
    """Return what is logged, exactly as it would stand in the log."""
    before, stderr = structlog.get_config(), sys.stderr
    written = Terminal()
    sys.stderr = written
    try:
        logs.configure(log_format)
        yield written
    finally:
        sys.stderr = stderr
        structlog.configure(**before)


def carriers(secret: str) -> Iterator[dict[str, Any]]:
    """Yield all ways in which a client may send a secret."""
    for text in (f"alice:{secret}", f"{secret}:x", f"carol:{secret}", secret, f"alice:{secret}\n"):
        yield {"headers": {"authorization": f"Basic {b64encode(text.encode()).decode()}"}}
    for scheme in ("Bearer", "bearer", "Basic", "Digest", "Token", ""):
        yield {"headers": {"authorization": f"{scheme} {secret}".strip()}}
        yield {"headers": {"authorization": f"{scheme} {secret} ü".strip().encode("latin-1")}}
    form = {"grant_type": "password", "username": "alice", "password": secret}
    yield {"data": form}
    yield {"data": {**form, "grant_type": "refresh_token", "refresh_token": secret}}
    yield {"params": form}


PATHS = [
    *("/v2", "/v2/", "/v2/token", "/v2/git/manifests/latest", "/v2/nmap/manifests/latest", BLOB),
    *("/v2/git/tags/list", "/v2/git/blobs/uploads/", "/v2/_catalog", "/v2/unknown", "/elsewhere"),
    f"/v2/git/manifests/{Digest.of(LAYER)}",
    f"/v2/git/referrers/{Digest.of(LAYER)}",
]


@pytest.mark.parametrize("log_format", ["console", "json"])
@pytest.mark.parametrize("password", [CANARY, "another"], ids=["right", "wrong"])
async def test_no_secret_gets_into_a_log_or_an_answer(
    registry: Registry, log_format: str, password: str
) -> None:
    registry.file.write_text(f"alice:{hashed(password)}\n")
    encoded = {b64encode(f"alice:{CANARY}".encode()).decode().rstrip("="), CANARY}
    # A fault of the program, so that a traceback is logged.
    error = RuntimeError("a fault")
    # Many addresses, so that passwords aren't refused unseen.
    control = registry.control()
    with logged(log_format) as log:
        for number, carrier in enumerate(carriers(CANARY)):
            async with registry.serving(control, f"192.0.2.{number}", error) as client:
                for path in PATHS:
                    for method in ("GET", "HEAD", "POST", "DELETE"):
                        response = await client.request(method, path, **carrier)
                        shown = response.text + str(response.headers)
                        assert not [secret for secret in encoded if secret in shown], (method, path)
            header = await right_token(registry, control, password)
            async with registry.serving(control, "198.51.100.1", error) as client:
                assert (await client.get("/v2/git/manifests/latest", headers=header)).status_code == 500
            encoded.add(header["authorization"].split()[1])
    assert "a fault" in log.getvalue()
    assert not [secret for secret in encoded if secret in log.getvalue()]


async def right_token(registry: Registry, control: AccessControl, password: str) -> dict[str, str]:
    async with registry.serving(control, "198.51.100.1") as client:
        return await token(client, "repository:git:pull", auth=("alice", password))


def test_what_knows_secrets_does_not_show_them(registry: Registry) -> None:
    control = registry.control()
    assert "wonderland" not in repr([control, control.accounts, registry.tokens])
    assert "k" * 32 not in repr([control, control.accounts, registry.tokens])
