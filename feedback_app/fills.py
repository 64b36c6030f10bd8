"""Campaigns that are being made in the background: to hear thousands of clips takes longer than a request should last.

    POST -> start -> a thread of its own, one at a time -> waiting, running (stage, done of total), done or failed

A campaign is stored in one transaction at the very end, so that whatever ends a fill early, the server's own end included, leaves nothing
half-made. What ran is remembered until the server ends.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from base_models.errors import UserError
from db.campaigns import CampaignSummary
from db.errors import RefusedError, StoreError
from feedback_app.campaigns import Progress

logger = logging.getLogger(__name__)

MAX_WAITING = 8
"""Fills that may wait or run at once."""
REMEMBERED = 20
"""Fills that are told of, the newest."""


@dataclass
class Fill:
    """One campaign in the making. `state`: waiting, running, done or failed."""

    id: int
    name: str
    state: str = "waiting"
    stage: str = ""
    done: int = 0
    total: int = 0
    made: CampaignSummary | None = None
    error: UserError | StoreError | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def tell(self, stage: str, done: int, total: int) -> None:
        self.stage, self.done, self.total = stage, done, total


class Fills:
    """What is being made on this server. Safe to share between threads."""

    def __init__(self) -> None:
        self._fills: list[Fill] = []
        self._ids = itertools.count(1)
        self._change = threading.Lock()
        self._turn = threading.Lock()

    def start(self, name: str, work: Callable[[Progress], CampaignSummary]) -> Fill:
        """Begins to make a campaign. Raises RefusedError when too many are being made."""
        with self._change:
            if sum(not fill.over.is_set() for fill in self._fills) >= MAX_WAITING:
                raise RefusedError(f"{MAX_WAITING} campaigns in the making", "fewer at once", "wait until one is made")
            fill = Fill(next(self._ids), name)
            self._fills = [*self._fills[-REMEMBERED + 1 :], fill]
        threading.Thread(target=self._run, args=(fill, work), name=f"fill-{fill.id}", daemon=True).start()
        return fill

    def newest_first(self) -> list[Fill]:
        with self._change:
            return self._fills[::-1]

    def _run(self, fill: Fill, work: Callable[[Progress], CampaignSummary]) -> None:
        with self._turn:
            fill.state = "running"
            try:
                fill.made = work(fill.tell)
            except (UserError, StoreError) as error:
                fill.error = error
            except Exception:
                logger.exception("campaign %r could not be made", fill.name)
                fill.error = StoreError("an unforeseen failure", "a campaign that can be made", "look at the server's log")
            fill.state = "done" if fill.made else "failed"
            fill.over.set()
