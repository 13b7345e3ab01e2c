"""Work in the background: serving goes before it.

Packers and Nix get the same share. A packer that yielded to Nix as well would wait for the builds of other
images to end, which may take hours.
"""

import os
from contextlib import suppress

NICENESS = 19


def lower(process: int) -> None:
    """Let a process yield to this one, and with it what it will start.

    One that has ended needn't; and where a sandbox forbids it, it works all the same.
    """
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, process, NICENESS)
        # It interrupts nobody when it wakes up (sched(7)).
        os.sched_setscheduler(process, os.SCHED_BATCH, os.sched_param(0))
