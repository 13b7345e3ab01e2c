"""One build as a thing of its own: a recipe, an id, a state, a log, a timeline."""

import time
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path

from chandlery.access.rules import Permission
from chandlery.builds.recipe import Recipe
from chandlery.telemetry.build_timings import Timings


class BuildState(StrEnum):
    """What a build is doing, or how it ended."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(eq=False, slots=True)
class Build:
    """One build; `timeline` has each step that began, with the seconds since the build was asked for.

    `timings` has the works that it consists of, which overlap. `permissions` are those of the clients that
    have waited for it: with none it is for everybody.
    `context` is that of the request that asked for it first: what the build logs has that request's id.
    """

    recipe: Recipe
    client: str
    log_file: Path
    id: str
    asked_at: float  # seconds since the epoch
    state: BuildState = BuildState.QUEUED
    timeline: list[tuple[str, float]] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    error: Exception | None = None
    waiters: int = 0
    permissions: set[Permission] = field(default_factory=set)
    context: Context = field(default_factory=copy_context, repr=False)
    _began: float = field(default_factory=time.monotonic)

    @property
    def key(self) -> str:
        """The key of the image; see `Recipe.key`."""
        return self.recipe.key

    @property
    def image(self) -> str:
        """What people call the image."""
        return self.recipe.title

    def step(self, name: str) -> None:
        """Note in the timeline that a step begins."""
        self.timeline.append((name, round(time.monotonic() - self._began, 3)))

    @property
    def has_ended(self) -> bool:
        """Return whether nothing more will happen in it."""
        return self.state not in (BuildState.QUEUED, BuildState.RUNNING)

    @property
    def seconds(self) -> float:
        """How long it has taken since it was asked for, so far or to its end."""
        return self.timeline[-1][1] if self.has_ended else time.monotonic() - self._began

    @property
    def steps(self) -> list[tuple[str, float, float]]:
        """Return each step, its begin and its end, as in the timeline; before the first comes `queued`."""
        begun = [(BuildState.QUEUED.value, 0.0), *self.timeline]
        if not self.has_ended:
            begun.append(("", self.seconds))
        return [(name, begin, end) for (name, begin), (_, end) in pairwise(begun)]
