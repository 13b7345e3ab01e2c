"""What is promised of compressed bytes on other processors, which qemu-user emulates."""

import json
import platform
import shutil
import subprocess
import sys

import pytest

from chandlery.layers.compression import COMPRESSIONS

# Fingerprint and digest of each compression, of 2 MB that compress as layers do.
SCRIPT = """
import hashlib, json, random
from chandlery.layers.compression import COMPRESSIONS
drawn = random.Random(1)
words = [drawn.randbytes(drawn.randrange(2, 12)) for _ in range(3000)]
blocks = [b"".join(drawn.choices(words, k=150_000)), drawn.randbytes(300_000) + bytes(700_000)]
made = {}
for name, compression in COMPRESSIONS.items():
    compressor = compression.compressor()
    content = b"".join([*map(compressor.compress, blocks), compressor.flush()])
    made[name] = (compression.fingerprint, hashlib.sha256(content).hexdigest())
print(json.dumps(made))
"""
WITHOUT_SSE42 = "core2duo"
PROCESSORS = ("Nehalem", "SandyBridge", "Haswell", "EPYC-Rome", "max")

needs_emulator = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("qemu-x86_64") is None,
    reason="needs Debian's qemu-user, on x86-64",
)


def made_on(*emulator: str) -> dict[str, tuple[str, str]]:
    run = subprocess.run(
        [*emulator, sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True, timeout=250
    )
    return {name: (fingerprint, digest) for name, (fingerprint, digest) in json.loads(run.stdout).items()}


@needs_emulator
def test_processors_give_the_same_bytes_or_the_fingerprint_says_so() -> None:
    made = {name: made_on("qemu-x86_64", "-cpu", name) for name in (WITHOUT_SSE42, *PROCESSORS)}
    made["this one"] = made_on()

    assert all(made["max"] == made[name] for name in PROCESSORS)
    for compression in COMPRESSIONS:
        pairs = {each[compression] for each in made.values()}
        # One fingerprint for the same bytes, and other bytes for another.
        assert (
            len({fingerprint for fingerprint, _ in pairs})
            == len(pairs)
            == len({digest for _, digest in pairs})
        )
    assert made[WITHOUT_SSE42]["gzip"] != made["max"]["gzip"]
    for compression in ("zstd", "none"):
        assert len({each[compression] for each in made.values()}) == 1


@needs_emulator
def test_what_was_packed_with_the_usual_code_is_known_as_before() -> None:
    fingerprint, _ = made_on("qemu-x86_64", "-cpu", "Nehalem")["gzip"]

    assert fingerprint.endswith(" level=2")
