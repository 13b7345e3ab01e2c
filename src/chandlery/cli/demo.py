"""`chandlery demo`."""

import signal

from chandlery.cli.options import Source
from chandlery.demo.demo import run


def demo(source: Source = None) -> None:
    """Start a registry, pull an image from it, and run its programs: a test of everything at once.

    What it starts it stops, and what it makes it removes.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # What was started is stopped on the way out. Shells have what they start with `&` ignore SIGINT.
        signal.signal(number, signal.default_int_handler)
    run(source)
