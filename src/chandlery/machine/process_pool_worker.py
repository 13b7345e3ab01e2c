"""The program that packs, in a process of its own: `packing_processes` starts it and says what to do.

Functions and their arguments come in, pickled, and what they give or raise goes out, until no more come. It
imports what they need and nothing else, so it starts in a tenth of a second and stays small.
"""

import gc
import os
import pickle
import signal
import struct
import sys
from typing import BinaryIO

# What stands before an answer: whether it was raised, and how many bytes it has.
ANSWER = struct.Struct("!?Q")


def main() -> None:
    """Work until the server closes the pipe, or ends."""
    # Ctrl-C is for the server: it ends a packer when it has no use for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Layers have many small things, none of which refers to itself; looking through them takes time.
    gc.disable()
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        # What anything prints is not for the pipe.
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        _work(sys.stdin.buffer, answers)


def _work(requests: BinaryIO, answers: BinaryIO) -> None:
    while True:
        try:
            function, arguments = pickle.load(requests)  # noqa: S301
        except EOFError:
            return
        try:
            raised, answer = False, function(*arguments)
        except Exception as error:
            raised, answer = True, error
        pickled = pickle.dumps(answer)
        answers.write(ANSWER.pack(raised, len(pickled)) + pickled)
        answers.flush()


if __name__ == "__main__":
    main()
