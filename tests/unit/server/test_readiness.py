import asyncio

from structlog.testing import capture_logs

from chandlery.errors import NixMissingError
from chandlery.server.readiness import Readiness


class Counted:
    """A check that counts how often it ran."""

    def __init__(self, error: Exception | None = None) -> None:
        self.runs = 0
        self.error = error

    async def __call__(self) -> None:
        self.runs += 1
        await asyncio.sleep(0)
        if self.error:
            raise self.error


async def test_every_check_says_what_is_wrong() -> None:
    readiness = Readiness({"good": Counted(), "bad": Counted(NixMissingError("nix-store"))})
    problems = await readiness.problems()
    assert problems["good"] is None
    assert "nix-store was not found" in str(problems["bad"])


async def test_a_check_that_does_not_answer_is_a_problem() -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    assert await Readiness({"slow": hang}, timeout=0.01).problems() == {"slow": "no answer within 0.01 s"}


async def test_a_fault_of_a_check_is_logged_and_not_told() -> None:
    with capture_logs() as events:
        problems = await Readiness({"bad": Counted(ZeroDivisionError("a secret"))}).problems()
    assert "secret" not in str(problems["bad"])
    assert [(event["event"], event["check"]) for event in events] == [("check failed", "bad")]


async def test_many_who_ask_at_once_or_soon_after_run_a_check_once() -> None:
    check = Counted()
    readiness = Readiness({"check": check}, max_age=60)
    await asyncio.gather(*(readiness.problems() for _ in range(50)))
    await readiness.problems()
    assert check.runs == 1


async def test_what_was_found_is_forgotten_in_time() -> None:
    check = Counted(NixMissingError("nix-store"))
    readiness = Readiness({"check": check}, max_age=0)
    assert (await readiness.problems())["check"]
    check.error = None
    assert (await readiness.problems())["check"] is None
