"""Certificates for 127.0.0.1 that nobody but themselves vouches for."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

P256 = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")


@dataclass(frozen=True)
class Certificate:
    """The files of a certificate and of its key, both PEM."""

    certificate: Path
    key: Path

    def replace(self, other: "Certificate") -> None:
        """Put another certificate into these files, as a program that renews certificates does."""
        for source, target in ((other.key, self.key), (other.certificate, self.certificate)):
            copy = target.with_suffix(".new")
            copy.write_bytes(source.read_bytes())
            copy.replace(target)


def make_certificate(folder: Path, name: str, key: tuple[str, ...] = P256) -> Certificate:
    """Make a certificate whose subject is `name`; `key` are the options of `openssl req` for its key."""
    made = Certificate(folder / f"{name}.pem", folder / f"{name}.key")
    subprocess.run(
        [
            *("openssl", "req", "-x509", *key, "-nodes", "-days", "2", "-subj", f"/CN={name}"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(made.key), "-out", str(made.certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return made
