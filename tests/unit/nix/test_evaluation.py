from collections.abc import Callable, Mapping
from typing import Any

from chandlery.errors import LowDiskError
from chandlery.nix.evaluation import Evaluator, PackageSet, Resolution
from chandlery.nix.pinned_source import PinnedSource


async def test_a_refusal_is_told_though_there_is_no_disk_for_its_reason() -> None:
    async def evaluate(
        packages: PackageSet,
        expression: str,
        about: Mapping[str, Any],
        timeout: float,
        on_output: Callable[[bytes], object] | None = None,
    ) -> bytes | Resolution:
        if on_output is None:
            raise LowDiskError("/data", 1, 2)
        mark = about["mark"].encode()
        for path in about["attributePaths"]:
            on_output(b'%s\n%s ["%s", {"status": "unfree"}]\n' % (mark, mark, path.encode()))
        return b"null"

    packages = PackageSet(
        PinnedSource("path", "/packages", "1" * 64, nix={"tree": "/packages"}), "x86_64-linux"
    )
    answers = await Evaluator(evaluate, 60.0).resolve(packages, ["steam", "unrar"])
    assert {path: answer.status for path, answer in answers.items()} == {"steam": "unfree", "unrar": "unfree"}
