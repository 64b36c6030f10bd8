"""The one error a user is meant to read: what was got, what was expected, what to do about it."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input, said so that it can be mended. The command line prints it and exits with `exit_code`.

    Args: got: what was found. expected: what would have been right. remedy: what to do now.
    """

    exit_code = 2

    def __init__(self, got: str, expected: str, remedy: str) -> None:
        self.got, self.expected, self.remedy = got, expected, remedy
        super().__init__(f"got {got}; expected {expected}; remedy: {remedy}")


def ended(main: Callable[[], int]) -> int:
    """The exit code of a program's `main`; bad input ends it with that of the error, and one line on stderr."""
    try:
        return main()
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code


DISK_TROUBLE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or have the quota raised",
    errno.EFBIG: "raise the limit on file sizes",
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.EACCES: "mend its permissions, or choose another folder",
    errno.EPERM: "mend its permissions, or choose another folder",
    errno.EIO: "check the disk",
}


def disk_trouble(error: OSError) -> UserError | None:
    """A disk that is full, read-only or not ours, in words; None for any other error of the system (a bug, say)."""
    remedy = DISK_TROUBLE.get(error.errno or 0)
    if remedy is None:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return UserError(f"{where}{error.strerror}", "a place that can be written, with room", f"{remedy}, then call again")
