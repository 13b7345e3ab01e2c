"""What the operating system says about a folder, as errors that name it and say what to do."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chandlery.errors import StorageError, StorageFullError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})

# Bytes.
_LEAST_SPACE = 1 << 20


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn what the operating system says about `folder` into `StorageError` and `StorageFullError`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageFullError(str(folder)) from error
        advice = "let the user that runs chandlery write there, or " if error.errno in _DENIED else ""
        raise StorageError(
            f"{error.filename or folder}: {error.strerror}: {advice}choose another data folder"
        ) from error


def is_full(folder: Path) -> bool:
    """Return whether a folder's disk is as good as full, whatever a program that wrote there calls it."""
    return shutil.disk_usage(folder).free < _LEAST_SPACE
