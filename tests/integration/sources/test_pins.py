import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sources" / "pins.json"


def test_a_kill_at_any_time_leaves_a_file_that_is_whole(file: Path) -> None:
    script = (
        "import asyncio, sys; from pathlib import Path; from chandlery.sources.pins import *; "
        "from chandlery.sources.pin_file import PinFile\n"
        "async def resolve(reference): return Resolved(reference * 40)\n"
        "async def main():\n"
        "    while True:\n"
        "        pins = Pins(PinFile(Path(sys.argv[1])), 's', resolve, PinLimits(lifetime=0.0))\n"
        "        [await pins.get(each) for each in 'abc']\n"
        "asyncio.run(main())"
    )
    for _ in range(5):
        file.unlink(missing_ok=True)
        with subprocess.Popen([sys.executable, "-c", script, str(file)]) as process:
            while not file.exists():
                assert process.poll() is None
            process.kill()
        assert set(json.loads(file.read_bytes())["pins"]) <= set("abc")
