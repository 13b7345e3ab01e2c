from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.builds.limits import BuildLimits
from chandlery.errors import BuildTooLargeError, LowDiskError
from chandlery.nix.output import FetchPlan

GB = 1_000_000_000
LIMITS = BuildLimits(packages=3, closure_size=2 * GB, free_disk=1 * GB)

sizes = st.integers(0, 10 * GB)


@given(sizes, sizes, st.integers(0, 9), st.floats(1.0, 1.25))
def test_an_image_that_is_allowed_in_the_end_is_refused_at_no_moment_before(
    size: int, there: int, derivations: int, too_much: float
) -> None:
    try:
        LIMITS.check_closure("git", size)
    except BuildTooLargeError:
        return
    there = min(there, size)
    # An index may estimate too much.
    LIMITS.check_estimate("git", int(size * too_much))
    LIMITS.check_plan("git", FetchPlan(derivations, size // 4, size))
    LIMITS.check_progress("git", there, there)


@given(sizes)
def test_what_nix_fetches_alone_is_refused_as_what_is_there(size: int) -> None:
    assert refused(lambda: LIMITS.check_plan("git", FetchPlan(1, 0, size))) == refused(
        lambda: LIMITS.check_closure("git", size)
    )


def test_what_is_fetched_to_build_something_counts_for_the_build_alone() -> None:
    plan = FetchPlan(2, 1 * GB, 3 * GB)
    LIMITS.check_plan("git", plan)
    with pytest.raises(BuildTooLargeError, match="max_build_size"):
        BuildLimits(closure_size=2 * GB, build_size=2 * GB).check_plan("git", plan)


def test_a_build_may_write_three_times_an_image_unless_the_operator_says_otherwise() -> None:
    assert LIMITS.most_written == 6 * GB
    assert BuildLimits(closure_size=2 * GB, build_size=1 * GB).most_written == 1 * GB


@given(sizes, sizes)
def test_nothing_has_to_be_looked_at_below_the_least_that_is_watched(there: int, build_size: int) -> None:
    limits = BuildLimits(closure_size=2 * GB, build_size=build_size)
    part = min(there, limits.least_watched)
    limits.check_progress("git", part, part)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (
            lambda: LIMITS.check_packages("a/b/c/d", 4),
            "a/b/c/d has 4 packages, and 3 are allowed on this server: "
            "ask for less, or let the operator raise max_packages",
        ),
        (
            lambda: LIMITS.check_estimate("office", 5 * GB),
            "office would take about 5.00 GB, and an image may take 2.00 GB on this server: "
            "ask for less, or let the operator raise max_closure_size",
        ),
        (
            lambda: LIMITS.check_progress("git", 0, 7 * GB),
            "git was stopped when its build had written 7.00 GB, and a build may write 6.00 GB "
            "on this server: ask for less, or let the operator raise max_build_size",
        ),
    ],
)
def test_an_error_says_what_was_counted_what_is_allowed_and_by_which_setting(
    check: Callable[[], None], message: str
) -> None:
    with pytest.raises(BuildTooLargeError) as refused:
        check()
    assert str(refused.value) == message


def test_what_an_image_needs_of_a_disk_is_told_with_what_is_kept_free() -> None:
    LIMITS.check_free("/data", 3 * GB, 2 * GB)
    with pytest.raises(LowDiskError) as refused:
        LIMITS.check_free("/data", 3 * GB, 2 * GB + 1)
    assert str(refused.value) == (
        "the image needs 2.00 GB of what is free on the device that holds /data: 3.00 GB, of which "
        "min_free_disk keeps 1.00 GB: free some, set disk_limit or lower min_free_disk, and pull again"
    )


def refused(check: Callable[[], None]) -> str:
    """Return the setting by which something is refused, or nothing."""
    try:
        check()
    except BuildTooLargeError as error:
        return error.setting
    return ""
