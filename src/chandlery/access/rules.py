"""Who may pull what, and how much: one rule for each user, and one for everybody else. No I/O.

    [access.default]
    deny = ["nmap*"]
    builds_per_hour = 20

    [access.users.alice]
    allow = ["shell", "git", "python3*"]

What a rule doesn't say is as in `default`. Patterns are those of a shell (fnmatch), compared without regard
to case, as packages are looked up.

- `allow` is compared with what the client has written: its packages and profiles. What a profile adds needs
  no mention.
- `deny` is compared with that, and with what it turns out to be: the names that a package has beside the one
  that was written (`Resolution.names`), of the packages that profiles add as well. What is denied without a
  wildcard is also looked up, and denies every name that leads to the same derivation; so does what is denied
  below a set (`python3Packages.*`).
- `sources` is compared with the text of the package source, and its name. Unless it is the name that
  matches, a tag that chooses another suite, branch or channel has chosen another source.

What a package depends on comes along, and so does what is in every image.
"""

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from chandlery.errors import PullDeniedError
from chandlery.image.name import ImageRequest, paths_within

# Sets around a package that are looked into; more only a client would write that goes round in circles.
_MOST_SETS = 8

_WILDCARD = re.compile(r"[*?\[]")


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
        """Return what of a request is refused as it is written: the package source, or else packages.

        `source` is the text of the package source, and its name if it has one: either is as good. Profiles
        count as packages.
        """
        if not self.allows_source(source):
            return (_from_source(request),)
        names = (*request.profiles, *request.packages)
        return tuple(
            name
            for name in names
            if self.denies(paths_within(name.split("."))) or not _matches(name, self.allow)
        )

    def allows_source(self, names: Iterable[str]) -> bool:
        """Return whether a package source that is called so may be pulled from."""
        return any(_matches(each, self.sources) for each in names)

    def denies(self, names: Iterable[str]) -> bool:
        """Return whether a package with these names, of which one is enough, is denied."""
        return any(_matches(each, self.deny) for each in names)

    def may_name(self, name: str) -> bool:
        """Return whether an attribute path may be told to who may pull what the rule says."""
        return _matches(name, self.allow) and not self.denies(paths_within(name.split(".")))

    def denied_paths(
        self, path: Sequence[str], names: Iterable[str], place: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """Return attribute paths that are denied, and may lead to the package at `path`, which has `names`.

        These are the patterns without a wildcard. With `python3Packages.*` denied, `python311Packages.numpy`
        may be `python3Packages.numpy`. What stands in a set, at `place`, may be what is denied there:
        `pkgsStatic.openjdk` may be `pkgsStatic.jdk`.
        """
        ends: list[str] = []
        for pattern in self.deny:
            parts = pattern.split(".")
            literal = list(takewhile(lambda part: _WILDCARD.search(part) is None, parts))
            if literal == parts:
                ends.append(pattern)
            elif literal:
                ends += _below(literal, pattern, len(parts) - len(literal), path, names)
        sets = [place[:length] for length in range(len(place), 0, -1)][:_MOST_SETS]
        return tuple(dict.fromkeys(".".join([*found, end]) for found in ((), *sets) for end in ends))


@dataclass(frozen=True, slots=True)
class Permission:
    """What one client may have of one package source; `user` is empty for who hasn't logged in.

    `source` is what rules may call the package source: its text, and its name if it has one.
    """

    user: str = ""
    rule: Rule = field(default_factory=Rule)
    source: tuple[str, ...] = ("",)

    def check_written(self, request: ImageRequest) -> None:
        """Raise `PullDeniedError` if a request is refused as it is written."""
        self.refuse(self.rule.denied(request, self.source))

    def allows_tag(self, chosen: str) -> bool:
        """Return whether a tag may be used that chooses the package source of this text; empty for none."""
        text, *name = self.source
        return self.rule.allows_source((chosen or text, *name))

    def refuse(self, denied: Sequence[str]) -> None:
        """Raise `PullDeniedError` if anything is denied."""
        if denied:
            raise PullDeniedError(self.user, denied)


EVERYTHING = Permission()


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


def _from_source(request: ImageRequest) -> str:
    # Not where that is: whoever may not pull from it need not know.
    return f"from {request.source or 'the default source'}"


def _below(
    place: Sequence[str], pattern: str, length: int, path: Sequence[str], names: Iterable[str]
) -> Iterator[str]:
    """Yield what matches a pattern below a set, and ends as an attribute path does, or in a name."""
    ends = [".".join(path[begin : begin + length]) for begin in range(len(path) - length + 1)]
    for end in (*ends, *names):
        found = ".".join([*place, end])
        if _matches(found, (pattern,)):
            yield found


def _matches(text: str, patterns: tuple[str, ...]) -> bool:
    return _expression(patterns).match(text.lower()) is not None


@cache
def _expression(patterns: tuple[str, ...]) -> re.Pattern[str]:
    # Without a pattern this matches the empty text alone, which is no name.
    return re.compile("|".join(fnmatch.translate(pattern.lower()) for pattern in patterns) or r"\Z")
