"""How often somebody may try: token buckets in this process, with a bound on their number.

Generous for people and for the load that one server carries; a wall only for a loop that guesses or floods.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

from fastapi import HTTPException, Request


class Buckets:
    """One bucket a key: `burst` at once, then `per_s` a second. Holds at most `capacity` keys and forgets the idlest first.

    A forgotten key starts full again, so memory is bounded at the price of a limit that a flood of keys can soften.
    """

    def __init__(self, per_s: float, burst: int, capacity: int = 20_000, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._burst, self._capacity, self._clock = per_s, float(burst), capacity, clock
        self._filled: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()  # key -> (tokens, as of)
        self._turn = threading.Lock()

    def take(self, key: Hashable, tokens: float = 1.0) -> float:
        """Takes a token; returns 0, or the seconds until there is one. With `tokens=0` it only asks."""
        with self._turn:
            now = self._clock()
            have, as_of = self._filled.get(key, (self._burst, now))
            have = min(self._burst, have + (now - as_of) * self._per_s)
            if have < 1.0:
                return (1.0 - have) / self._per_s
            if tokens:
                self._filled[key] = (have - tokens, now)
                self._filled.move_to_end(key)
                while len(self._filled) > self._capacity:
                    self._filled.popitem(last=False)
            return 0.0

    def __len__(self) -> int:
        return len(self._filled)


class Limits:
    """The limits of one server. Failed sign-ins by name and address together, and by address; votes and changes by person.

    A name is never locked as such: a stranger could lock its owner out.
    """

    def __init__(self) -> None:
        self.named = Buckets(per_s=1 / 6, burst=10)
        self.address = Buckets(per_s=1.0, burst=100)
        self.votes = Buckets(per_s=30.0, burst=300)
        self.changes = Buckets(per_s=5.0, burst=100)
        self.checks = Buckets(per_s=1 / 60, burst=10)

    def before_sign_in(self, request: Request, name: str) -> None:
        """Raises HTTPException 429 after too many failures from here."""
        address = _address(request)
        _refuse_if(max(self.named.take((name, address), 0), self.address.take(address, 0)), "failed sign-ins")

    def sign_in_failed(self, request: Request, name: str) -> None:
        address = _address(request)
        self.named.take((name, address))
        self.address.take(address)

    def vote(self, rater_id: int) -> None:
        """Raises HTTPException 429 for more votes than any listener gives."""
        _refuse_if(self.votes.take(rater_id), "votes")

    def check(self, rater_id: int) -> None:
        """Raises HTTPException 429 for more headphone checks than patience gives: one in 56 is passed by guessing."""
        _refuse_if(self.checks.take(rater_id), "headphone checks")

    def change(self, owner_id: int) -> None:
        """Raises HTTPException 429 for more changes than any owner makes."""
        _refuse_if(self.changes.take(owner_id), "changes")


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _refuse_if(wait_s: float, what: str) -> None:
    if wait_s > 0:
        seconds = math.ceil(wait_s)
        detail = {"got": f"too many {what}", "expected": "fewer in a row", "remedy": f"try again in {seconds} s"}
        raise HTTPException(429, detail, {"Retry-After": str(seconds)})
