"""apt in a private directory, without root: it checks the signatures of releases, and fetches what they list.

Its own lists of packages it doesn't fetch: `update` brings the Release files alone, and `fetch` those files
that somebody chose from them, each by its hash.
"""

import os
import re
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from chandlery.errors import SourceUnavailableError, SuiteNotFoundError
from chandlery.machine import program
from chandlery.machine.program import Limits, OutputLimitError, ProgramMissingError, TimeLimitError
from chandlery.sources.debian.progress import STATUS_OPTION
from chandlery.sources.debian.release import COMPONENT, PackagesFile

_TIMEOUT = 300.0  # seconds; apt gives up on a silent mirror long before
# What apt says of a file that a mirror has no longer, or has replaced: a larger one stops the downloader.
_REPLACED = re.compile(rf"Hash Sum mismatch|\b404 +Not Found|received signal {signal.SIGXFSZ}\b")

# No index targets: then `update` fetches no lists of packages, whatever the architecture.
# apt 3 has the second; a machine that is older than the suite may lack its keys.
_KEY_MISSING = re.compile("NO_PUBKEY|Missing key")

_CONFIGURATION = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::IndexTargets;
#clear APT::Architectures;
Acquire::Languages "none";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
Acquire::Retries "2";
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
APT::Update::Error-Mode "any";
Dir::State "{folder}/state";
Dir::State::status "/dev/null";
Dir::Cache "{folder}/cache";
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "/dev/null";
"""


class PackagesReplacedError(SourceUnavailableError):
    """The mirror doesn't have what a Release file lists: it has moved on, or is being updated."""


@dataclass(frozen=True, slots=True)
class Repository:
    """One line of a sources.list(5): the address, and the release below its `dists/`."""

    address: str
    release: str

    def url(self, path: str) -> str:
        """Return the address of a file of the release."""
        return f"{self.address}/dists/{self.release}/{path}"


class Apt:
    """apt for one suite; `source` is how messages call it. All methods raise `SourceUnavailableError`."""

    def __init__(self, folder: Path, source: str, keyring: str) -> None:
        self._folder = folder
        self._source = source
        self._keyring = keyring

    @property
    def _lists(self) -> Path:
        return self._folder / "state/lists"

    @property
    def _configuration(self) -> str:
        return str(self._folder / "apt.conf")

    async def update(
        self, repositories: Sequence[Repository], on_output: Callable[[bytes], object]
    ) -> list[bytes]:
        """Return the Release files of some releases, whose signatures are good.

        What apt writes, also of its progress, goes to `on_output` as it comes. Raises `SuiteNotFoundError` if
        the first repository says that it has no such release.
        """
        option = f"[signed-by={self._keyring}] " if self._keyring else ""
        lines = "".join(f"deb {option}{each.address} {each.release} {COMPONENT}\n" for each in repositories)
        self._configure(lines)
        try:
            command = ("apt-get", "-c", self._configuration, "-o", STATUS_OPTION, "update")
            await self._run(*command, on_output=on_output)
        except SourceUnavailableError as error:
            first = re.escape(f"{repositories[0].address} {repositories[0].release} Release'")
            if re.search(rf"{first} (does not have|no longer has) a Release file", error.reason):
                raise SuiteNotFoundError(error.source, error.reason) from error
            raise
        return [self._release(each.release) for each in repositories]

    async def fetch(
        self,
        wanted: Sequence[tuple[str, PackagesFile]],
        folder: Path,
        on_output: Callable[[bytes], object],
    ) -> None:
        """Fetch files from their addresses into a folder, each as its `name`, with its size and its hash.

        For `on_output` see `update`. Raises `PackagesReplacedError` if the mirror has others there, or none.
        """
        partial = self._lists / "partial"  # the one folder that apt's own user may write as well
        command = ["/usr/lib/apt/apt-helper", "-c", self._configuration]
        command += ["-o", STATUS_OPTION, "download-file"]
        for url, file in wanted:
            (partial / file.name).unlink(missing_ok=True)
            command += [url, str(partial / file.name), f"SHA256:{file.sha256}"]
        try:
            largest = max(file.size for _, file in wanted)
            await self._run(*command, file_size=largest, on_output=on_output)
        except SourceUnavailableError as error:
            for left in partial.glob("*.FAILED"):
                left.unlink(missing_ok=True)
            if _REPLACED.search(error.reason):
                raise PackagesReplacedError(error.source, error.reason) from error
            raise
        folder.mkdir(exist_ok=True)
        for _, file in wanted:
            (partial / file.name).rename(folder / file.name)

    async def mirrors_of_machine(self, suite: str) -> Mapping[str, str]:
        """Find the mirrors of this machine's own apt: `main` of the release it runs, and `security`."""
        # Without release info, what was never downloaded is listed too: a container's apt often has no lists.
        listed = await self._run(
            "apt-get", "indextargets", "--no-release-info",
            "--format", "$(RELEASE)|$(COMPONENT)|$(REPO_URI)", "Created-By: Packages",
        )  # fmt: skip
        found: dict[str, str] = {}
        for line in listed.splitlines():
            release, component, address = line.split("|", 2)
            # Nix fetches from there too, which doesn't know apt's other methods, such as mirror+file.
            if component != COMPONENT or not address.startswith(("http://", "https://")):
                continue
            if release.endswith(("-security", "/updates")):
                found.setdefault("security", address)
            elif release in (suite, _running_release()):
                found.setdefault("main", address)
        return found

    def _configure(self, sources: str) -> None:
        """Write apt's configuration, and make its folders; what was fetched from other sources goes."""
        sources_list = self._folder / "sources.list"
        if not sources_list.exists() or sources_list.read_text() != sources:
            shutil.rmtree(self._lists, ignore_errors=True)
        for needed in (self._lists / "partial", self._folder / "cache/archives/partial"):
            needed.mkdir(parents=True, exist_ok=True)
        (self._folder / "apt.conf").write_text(_CONFIGURATION.format(folder=self._folder))
        sources_list.write_text(sources)

    def _release(self, name: str) -> bytes:
        """Return the file that `update` has just kept of a release."""
        for ending in ("InRelease", "Release"):
            for file in self._lists.glob(f"*_dists_{name}_{ending}"):
                return file.read_bytes()
        raise SourceUnavailableError(self._source, f"apt has kept no Release file of {name}")

    async def _run(
        self, *command: str, file_size: int = 0, on_output: Callable[[bytes], object] | None = None
    ) -> str:
        """Return what one of apt's programs prints; an error has its complaint."""
        environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
        try:
            limits = Limits(_TIMEOUT, file_size=file_size)
            finished = await program.run(command, environment, limits, on_output=on_output)
        except ProgramMissingError as error:
            raise SourceUnavailableError(
                self._source, f"{error}: this package set needs Debian's apt on this machine"
            ) from error
        except TimeLimitError as error:
            raise SourceUnavailableError(self._source, f"apt did not finish within {_TIMEOUT:g} s") from error
        except OutputLimitError as error:
            raise SourceUnavailableError(self._source, f"apt was stopped: {error}") from error
        if finished.code != 0:
            complaint = finished.stderr.decode(errors="replace")
            said = [line for line in complaint.splitlines() if line[:2] in ("E:", "W:")]
            # Errors first: a warning may be about something else.
            said.sort(key=lambda line: line[0])
            reason = "; ".join(said[:4]) or f"exit code {finished.code}"
            if _KEY_MISSING.search(complaint):
                reason += ": install a newer debian-archive-keyring, or name the keys in debian_keyring"
            raise SourceUnavailableError(self._source, f"apt said: {reason}")
        return finished.stdout.decode(errors="replace")


def _running_release() -> str:
    """Return the code name of the Debian release that this machine runs (os-release(5))."""
    try:
        text = Path("/etc/os-release").read_text()
    except OSError:
        return ""
    match = re.search(r"^VERSION_CODENAME=(\S+)$", text, re.MULTILINE)
    return match[1] if match else ""
