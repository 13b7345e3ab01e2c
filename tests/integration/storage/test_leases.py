import asyncio
import subprocess
import sys
from pathlib import Path

from chandlery.oci.digest import Digest
from chandlery.storage.leases import Leases

BLOB, OTHER = Digest.of(b"blob"), Digest.of(b"other")


TAKE = """
import asyncio, sys
from pathlib import Path
from chandlery.oci.digest import Digest
from chandlery.storage.leases import Leases

async def main():
    with Leases(Path(sys.argv[1])) as leases:
        async with leases.lease() as lease:
            await lease.take(Digest.of(b"blob"))
            print("taken", flush=True)
            sys.stdin.read()

asyncio.run(main())
"""


def test_the_leases_of_a_process_are_seen_by_others_and_swept_when_it_was_killed(
    tmp_path: Path,
) -> None:
    with (
        Leases(tmp_path) as leases,
        subprocess.Popen(
            [sys.executable, "-c", TAKE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == b"taken\n"
        asyncio.run(leases.sweep())
        assert leases.leased() == {BLOB}
        process.kill()
        process.wait()
        asyncio.run(leases.sweep())
        assert leases.leased() == set()
