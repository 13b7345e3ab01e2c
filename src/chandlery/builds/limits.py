"""How much one build may take, and when it is refused or stopped for it. No I/O.

What an image will hold is known at three moments, each time better:

1. before anything is fetched, where somebody tells: a Debian index, by an estimate, and binary caches;
2. while Nix fetches and builds: what is in the store by then, and what is being written there;
3. when all is there: the closure, to the byte.

A size that is only estimated refuses nothing that would be allowed in the end.
"""

from dataclasses import dataclass

from chandlery.errors import BuildTooLargeError, LowDiskError, in_bytes
from chandlery.nix.output import FetchPlan

# Of what a Debian index estimates, in whole KiB for each file and folder: of 796 packages of bookworm the
# middle one takes 0.94 of it as an archive, small ones less, and all together 0.98.
_CERTAIN = 0.75


def certain_size(estimated: int) -> int:
    """Return the bytes that are certain of those that a Debian index estimates."""
    return int(_CERTAIN * estimated)


@dataclass(frozen=True, slots=True)
class BuildLimits:
    """How much one build may take: packages asked for, bytes of its closure, bytes of disk left free.

    `build_size` is for the bytes that it may write, also of what isn't in the image; 0 stands for three times
    the closure's: as it is fetched, as it is in the image, and what builders write beside it.
    """

    packages: int = 100
    closure_size: int = 20 << 30
    free_disk: int = 1 << 30
    build_size: int = 0

    @property
    def most_written(self) -> int:
        """The bytes that one build may write."""
        return self.build_size or 3 * self.closure_size

    @property
    def least_watched(self) -> int:
        """The bytes below which a build has certainly reached no limit."""
        return min(self.closure_size, self.most_written)

    def check_packages(self, image: str, packages: int) -> None:
        """Raise `BuildTooLargeError` if an image has too many packages in its name."""
        if packages > self.packages:
            reason = f"has {packages} packages, and {self.packages} are allowed on this server"
            raise BuildTooLargeError(image, reason, packages, self.packages, "max_packages")

    def check_free(self, folder: str, free: int, needed: int = 0) -> None:
        """Raise `LowDiskError` if too little of a disk is left, or would be by what is `needed` (bytes)."""
        if free - needed < self.free_disk:
            raise LowDiskError(folder, free, self.free_disk, needed)

    def check_estimate(self, image: str, estimated: int) -> None:
        """Raise `BuildTooLargeError` if an image is certain to be too large by what its index estimates."""
        if certain_size(estimated) > self.closure_size:
            self._refuse_closure(image, f"would take about {in_bytes(estimated)}", estimated)

    def check_plan(self, image: str, plan: FetchPlan) -> None:
        """Raise `BuildTooLargeError` if an image is too large by what Nix is about to fetch.

        Where nothing is built but what collects the packages, all that is fetched is in the image.
        """
        if plan.derivations <= 1 and plan.unpacked > self.closure_size:
            self._refuse_closure(image, f"would take {in_bytes(plan.unpacked)}", plan.unpacked)
        if plan.unpacked > self.most_written:
            size = in_bytes(plan.unpacked)
            self._refuse_written(image, f"needs {size} of binary caches", plan.unpacked)

    def check_progress(self, image: str, there: int, written: int) -> None:
        """Raise `BuildTooLargeError` if a build has to be stopped.

        `there` are the bytes in the Nix store that are certain to be in the image, and `written` those that
        the build has added there and is writing.
        """
        if there > self.closure_size:
            self._refuse_closure(image, f"takes more than {in_bytes(there)}", there)
        if written > self.most_written:
            self._refuse_written(
                image, f"was stopped when its build had written {in_bytes(written)}", written
            )

    def check_closure(self, image: str, size: int) -> None:
        """Raise `BuildTooLargeError` if a closure shouldn't become an image."""
        if size > self.closure_size:
            self._refuse_closure(image, f"takes {in_bytes(size)}", size)

    def _refuse_closure(self, image: str, what: str, size: int) -> None:
        reason = f"{what}, and an image may take {in_bytes(self.closure_size)} on this server"
        raise BuildTooLargeError(image, reason, size, self.closure_size, "max_closure_size")

    def _refuse_written(self, image: str, what: str, size: int) -> None:
        reason = f"{what}, and a build may write {in_bytes(self.most_written)} on this server"
        raise BuildTooLargeError(image, reason, size, self.most_written, "max_build_size")
