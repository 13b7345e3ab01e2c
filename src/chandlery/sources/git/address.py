"""Where a git repository is, as git-fetch(1) takes it ("GIT URLS"); no I/O.

Only these forms are taken: git has transport helpers besides, such as `ext::`, which run programs.
"""

import re
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import unquote

FORMS = (
    "https://host/path, http://, ssh://git@host/path, git@host:path, git://host/path, "
    "file:///path or an absolute path"
)

_HOST = r"(?:[A-Za-z0-9_](?:[A-Za-z0-9_.-]*)|\[[0-9a-fA-F:.]+\])"
_URL = re.compile(
    rf"(?P<scheme>https?|ssh|git)://(?:(?P<user>[^@/:]*)(?::(?P<password>[^@/]*))?@)?"
    rf"(?P<place>{_HOST}(?::[0-9]+)?)(?P<path>/.*)"
)
# host:path; a path that begins with a colon would make it a transport helper.
_SSH_SHORT = re.compile(rf"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?{_HOST}:(?![:-]|//).+")
_FILE = re.compile(r"(?:file://)?/.*")
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f]")


@dataclass(frozen=True, slots=True)
class GitAddress:
    """An address; `location` has no credentials in it, and those of a URL stand beside it.

    `place` is the scheme and host of http and https, for which the credentials are meant, and else empty.
    """

    location: str
    place: str = ""
    user: str = ""
    password: str = field(default="", repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an address; `ValueError` says what is wrong with it."""
        if _FORBIDDEN.search(text):
            raise ValueError("an address has no blanks")
        if _FILE.fullmatch(text):
            return cls(text)
        url = _URL.fullmatch(text)
        if url is None:
            if "://" not in text and _SSH_SHORT.fullmatch(text):
                return cls(text)
            raise ValueError(f"git takes {FORMS}")
        scheme, place, path = url["scheme"], url["place"], url["path"]
        user, password = url["user"] or "", url["password"] or ""
        if scheme in ("http", "https"):
            server = f"{scheme}://{place}"
            return cls(f"{server}{path}", server, unquote(user), unquote(password))
        if password or user.startswith("-"):
            raise ValueError(f"{scheme}:// takes no password; ssh has keys")
        # Who it is that logs in belongs to the address, as in git@host:path.
        return cls(f"{scheme}://{user}@{place}{path}" if user else text)
