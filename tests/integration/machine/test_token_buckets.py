import subprocess
import sys
from pathlib import Path

TAKE = """
import sys
from pathlib import Path
from chandlery.machine.token_buckets import SharedTokenBuckets

buckets = SharedTokenBuckets(Path(sys.argv[1]), 1e6)
print(sum(not buckets.take("alice", 2000) for _ in range(2000)))
"""


def test_what_is_taken_at_once_is_counted_once(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", TAKE, str(tmp_path / "buckets")]
    processes = [subprocess.Popen(argv, stdout=subprocess.PIPE) for _ in range(2)]
    taken = [int(process.communicate()[0]) for process in processes]
    # The clock goes on, but by far less than it takes to get another one.
    assert sum(taken) == 2000
