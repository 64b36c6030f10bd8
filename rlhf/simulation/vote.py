"""Twelve simulated raters vote through the app's HTTP API, and through nothing else.

    python -m rlhf.simulation.vote --url http://127.0.0.1:7860 --raters raters.json --campaign NAME --seed 0

`raters.json`: [{"handle": ..., "token": ...}, ...]. Each rater is a thread that signs in, asks for a pair, fetches the
bytes of both sides, listens (rlhf.simulation.taste), answers (rlhf.simulation.raters) and goes on until the app says
that no pair is left. A vote carries an idempotency key, so that one that was sent twice is stored once. The app sees
nothing that a browser would not send.

Where the campaign demands a least listening time, the raters wait it out: an honest client cannot listen faster than
the clock."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from rlhf.simulation import raters, taste

RETRIED = (429, 500, 502, 503, 504)


class ScoreCache:
    """Gold scores by taste, content and gain, shared by all raters: a clip is analysed once."""

    def __init__(self, name: str = taste.DEFAULT) -> None:
        self.name = name
        self._scores: dict[tuple[str, float], float] = {}
        self._lock = threading.Lock()

    def score(self, audio: bytes, gain_db: float) -> tuple[str, float]:
        """-> sha256 of the bytes, the score."""
        sha256 = hashlib.sha256(audio).hexdigest()
        key = (sha256, round(gain_db, 2))
        with self._lock:
            known = self._scores.get(key)
        if known is None:
            known = taste.score_bytes(audio, gain_db, self.name)
            with self._lock:
                self._scores[key] = known
        return sha256, known


@dataclass
class Progress:
    """What has been answered so far, over all raters."""

    choices: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    retries: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def votes(self) -> int:
        return sum(self.choices.values())


class Rater:
    """A signed-in rater over HTTP."""

    def __init__(self, client: httpx.Client, handle: str, token: str, progress: Progress, patience_s: float) -> None:
        self.client, self.progress, self.patience_s = client, progress, patience_s
        answer = self.request("POST", "/api/v1/login", json={"handle": handle, "token": token})
        self.headers = {"Authorization": f"Bearer {answer.json()['session']}"}

    def request(self, method: str, path: str, headers: dict[str, str] | None = None, **kwargs: Any) -> httpx.Response:
        """One request, repeated with growing pauses while the server is away or busy; other refusals are raised."""
        pause_s, deadline = 0.1, time.monotonic() + self.patience_s
        while True:
            try:
                answer = self.client.request(method, path, headers=headers, **kwargs)
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
            else:
                if answer.status_code not in RETRIED or time.monotonic() > deadline:
                    if answer.is_error:
                        raise httpx.HTTPStatusError(
                            f"{method} {path}: {answer.status_code} {answer.text[:300]}",
                            request=answer.request,
                            response=answer,
                        )
                    return answer
            with self.progress.lock:
                self.progress.retries += 1
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 2.0)

    def vote_once(self, listener: raters.Listener, campaign: str | None, cache: ScoreCache, seed: object, index: int) -> bool:
        """Rate the next pair. False when none is left."""
        answer = self.request("GET", "/api/v1/pairs/next", params={"campaign": campaign} if campaign else {}, headers=self.headers)
        if answer.status_code == 204:
            return False
        started = time.monotonic()
        pair = answer.json()
        heard = {
            side: cache.score(self.request("GET", pair["audio"][side], headers=self.headers).content, float(pair["gain_db"][side]))
            for side in ("a", "b")
        }
        (sha_a, gold_a), (sha_b, gold_b) = heard["a"], heard["b"]
        choice = raters.choose(listener, gold_a, gold_b, raters.stream(seed, sha_a, sha_b, index))

        least_s = float(pair.get("min_listen_ms") or 0) / 1000
        waited = time.monotonic() - started
        if least_s and waited < 2 * least_s + 0.05:
            time.sleep(2 * least_s + 0.05 - waited)
        each_ms = int((time.monotonic() - started) * 500)
        vote = {
            "assignment_id": pair["assignment_id"],
            "choice": choice,
            "listen_ms": {"a": each_ms, "b": each_ms},
        }
        stored = self.request("POST", "/api/v1/votes", json=vote, headers={**self.headers, "Idempotency-Key": str(uuid.uuid4())})
        with self.progress.lock:
            self.progress.choices[choice] += 1
            self.progress.duplicates += bool(stored.json().get("duplicate"))
        return True


def run(
    url: str,
    accounts: list[dict[str, str]],
    campaign: str | None = None,
    seed: int = 0,
    votes_per_rater: int | None = None,
    patience_s: float = 60.0,
    tell: Callable[[Progress], None] | None = None,
    transport: httpx.BaseTransport | None = None,
    taste_name: str = taste.DEFAULT,
) -> Progress:
    """Let every account vote in its own thread until no pair is left for it, or until it has given `votes_per_rater`
    votes.

    Raises the first rater's error after all have stopped. `transport` replaces the network in tests.
    """
    cache, progress, failed = ScoreCache(taste_name), Progress(), threading.Event()
    listeners = raters.crew(len(accounts))

    def work(number: int) -> None:
        account = accounts[number]
        try:
            with httpx.Client(base_url=url, timeout=60.0, transport=transport) as client:
                rater = Rater(client, account["handle"], account["token"], progress, patience_s)
                given: int = 0
                while (votes_per_rater is None or given < votes_per_rater) and not failed.is_set():
                    if not rater.vote_once(listeners[number], campaign, cache, f"{seed}|{number}", given):
                        break
                    given += 1
                    if tell is not None:
                        tell(progress)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(max_workers=len(accounts), thread_name_prefix="rater") as pool:
        futures = [pool.submit(work, number) for number in range(len(accounts))]
    for future in futures:
        future.result()
    return progress


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="the rating app, such as http://127.0.0.1:7860")
    parser.add_argument("--raters", required=True, type=Path, help='JSON: [{"handle": ..., "token": ...}, ...]')
    parser.add_argument("--campaign", default=None, help="rate only this campaign")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--votes-per-rater", type=int, default=None, help="stop after so many (default: when no pair is left)")
    parser.add_argument("--taste", choices=sorted(taste.TASTES), default=taste.DEFAULT, help="what the raters like")
    parser.add_argument("--patience-s", type=float, default=60.0, help="how long to wait for a server that is away")
    args = parser.parse_args(argv)
    try:
        accounts = json.loads(args.raters.read_text(encoding="utf-8"))
        if not accounts or not all({"handle", "token"} <= set(account) for account in accounts):
            raise ValueError("no accounts with handle and token")
    except (OSError, ValueError, TypeError) as error:
        print(
            f"got {args.raters}: {error}; expected a JSON list of handle and token; remedy: write one line a rater",
            file=sys.stderr,
        )
        return 2

    started = time.monotonic()
    last_told = 0.0

    def tell(progress: Progress) -> None:
        nonlocal last_told
        now = time.monotonic()
        with progress.lock:
            if now - last_told < 1.0:
                return
            last_told = now
            print(f"{progress.votes} votes, {progress.votes / (now - started):.1f} a second", flush=True)

    try:
        progress = run(args.url, accounts, args.campaign, args.seed, args.votes_per_rater, args.patience_s, tell, taste_name=args.taste)
    except httpx.HTTPError as error:
        print(f"got {error}; expected a rating app at {args.url}; remedy: start it and check the raters' tokens", file=sys.stderr)
        return 2
    seconds = time.monotonic() - started
    summary = {
        "votes": progress.votes,
        "choices": dict(progress.choices),
        "duplicates": progress.duplicates,
        "retries": progress.retries,
        "seconds": round(seconds, 2),
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
