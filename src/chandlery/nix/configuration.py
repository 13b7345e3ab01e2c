"""How Nix is configured for a call: the same on every machine, and it sees of this process what it needs.

Nix is configured by NIX_CONFIG. With stores of its own, the machine's configuration counts for nothing; the
operator may put one for Chandlery's stores into `nix/etc/nix.conf` in the data folder.
"""

import grp
import os
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from chandlery.nix.output import LOG_TAIL

# What builders of Chandlery's own may find of this machine in their sandbox, such as what unpacks a .deb.
# Only derivations that ask for it have it (`__impureHostDeps`). Others' may not: Nix lets them ask for
# whatever is below, and follows the links that are there, on Debian from /usr to keys in /etc.
_HOST_PATHS = ("/bin", "/usr", "/lib", "/lib64", "/var/lib/dpkg")

_SANDBOX_PATHS = re.compile(r"^ *(?:extra-)?sandbox-paths *=([^\n#]*)", re.MULTILINE)

# What programs need to be found, and to reach others; none of it is a secret.
_PASSED_ON = {
    *("PATH", "TMPDIR", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR", "NIX_SSL_CERT_FILE"),
    *("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy"),
    *("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "ALL_PROXY", "NO_PROXY"),
}


@dataclass(frozen=True, slots=True)
class NixLimits:
    """How much Nix may do at once, for how many seconds, and the bytes that an evaluation may take.

    `begun_after` is for `nix.store_lock`, `builder_timeout` for one derivation. An `evaluation_memory` of 0
    is no limit, and so is a `builder_timeout`. What evaluates, fetches or builds is stopped when fewer than
    `free_disk` bytes are left where the store is.
    """

    build_timeout: float = 3600.0
    evaluation_timeout: float = 120.0
    jobs: int = 4
    begun_after: float = 30.0
    evaluation_memory: int = 8 << 30
    builder_timeout: int = 0
    free_disk: int = 0


@dataclass(frozen=True, slots=True)
class NixOptions:
    """What the operator chooses: beginnings of addresses that evaluations may fetch from, and binary caches.

    Binary caches, and the keys that sign them, are those of Chandlery's own store; None is Nix's default.
    `host_paths` is what builders of package sets other than the Debian set may ask to see of this machine.
    """

    allowed_uris: tuple[str, ...] = ("https:", "http:")
    substituters: tuple[str, ...] | None = None
    trusted_public_keys: tuple[str, ...] | None = None
    host_paths: tuple[str, ...] = ()


class Purpose(Enum):
    """What a call is for: it decides what Nix sees of this machine, and whether it asks binary caches.

    BUILD is for what Chandlery's own expressions describe, BUILD_OTHERS for every other package set.
    EVALUATE reads files that are named, and PURELY_EVALUATE none: a flake has all that it needs in the store.
    FETCH has the operator's credentials, for git and ssh.
    """

    OWN = "own"
    BUILD = "build"
    BUILD_OTHERS = "build others"
    EVALUATE = "evaluate"
    PURELY_EVALUATE = "purely evaluate"
    FETCH = "fetch"


def host_paths() -> list[str]:
    """Return what builders of Chandlery's own find of this machine."""
    return [path for path in _HOST_PATHS if Path(path).exists()]


@dataclass(frozen=True, slots=True)
class NixConfiguration:
    """Of one store: `folder` holds a store of Chandlery's own, None stands for the machine's.

    In `files` is what the operator says about stores of Chandlery's own, in a `nix.conf`.
    """

    folder: Path | None
    limits: NixLimits
    options: NixOptions
    files: Path

    @property
    def temporary_folder(self) -> Path:
        """Where Nix makes the folders that builders work in."""
        return Path(os.environ.get("TMPDIR") or "/tmp")  # noqa: S108

    def environment(self, purpose: Purpose) -> dict[str, str]:
        """Return the environment of a call."""
        environment = self._passed_on(purpose)
        environment |= {"LC_ALL": "C.UTF-8", "GIT_TERMINAL_PROMPT": "0"}
        if self.folder is not None:
            # The machine's own configuration is about the machine's own store.
            environment["NIX_CONF_DIR"] = str(self.files)
            environment["NIX_USER_CONF_FILES"] = ""
            environment["XDG_CACHE_HOME"] = str(self.folder / "cache")
        settings = self._settings() | self._settings_for(purpose)
        environment["NIX_CONFIG"] = "".join(f"{name} = {value}\n" for name, value in settings.items())
        return environment

    def _passed_on(self, purpose: Purpose) -> dict[str, str]:
        """Return what Nix gets of this process's environment.

        A package set can read it: by `impureEnvVars` of a derivation, through git, through what Nix caches.
        """
        if purpose is Purpose.FETCH:
            names = {name for name in os.environ if not name.startswith("NIX_")} | {"NIX_SSL_CERT_FILE"}
        else:
            names = _PASSED_ON
        if self.folder is None:
            names = names | {"NIX_REMOTE"}
        environment = {name: os.environ[name] for name in names if name in os.environ}
        if purpose is not Purpose.FETCH:
            # Not the operator's, with their .netrc, .gitconfig and keys.
            environment["HOME"] = "/nonexistent"
            environment |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null"}
            if self.folder is None:
                environment |= _own_folders()
        return environment

    def _settings(self) -> dict[str, str]:
        """Return what is the same for all calls."""
        settings = {
            "experimental-features": "nix-command",
            "sandbox": "true",
            "sandbox-fallback": "false",
            # How often (seconds) to see whether another Nix has built what this one waits for; 5 if not set.
            "build-poll-interval": "1",
            "max-jobs": str(self.limits.jobs),
            "timeout": str(self.limits.builder_timeout),
            "connect-timeout": "15",
            "stalled-download-timeout": "60",
            "download-attempts": "3",
            # A binary cache that fails in the middle is no reason not to build.
            "fallback": "true",
            "log-lines": str(LOG_TAIL),
        }
        if self.folder is not None:
            settings |= {"store": str(self.folder), "build-users-group": ""}
            if self.options.substituters is not None:
                settings["substituters"] = " ".join(self.options.substituters)
            if self.options.trusted_public_keys is not None:
                settings["trusted-public-keys"] = " ".join(self.options.trusted_public_keys)
        elif os.geteuid() == 0 and not _has_build_users():
            # Debian's nix-bin alone makes no users to build as, and Nix would refuse to build without.
            settings["build-users-group"] = ""
        return settings

    def _settings_for(self, purpose: Purpose) -> dict[str, str]:
        # What is evaluated may be built meanwhile.
        others = {"allowed-impure-host-deps": " ".join(self.options.host_paths)}
        if self.options.host_paths:
            others |= self._sandbox_paths()
        match purpose:
            case Purpose.EVALUATE:
                uris = " ".join(self.options.allowed_uris)
                return others | {"restrict-eval": "true", "allowed-uris": uris}
            case Purpose.PURELY_EVALUATE:
                return others | {"experimental-features": "nix-command flakes", "pure-eval": "true"}
            case Purpose.FETCH:
                return {"experimental-features": "nix-command flakes", "accept-flake-config": "false"}
            case Purpose.BUILD_OTHERS:
                return others | {"connect-timeout": "5"}
            case _:
                # A binary cache that can't be reached costs seconds, each time that Nix asks.
                own = {"substitute": "false", "allowed-impure-host-deps": " ".join(host_paths())}
                return own | self._sandbox_paths()

    def _sandbox_paths(self) -> dict[str, str]:
        """Return what builders that may ask for paths of this machine find unasked: what the operator says.

        Nix's default is a shell at /bin/sh. But where a builder asks for /bin, and that is a link, Nix 2.26
        shows it as one, and can show nothing below it.
        """
        try:
            text = (self.files / "nix.conf").read_text(errors="replace")
        except OSError:
            text = ""
        return {"sandbox-paths": " ".join(each[1].strip() for each in _SANDBOX_PATHS.finditer(text))}


def _own_folders() -> dict[str, str]:
    """Return where the machine's Nix keeps this user's configuration and cache, wherever HOME is."""
    home = Path.home()
    return {
        "XDG_CONFIG_HOME": os.environ.get("XDG_CONFIG_HOME") or str(home / ".config"),
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or str(home / ".cache"),
    }


def builds_as_others() -> bool:
    """Return whether the machine's Nix builds as users that can't change its store."""
    return _has_build_users() if os.geteuid() == 0 else not os.access("/nix/store", os.W_OK)


def _has_build_users() -> bool:
    try:
        grp.getgrnam("nixbld")
    except KeyError:
        return False
    return True
