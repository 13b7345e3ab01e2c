"""The command line, as a process of its own."""

import subprocess
import sys

from tests.support.servers import LIMIT, plain_environment


def run(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "chandlery", *arguments],
        env=plain_environment(**variables),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
