"""Who may pull what, and how much: one rule for each user, and one for everybody else. No I/O.

    [access.default]
    deny = ["nmap*"]
    builds_per_hour = 20

    [access.users.alice]
    allow = ["shell", "git", "python3*"]

What a rule doesn't say is as in `default`. Patterns are those of a shell (fnmatch) and are compared with the
attribute paths of an image name, without regard to case, as packages are looked up. They see what the client
has written, not what a package depends on, nor that two names mean one package.
"""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from chandlery.image.name import ImageRequest


class Rule(BaseModel):
    """What one client may do; 0 is no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    allow: tuple[str, ...] = ("*",)
    deny: tuple[str, ...] = ()
    sources: tuple[str, ...] = ("*",)
    requests_per_minute: int = Field(default=0, ge=0)
    builds_per_hour: int = Field(default=0, ge=0)

    @property
    def restricts(self) -> bool:
        """Return whether there is anything that it refuses."""
        return (self.allow, self.deny, self.sources) != (("*",), (), ("*",))

    def denied(self, request: ImageRequest, source: Sequence[str]) -> tuple[str, ...]:
        """Return what of a request is refused: the package source, or else packages; profiles count as such.

        `source` is the text of the package source, and its name if it has one: either is as good.
        """
        if not any(_matches(each, self.sources) for each in source):
            return (f"from {source[0]}",)
        names = (*request.profiles, *request.packages)
        return tuple(name for name in names if _matches(name, self.deny) or not _matches(name, self.allow))


class AccessRules(BaseModel):
    """The rule of each client; `anonymous` is that of clients that have not logged in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    default: Rule = Field(default_factory=Rule)
    anonymous: Rule = Field(default_factory=Rule)
    users: Mapping[str, Rule] = Field(default_factory=dict)

    _complete: dict[str | None, Rule] = PrivateAttr(default_factory=dict)

    def model_post_init(self, _: Any) -> None:
        """Fill in what each rule leaves to the default."""
        for name, rule in [(None, self.anonymous), *self.users.items()]:
            said = {field: getattr(rule, field) for field in rule.model_fields_set}
            self._complete[name] = self.default.model_copy(update=said)

    @property
    def restrict(self) -> bool:
        """Return whether there is anything that not everybody may have."""
        return any(rule.restricts for rule in (self.default, *self._complete.values()))

    def of(self, user: str | None) -> Rule:
        """Return the rule of a user; None is a client that has not logged in."""
        return self._complete.get(user, self.default)


def _matches(text: str, patterns: tuple[str, ...]) -> bool:
    return _expression(patterns).match(text.lower()) is not None


@cache
def _expression(patterns: tuple[str, ...]) -> re.Pattern[str]:
    # Without a pattern this matches the empty text alone, which is no name.
    return re.compile("|".join(fnmatch.translate(pattern.lower()) for pattern in patterns) or r"\Z")
