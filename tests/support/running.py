"""Programs that tests need, and servers that they run."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest


def require(*programs: str, root: bool = True) -> None:
    """Skip the test if it can't run here; on CI that is a failure."""
    missing = [program for program in programs if shutil.which(program) is None]
    if root and os.geteuid() != 0:
        reason = "needs root"
    elif missing:
        reason = f"not installed: {', '.join(missing)}"
    else:
        return
    if "CI" in os.environ:
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass(frozen=True, slots=True)
class Server:
    """A running `chandlery serve`."""

    address: str
    data_dir: Path
    log: Path

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def image(self, name: str, reference: str = "latest") -> str:
        """Return an image's name as clients write it."""
        return f"{self.address}/{name}{'@' if ':' in reference else ':'}{reference}"

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/v2/").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False


@dataclass(frozen=True, slots=True)
class TlsServer:
    """An HTTPS server that says "trusted", with a certificate that only `ca` (PEM) vouches for."""

    url: str
    ca: str
