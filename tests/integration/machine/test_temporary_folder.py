import subprocess
import sys
from pathlib import Path

from chandlery.machine.temporary_folder import TemporaryFolder

HOLD_A_FOLDER = """
import sys
from pathlib import Path
from chandlery.machine.temporary_folder import TemporaryFolder

folder = TemporaryFolder(Path(sys.argv[1]))
(folder.path / "half").write_text("half")
print(folder.path, flush=True)
sys.stdin.read()
"""


def hold_a_folder(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_A_FOLDER, str(parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_live_process_writes_is_left_alone_and_what_a_dead_one_left_is_removed(tmp_path: Path) -> None:
    process, folder = hold_a_folder(tmp_path)
    with process:
        with TemporaryFolder(tmp_path):
            assert (folder / "half").exists()
        process.kill()
        process.wait()
        assert (folder / "half").exists()
        with TemporaryFolder(tmp_path):
            assert not folder.exists()


def test_what_died_later_is_swept_on_demand(tmp_path: Path) -> None:
    with TemporaryFolder(tmp_path) as folder:
        process, other = hold_a_folder(tmp_path)
        with process:
            folder.sweep()
            assert other.exists()
            process.kill()
            process.wait()
        folder.sweep()
        assert not other.exists()
        assert folder.path.exists()
