"""Simulated raters vote through the app's HTTP API, and through nothing else.

    python -m rlhf.simulation.vote --url http://127.0.0.1:7860 --raters raters.json --campaign NAME --seed 0
    python -m rlhf.simulation.vote ... --taste drive --crew crowd --careless 0.3

`raters.json`: [{"handle": ..., "token": ...}, ...]. Each rater is a thread that signs in, asks for a pair, fetches the
bytes of both sides, listens (rlhf.simulation.ears), answers (rlhf.simulation.raters) and goes on until the app says
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from rlhf.simulation import raters, taste
from rlhf.simulation.ears import STRETCH_S, Ears

RETRIED = (429, 500, 502, 503, 504)


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

    def vote_once(self, listener: raters.Listener, campaign: str | None, ears: Ears, seed: object, index: int) -> bool:
        """Rate the next pair. False when none is left."""
        answer = self.request("GET", "/api/v1/pairs/next", params={"campaign": campaign} if campaign else {}, headers=self.headers)
        if answer.status_code == 204:
            return False
        started = time.monotonic()
        pair = answer.json()
        audio = {side: self.request("GET", pair["audio"][side], headers=self.headers).content for side in ("a", "b")}
        vote = ballot(listener, ears, audio, pair, seed, index)

        least_s = float(pair.get("min_listen_ms") or 0) / 1000
        waited = time.monotonic() - started
        if least_s and waited < 2 * least_s + 0.05:
            time.sleep(2 * least_s + 0.05 - waited)
        each_ms = int((time.monotonic() - started) * 500)
        vote |= {"assignment_id": pair["assignment_id"], "listen_ms": {"a": each_ms, "b": each_ms}}
        stored = self.request("POST", "/api/v1/votes", json=vote, headers={**self.headers, "Idempotency-Key": str(uuid.uuid4())})
        with self.progress.lock:
            self.progress.choices[vote["choice"]] += 1
            self.progress.duplicates += bool(stored.json().get("duplicate"))
        return True


def ballot(
    listener: raters.Listener, ears: Ears, audio: dict[str, bytes], pair: dict[str, Any], seed: object, index: int
) -> dict[str, Any]:
    """What a listener says of a pair that was heard: the choice, and perhaps aspects, a confidence and marks.

    Args: audio: side -> the bytes that were played. pair: as the app told it. index: votes of this listener before."""
    gain = {side: float(pair["gain_db"][side]) for side in ("a", "b")}
    gold = {side: ears.score(audio[side], gain[side], listener.tastes) for side in ("a", "b")}
    sha = {side: hashlib.sha256(audio[side]).hexdigest() for side in ("a", "b")}
    louder_db = 0.0
    if listener.loudness_bias:
        louder_db = ears.loudness_db(audio["a"], gain["a"]) - ears.loudness_db(audio["b"], gain["b"])
    rng = raters.stream(seed, sha["a"], sha["b"], index)
    vote: dict[str, Any] = {"choice": raters.choose(listener, gold["a"], gold["b"], rng, louder_db, index)}
    if not listener.talkative:
        return vote
    rng = raters.stream(seed, sha["a"], sha["b"], index, "more")
    if told := raters.aspects(listener, gold["a"], gold["b"], pair.get("aspects") or [], rng):
        vote["aspects"] = told
    if sure := raters.confidence(listener, gold["a"], gold["b"], rng):
        vote["confidence"] = sure
    length_ms = int(1000 * float(pair["duration_s"]))
    marks = []
    for side in ("a", "b"):
        if raters.marks_it(listener, gold[side], rng):
            start = ears.worst_ms(audio[side]) + int(rng.integers(-150, 150))
            start = min(max(0, start), max(0, length_ms - 200))
            marks.append({"side": side, "t0_ms": start, "t1_ms": min(length_ms, start + int(1000 * STRETCH_S))})
    if marks:
        vote["marks"] = marks
    return vote


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
    listeners: Sequence[raters.Listener] | None = None,
) -> Progress:
    """Let every account vote in its own thread until no pair is left for it, or until it has given `votes_per_rater`
    votes.

    Args: taste_name: what is liked, where a listener has no mixture of its own. listeners: one an account (default: the
        demo's crew).
    Raises the first rater's error after all have stopped. `transport` replaces the network in tests.
    """
    ears, progress, failed = Ears(taste_name), Progress(), threading.Event()
    listeners = raters.crew(len(accounts)) if listeners is None else listeners

    def work(number: int) -> None:
        account = accounts[number]
        try:
            with httpx.Client(base_url=url, timeout=60.0, transport=transport) as client:
                rater = Rater(client, account["handle"], account["token"], progress, patience_s)
                given: int = 0
                while (votes_per_rater is None or given < votes_per_rater) and not failed.is_set():
                    if not rater.vote_once(listeners[number], campaign, ears, f"{seed}|{number}", given):
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
    parser.add_argument("--crew", choices=("demo", "crowd"), default="demo", help="which habits the raters have")
    parser.add_argument("--careless", type=float, default=0.15, help="share of the crowd that does not listen")
    parser.add_argument("--adversaries", type=int, default=1, help="how many of the crowd answer the other way round")
    parser.add_argument("--clusters", action="store_true", help="each of the crowd mixes all tastes; the one of --taste is nobody's alone")
    parser.add_argument("--patience-s", type=float, default=60.0, help="how long to wait for a server that is away")
    args = parser.parse_args(argv)
    try:
        accounts = json.loads(args.raters.read_text(encoding="utf-8"))
        if not accounts or not all({"handle", "token"} <= set(account) for account in accounts):
            raise ValueError("no accounts with handle and token")
        tastes = sorted(taste.TASTES) if args.clusters else []
        n = len(accounts)
        listeners = raters.crew(n) if args.crew == "demo" else raters.crowd(n, args.careless, args.adversaries, tastes)
    except (OSError, ValueError, TypeError) as error:
        print(
            f"got {args.raters}: {error}; expected a JSON list of handle and token, of raters of whom some listen; remedy: mend the list",
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
        progress = run(
            args.url, accounts, args.campaign, args.seed, args.votes_per_rater, args.patience_s, tell, None, args.taste, listeners
        )
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
