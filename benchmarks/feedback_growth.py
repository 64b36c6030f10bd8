"""The votes database as it grows: the wait for the next pair, and the time and memory of the board and the export.

    python benchmarks/feedback_growth.py                       # 10k, 100k and 1M votes, SQLite
    python benchmarks/feedback_growth.py --postgres --sizes 10000 100000     # a server of its own; --db URL for another

Each size is one campaign of three votes a pair, of which nine pairs in ten are full, 200 raters, and as many systems as the demo
would have after some rounds. Rows are written in bulk; what is timed afterwards is the real code.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from sqlalchemy import insert, update

from db.choice import refresh_priorities
from db.export import export_snapshot
from db.leaderboard import leaderboard
from db.schema import CHOOSERS, Assignment, Campaign, Clip, Pair, Prompt, Rater, Vote, utc_now
from db.store import Store, open_store
from tests.postgres import running_postgres

SYSTEMS = tuple(f"system-{i}" for i in range(8))
BATCH = 5000


@contextmanager
def fresh_url(kind: str, folder: Path) -> Iterator[str]:
    """The URL of an empty database of this kind, made for the block; any other `kind` is taken for a URL itself."""
    if kind == "postgresql":
        with running_postgres() as server:
            yield server.new_database()
    else:
        yield f"sqlite:///{folder / 'votes.db'}" if kind == "sqlite" else kind


def add_rows(store: Store, table: Any, n: int, row: Callable[[int], dict[str, Any]]) -> None:
    for begin in range(0, n, BATCH):
        with store.write_core() as connection:
            connection.execute(insert(table), [row(i) for i in range(begin, min(n, begin + BATCH))])


def fill_campaign(store: Store, n_pairs: int, target_votes: int, n_open: Callable[[int], int] = lambda i: 0) -> None:
    """Campaign `c` with pairs 1 to `n_pairs`, two clips each, in an empty database."""
    rng, n_prompts = random.Random(0), min(n_pairs, 500)
    with store.write_core() as connection:
        connection.execute(insert(Campaign), {"name": "c", "target_votes": target_votes, "min_listen_ms": 0})
    add_rows(store, Prompt, n_prompts, lambda i: {"key": f"p{i}", "text": f"prompt {i}", "text_sha256": f"{i:064}", "split": "train"})

    def clip(i: int) -> dict[str, Any]:
        said = {"uri": "clip.wav", "size_bytes": 1, "duration_ms": 6000, "sample_rate": 16000, "adapters": [], "gen": {}}
        return said | {"prompt_id": i // 2 % n_prompts + 1, "sha256": f"{i:064}", "system": SYSTEMS[0]}

    def pair(i: int) -> dict[str, Any]:
        clips = {"clip_x_id": 2 * i + 1, "clip_y_id": 2 * i + 2, "gain_x_db": 0.0, "gain_y_db": 0.0}
        clips |= {f"system_{side}": SYSTEMS[rng.randrange(len(SYSTEMS))] for side in "xy"}
        return clips | {"campaign_id": 1, "prompt_id": i % n_prompts + 1, "target_votes": target_votes, "n_open": n_open(i)}

    add_rows(store, Clip, 2 * n_pairs, clip)
    add_rows(store, Pair, n_pairs, pair)


def fill_votes(store: Store, n_votes: int, n_raters: int = 200, target_votes: int = 3) -> None:
    """`n_votes` votes over pairs of which nine in ten are full and one in ten has none."""
    n_full = -(-n_votes // target_votes)
    fill_campaign(store, n_full + n_full // 9 + 1, target_votes, lambda i: target_votes if i < n_full else 0)
    add_rows(store, Rater, n_raters, lambda i: {"handle": f"rater {i}", "token_sha256": f"{i:064}"})
    now, rng = utc_now(), random.Random(1)

    def assignment(i: int) -> dict[str, Any]:
        who = {"pair_id": i // target_votes + 1, "rater_id": i % n_raters + 1, "rep": 0, "swapped": bool(i * 7 % 11 % 2)}
        return {
            "id": f"{i:032x}",
            **who,
            "policy": "least-voted-24",
            "propensity": 1.0,
            "min_listen_ms": 0,
            "aspects": [],
            "status": "voted",
            "expires_at": now + timedelta(hours=1),
        }

    def vote(i: int) -> dict[str, Any]:
        heard = {"listen_a_ms": 6000, "listen_b_ms": 6000, "events": []}
        choice = rng.choices(("a", "b", "tie", "both_bad"), (5, 4, 2, 1))[0]
        return {"assignment_id": f"{i:032x}", "rater_id": i % n_raters + 1, "idempotency_key": f"key-{i}", "choice": choice, **heard}

    add_rows(store, Assignment, n_full * target_votes, assignment)
    add_rows(store, Vote, n_full * target_votes, vote)
    if store.engine.dialect.name == "postgresql":
        with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("analyze")


def next_pair_ms(store: Store, chooser: str, n: int) -> dict[str, float]:
    """p50 and p95 of handing out a pair and taking its vote, ms, over `n` of each."""
    with store.write_core() as connection:
        connection.execute(update(Campaign).values(chooser=chooser))
    offers, votes = [], []
    for i in range(n):
        began = time.perf_counter()
        offer = store.next_assignment(i % 200 + 1)
        offers.append(1000 * (time.perf_counter() - began))
        assert offer is not None
        began = time.perf_counter()
        store.submit_vote(i % 200 + 1, offer.assignment_id, "a", listen_a_ms=0, listen_b_ms=0, idempotency_key=offer.assignment_id)
        votes.append(1000 * (time.perf_counter() - began))
    at = lambda values, share: round(sorted(values)[int(share * n)], 2)  # noqa: E731
    return {"next_p50_ms": at(offers, 0.5), "next_p95_ms": at(offers, 0.95), "vote_p50_ms": at(votes, 0.5), "vote_p95_ms": at(votes, 0.95)}


def alone(url: str, work: str, folder: str) -> dict[str, float]:
    """Runs in a process of its own, so that its peak of memory is its own."""
    began = time.perf_counter()
    with open_store(url) as store:
        if work == "export":
            export_snapshot(store, "c", folder, "all")
        elif work == "leaderboard":
            leaderboard(store, "c")
        else:
            refresh_priorities(store, "c")
    return {"seconds": round(time.perf_counter() - began, 2), "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--db", default="sqlite", help="sqlite or postgresql")
    parser.add_argument("--postgres", dest="db", action="store_const", const="postgresql", help="the same as --db postgresql")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--draws", type=int, default=300, help="pairs handed out, for each chooser")
    args = parser.parse_args()
    if len(CHOOSERS) * args.draws > min(args.sizes) // 9:
        parser.error(f"--draws {args.draws} of {len(CHOOSERS)} choosers are more than the votes that {min(args.sizes)} leave open")
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder, fresh_url(args.db, Path(folder)) as url:
            with open_store(url) as store:
                began = time.perf_counter()
                fill_votes(store, size)
                row: dict[str, Any] = {"votes": size, "fill_s": round(time.perf_counter() - began, 1)}
                row |= {chooser: next_pair_ms(store, chooser, args.draws) for chooser in CHOOSERS}
            for work in ("priorities", "leaderboard", "export"):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    row[work] = pool.apply(alone, (url, work, folder))
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
