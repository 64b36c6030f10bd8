"""The one error a user is meant to read: what was got, what was expected, what to do about it."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, said so that it can be mended. The command line prints it and exits with `exit_code`.

    Args: got: what was found. expected: what would have been right. remedy: what to do now.
    """

    exit_code = 2

    def __init__(self, got: str, expected: str, remedy: str) -> None:
        self.got, self.expected, self.remedy = got, expected, remedy
        super().__init__(f"got {got}; expected {expected}; remedy: {remedy}")
