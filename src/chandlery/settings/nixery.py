"""Nixery's environment variables, as the settings that mean the same here; its own settings win over them.

They count where its storage or one of its package sources is named, for there Nixery was configured: PORT is
a variable of many programs. Of two variables for one setting the first in the table counts, as in Nixery.
"""

from collections.abc import Container, Mapping
from typing import Any

from chandlery.errors import SettingsError
from chandlery.settings.places import Origin, Place

# variable, setting, and the setting's value made of the variable's.
_VARIABLES = (
    ("PORT", "port", "{}"),
    ("NIXERY_CHANNEL", "source", "nixpkgs!{}"),
    ("NIXERY_PKGS_REPO", "source", "git!{}"),
    ("NIXERY_PKGS_PATH", "source", "path!{}"),
    ("NIX_TIMEOUT", "builder_timeout", "{}"),
    ("NIX_POPULARITY_URL", "popularity", "{}"),
)

_BACKEND = "NIXERY_STORAGE_BACKEND"
# Likewise, of the storage that NIXERY_STORAGE_BACKEND chooses: each has to be there. Nixery's own files in
# STORAGE_PATH stay as they are, so it can be gone back to.
_STORAGE = {
    "filesystem": ("STORAGE_PATH", "data_dir", "{}/chandlery"),
    "gcs": ("GCS_BUCKET", "storage", "gs://{}"),
    "s3": ("S3_BUCKET", "storage", "s3://{}"),
}
# Nixery sends clients to URLs without a signature then, which no bucket of Chandlery's is open for.
_UNSIGNED = ("S3_USE_PRESIGNED_URLS", "storage_redirects", "false")

# Nixery listens at every address, and knows no users.
_AS_NIXERY_DOES = {"host": "0.0.0.0", "anonymous": "read"}  # noqa: S104

_IN_USE = (_BACKEND, *(variable for variable, setting, _ in _VARIABLES if setting == "source"))


class NixeryEnvironment:
    """What Nixery's variables say; `said` are the settings that other places have."""

    def __init__(self, environment: Mapping[str, str], said: Container[str]) -> None:
        self._environment = environment
        self._said = said

    @property
    def in_use(self) -> str:
        """The variable that tells that Nixery was configured here; empty if it wasn't."""
        return next((name for name in _IN_USE if self._environment.get(name)), "")

    @property
    def ignored(self) -> list[str]:
        """Nixery's variables that mean nothing here, though they are set."""
        return ["WEB_DIR"] if self.in_use and self._environment.get("WEB_DIR") else []

    def place(self) -> Place:
        """Return the settings that they make. Raises `SettingsError` where Nixery wouldn't start either."""
        values: dict[str, Any] = {}
        origins: dict[str, Origin] = {}
        if not self.in_use:
            return Place(values, origins)

        def say(setting: str, value: Any, variable: str) -> None:
            if setting not in values:
                values[setting] = value
                origins[setting] = Origin("nixery", variable)

        for variable, setting, form in (*_VARIABLES, *self._storage()):
            if value := self._environment.get(variable):
                say(setting, form.format(value), variable)
        if self._environment.get(_UNSIGNED[0]) == _UNSIGNED[2]:
            say(_UNSIGNED[1], False, _UNSIGNED[0])
        if "users_file" not in self._said:
            for setting, value in _AS_NIXERY_DOES.items():
                say(setting, value, self.in_use)
        else:
            say("host", _AS_NIXERY_DOES["host"], self.in_use)
        return Place(values, origins)

    def _storage(self) -> list[tuple[str, str, str]]:
        backend = self._environment.get(_BACKEND)
        if not backend:
            return []
        if backend not in _STORAGE:
            raise SettingsError(f"{_BACKEND}: {backend!r} is none of {', '.join(_STORAGE)}")
        variable, setting, form = _STORAGE[backend]
        if setting not in self._said and not self._environment.get(variable):
            raise SettingsError(
                f"{_BACKEND} is {backend}, and {variable} isn't set: set it, or {setting} instead of both"
            )
        return [(variable, setting, form)]
