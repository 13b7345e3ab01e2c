"""How a client is kept waiting for an image that takes longer to build than anybody holds a connection.

containerd gives up when no response header came for 30 s (containerd issue 13682), and proxies cut
connections after 30 to 60 s. So a manifest request is held for less than that, and then sent on to itself
with 307 and a counter. Go's HTTP client, which all of these clients use, follows 9 redirections and fails at
the 10th; so then comes 429 with Retry-After, after which podman and skopeo begin anew. No header is trusted
and no host is named: Location is relative, so it is right behind any proxy. A forged counter costs only
whoever forged it.
"""

from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, urlencode

_COUNTER = "chandlery-wait"


@dataclass(frozen=True, slots=True)
class WaitPolicy:
    """How long one request is held, in seconds, and how often it is sent on before the answer is 429."""

    hold: float = 25.0
    redirections: int = 9

    def next_location(self, path: str, query: str) -> str | None:
        """Return where a request goes on waiting, relative to its URL; None if it has waited long enough.

        Whatever else the query holds stays: containerd adds `ns`.
        """
        parameters = parse_qsl(query, keep_blank_values=True)
        waited = max((_count(value) for name, value in parameters if name == _COUNTER), default=0)
        if waited >= self.redirections:
            return None
        kept = [(name, value) for name, value in parameters if name != _COUNTER]
        last = quote(path.rpartition("/")[2], safe=":")
        return f"./{last}?{urlencode([*kept, (_COUNTER, str(waited + 1))])}"


def _count(text: str) -> int:
    """Read a counter; what is none counts as 0."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 4 else 0
