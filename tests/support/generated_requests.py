"""Requests by the grammar of the distribution API, and beyond it: right, nearly right, or nothing like it."""

from dataclasses import dataclass
from typing import TypeVar

from hypothesis import strategies as st

# If this ever begins a line of the log, a client has written it.
FORGED = "FORGED"


@dataclass(frozen=True)
class Request:
    """A request as it goes over the wire; there is no body."""

    method: str
    path: str
    content: bytes

    @property
    def is_of_the_api(self) -> bool:
        return self.path == "/v2" or self.path.startswith("/v2/")


T = TypeVar("T")


def _mostly(right: st.SearchStrategy[T], wrong: st.SearchStrategy[T]) -> st.SearchStrategy[T]:
    """Choose what is right four times of five: with one thing wrong a request goes deeper than with many."""
    return st.sampled_from([right, right, right, right, wrong]).flatmap(lambda chosen: chosen)


_TEXT = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="?#"), min_size=1, max_size=12
)
_ENCODED = st.binary(min_size=1, max_size=6).map(lambda content: "".join(f"%{byte:02X}" for byte in content))
_UPWARDS = ["..", ".", "%2e%2e", "%2E%2E%2F..", "..%2fcanary", "..%5c", "../" * 500, "%2e%2e%2f" * 300]
_ELSEWHERE = ["etc%2Fpasswd", "%2fetc%2fpasswd", "file:%2f%2f%2fetc%2fpasswd", "canary", "blobs%2fcanary"]
_CONTROLS = ["%00", "hello%00", f"%0a{FORGED}", f"%0d%0a{FORGED}", "%1b[31m", "%7f", "%c2%9b", "%E2%80%AE"]
# Escaped surrogates stand for bytes that are no UTF-8.
_BYTES = ["%ff", "%c0%ae", "%", "%zz", "é", "\udcff", "\udcc0\udcae"]
_NEARLY = ["", "Hello", "-", "a--b", "a__b", "a..b", "_", "~", "a" * 128, "a" * 129, "a" * 256]
_LONG = ["a" * 5000, "a" * 70_000, "a/" * 1000]
_KEYWORDS = ["manifests", "blobs", "tags", "list", "uploads", "referrers", "_catalog", "token", "v2"]
_TRAPS = st.sampled_from([*_UPWARDS, *_ELSEWHERE, *_CONTROLS, *_BYTES, *_NEARLY, *_LONG, *_KEYWORDS])

# Few that can be built, since that takes longer than all the rest.
_IMAGES = [*["hello"] * 5, "hello/hello", "amd64/hello", "jq/hello", "hello/jq", "arm64/jq", "tools.wrench"]
_NO_IMAGES = ["waiting-a", "nothing", "nothing/hello", "shell/amd64/arm64", "hello/shell", "hello%2Fjq"]
_NAMES = _mostly(st.sampled_from([*_IMAGES, *_NO_IMAGES]), st.one_of(_TRAPS, _TEXT, _ENCODED))

_PARAMETERS = st.tuples(
    st.sampled_from(["n", "last", "artifactType", "ns", "chandlery-wait", "x", "%00", ""]),
    st.one_of(st.integers(-2, 10**20).map(str), _TEXT, _ENCODED, st.sampled_from(["", "%ff", "9" * 5000])),
)
_QUERIES = _mostly(
    st.just(""), st.one_of(st.lists(_PARAMETERS.map("=".join), max_size=3).map("&".join), _TRAPS)
)

_WRITES = ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "get", "BREW"]
_METHODS = _mostly(st.just("GET"), st.sampled_from(["HEAD", "HEAD", *_WRITES]))

# What may stand in a header (RFC 9110, section 5.5), and a little more.
_VALUES = _mostly(
    _TEXT.map(str.encode), st.binary(max_size=20).map(lambda content: content.translate(None, b"\r\n\0"))
)
_MEDIA_RANGES = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json;q=0.9",
    *("*/*", "application/*;q=0.5", "text/html", ";", "q=1", "a/b;q=9999", "a/b;q=", "," * 50),
]
_ACCEPTS = st.lists(st.sampled_from(_MEDIA_RANGES), max_size=4).map(lambda items: ", ".join(items).encode())
_POSITIONS = st.one_of(st.just(""), st.integers(0, 400).map(str))
_LISTED_RANGES = st.lists(st.tuples(_POSITIONS, _POSITIONS).map("-".join), min_size=1, max_size=3)
_ODD_RANGES = [
    b"bytes=0-0," * 2000,
    b"bytes=" + b"9" * 4000 + b"-",
    b"lines=1-2",
    b"bytes",
    b"bytes=",
    b"bytes=--",
]
_RANGES = _mostly(
    _LISTED_RANGES.map(lambda items: b"bytes=" + ",".join(items).encode()), st.sampled_from(_ODD_RANGES)
)
_ADDRESSES = st.sampled_from(
    [b"192.0.2.1", b"127.0.0.1, 192.0.2.7", b"::1", b"unknown", b"", b"," * 500, b"1.2.3.4:80", b"\xe9"]
)
_GOOD_HOSTS = [b"localhost", b"127.0.0.1:8080", b"[::1]:8080", b"images.example.com"]
_BAD_HOSTS = [b"", b"[", b"a b", b"evil.example:99999", b"\xff", b"x" * 3000, b"user@host", b"../.."]
_HOSTS = _mostly(st.sampled_from(_GOOD_HOSTS), st.sampled_from(_GOOD_HOSTS + _BAD_HOSTS))


def _digests(known: tuple[str, ...]) -> st.SearchStrategy[str]:
    hexadecimal = st.text("0123456789abcdefABCDEF", min_size=60, max_size=68)
    wrong = [f"sha256:{'0' * 64}", "sha512:" + "0" * 128, "sha256:", ":", "sha256:..%2f..%2fcanary"]
    return _mostly(
        st.sampled_from(known),
        st.one_of(st.sampled_from(wrong), hexadecimal.map(lambda text: f"sha256:{text}")),
    )


def _paths(known: tuple[str, ...]) -> st.SearchStrategy[str]:
    digest = _digests(known)
    reference = _mostly(st.one_of(st.just("latest"), digest), st.one_of(_TRAPS, _TEXT, _ENCODED))
    endpoints = (
        st.tuples(st.just("/v2"), _NAMES, st.just("manifests"), reference),
        st.tuples(st.just("/v2"), _NAMES, st.just("blobs"), _mostly(digest, _TRAPS)),
        st.tuples(st.just("/v2"), _NAMES, st.just("tags/list")),
        st.tuples(st.just("/v2"), _NAMES, st.just("referrers"), digest),
        st.tuples(st.just("/builds"), st.one_of(_TRAPS, _TEXT)),
        st.tuples(st.just("/builds"), st.one_of(_TRAPS, _TEXT), st.just("log")),
    )
    anything = st.lists(st.one_of(_TRAPS, _TEXT, _NAMES), max_size=6).map("/".join)
    pages = [
        "/healthz",
        "/readyz",
        "/metrics",
        "/builds",
        "/healthz/",
        "/v2",
        "/v2/",
        "//v2/",
        "*",
        "http://x/v2/",
    ]
    return _mostly(
        st.one_of(*(endpoint.map("/".join) for endpoint in endpoints)),
        st.one_of(anything.map("/v2/{}".format), anything.map("/{}".format), st.sampled_from(pages)),
    )


def _headers(known: tuple[str, ...]) -> st.SearchStrategy[list[tuple[bytes, bytes]]]:
    tags = _mostly(st.sampled_from([b"*", *(f'"{digest}"'.encode() for digest in known)]), _VALUES)
    anything = [b"X-Request-Id", b"Authorization", b"Cookie", b"Traceparent", b"X-" + b"a" * 300]
    return st.lists(
        st.one_of(
            st.tuples(st.just(b"Accept"), _ACCEPTS),
            st.tuples(st.just(b"Range"), _RANGES),
            st.tuples(st.sampled_from([b"If-None-Match", b"If-Match", b"If-Range"]), tags),
            st.tuples(st.sampled_from([b"X-Forwarded-For", b"X-Real-Ip", b"Forwarded"]), _ADDRESSES),
            st.tuples(st.sampled_from([b"X-Forwarded-Host", b"X-Forwarded-Proto"]), _HOSTS),
            st.tuples(st.sampled_from(anything), _VALUES),
        ),
        max_size=5,
    )


@st.composite
def requests(draw: st.DrawFn, known: tuple[str, ...]) -> Request:
    """Return a request whose form is HTTP's, whatever it asks for; `known` are digests that are there."""
    method, path, query = draw(_METHODS), draw(_paths(known)), draw(_QUERIES)
    fields = [(b"Host", draw(_HOSTS)), *draw(_headers(known)), (b"Connection", b"close")]
    if method in ("POST", "PUT", "PATCH"):
        fields.append((b"Content-Length", b"0"))
    target = f"{path}?{query}" if query else path
    first = f"{method} {target} HTTP/1.1".encode(errors="surrogateescape")
    lines = [first, *(b": ".join(field) for field in fields)]
    return Request(method, path, b"\r\n".join(lines) + b"\r\n\r\n")


_MANGLED = [
    *(
        b"\0",
        b"\r",
        b"\n",
        b"\r\n",
        b" ",
        b"\t",
        b"\xff",
        b":",
        b"HTTP/1.1",
        b"\r\n folded: yes",
        b"a" * 100_000,
    ),
    *(
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\n",
        b"Content-Length: -1\r\n",
        b"a: b\r\n" * 300,
    ),
    *(b"Upgrade: h2c\r\n", b"Expect: 100-continue\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET\r\n\r\n"),
    b"GET /v2/ HTTP/9.9\r\n\r\n",
]


@st.composite
def broken_requests(draw: st.DrawFn, known: tuple[str, ...]) -> bytes:
    """Return bytes that were a request once, or never; most end, so that nobody waits for the rest."""
    content = draw(st.one_of(requests(known).map(lambda request: request.content), st.binary(max_size=200)))
    for _ in range(draw(st.integers(1, 3))):
        at, cut = draw(st.integers(0, len(content))), draw(st.integers(0, 30))
        content = content[:at] + draw(st.sampled_from(_MANGLED)) + content[at + cut :]
    return content + draw(st.sampled_from([b"", *[b"\r\n\r\n"] * 5]))
