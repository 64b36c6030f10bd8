"""What the store says when it cannot do what it was asked: what was got, what was expected, what to do about it."""

from __future__ import annotations


class StoreError(Exception):
    """Bad input or a database in trouble, said so that it can be mended. The command line prints it and exits with 2.

    Args: got: what was found. expected: what would have been right. remedy: what to do now.
    """

    exit_code = 2

    def __init__(self, got: str, expected: str, remedy: str) -> None:
        self.got, self.expected, self.remedy = got, expected, remedy
        super().__init__(f"got {got}; expected {expected}; remedy: {remedy}")


class NotFoundError(StoreError):
    """The thing named does not exist, or not for this rater (HTTP 404)."""


class RefusedError(StoreError):
    """The request is understood and not acceptable, a vote after too little listening say (HTTP 422)."""


class ScreenDueError(StoreError):
    """What waits for this rater wants a passed headphone check first (HTTP 403)."""


class ConflictError(StoreError):
    """The request contradicts something already stored (HTTP 409)."""


class UnavailableError(StoreError):
    """The database is locked, read-only, full or away: nothing was written, try again later (HTTP 503)."""


class NoVotesError(StoreError):
    """A campaign in which no vote counts: there is nothing to freeze."""
