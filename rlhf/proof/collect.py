"""Votes by the real road: a campaign in SQL, the app as a server, simulated raters as HTTP clients, a frozen snapshot.

    python -m rlhf.proof.collect --manifest samples/manifest.jsonl --pairs pairs.jsonl --out DIR --raters 16 -- --taste drive --crew crowd

What stands behind `--` goes to rlhf.simulation.vote, which is a program of its own. DIR gets encore.db and snapshot/. Votes that an
interrupted call has stored are kept; raters go on with the pairs that they have not heard."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from base_models.checkpoint import write_json
from base_models.errors import UserError, ended
from db.errors import StoreError
from db.schema import ASPECTS
from db.store import Store, open_store
from rlhf.collecting import freeze

CAMPAIGN = "proof"
TOP = Path(__file__).resolve().parents[2]


def access_code(store: Store, handle: str) -> str:
    """A fresh one, whether the rater is new or was left by an interrupted call."""
    try:
        return str(store.add_rater(handle))
    except StoreError:
        return str(store.renew_token(handle))


def collect(manifest: Path, pairs: Path | None, out: Path, raters: int, target_votes: int, vote: list[str]) -> dict[str, Any]:
    """Set the campaign up, let the raters vote until no pair is left, freeze. Returns the snapshot's hash and counts.

    pairs: which clips meet; None lets every two clips of a prompt meet."""
    out.mkdir(parents=True, exist_ok=True)
    database = f"sqlite:///{(out / 'encore.db').resolve()}"
    asked = [part for aspect in ASPECTS for part in ("--aspect", aspect)]
    meet = ["--all-pairs"] if pairs is None else ["--pairs", str(pairs)]
    wanted = ["--target-votes", str(target_votes), "--min-listen-ms", "0", *meet, *asked]
    campaign = ["-m", "feedback_app.campaigns", "--db", database, "--name", CAMPAIGN, "--manifest", str(manifest), *wanted]
    subprocess.run([sys.executable, *campaign], cwd=TOP, check=True)
    accounts = out / "raters.json"
    with open_store(database) as store:
        handles = [f"simulated-{index:02d}" for index in range(raters)]
        write_json(accounts, [{"handle": handle, "token": access_code(store, handle)} for handle in handles])
    accounts.chmod(0o600)
    server = [sys.executable, "-m", "feedback_app.app", "--db", database, "--port", "0"]
    with subprocess.Popen(server, cwd=TOP, stdout=subprocess.PIPE, text=True) as app:
        try:
            assert app.stdout is not None
            line = app.stdout.readline()
            if "ready at" not in line:
                raise UserError(f"a rating app that did not start: {line!r}", "a line with its address", "see its error above")
            named = ["--url", line.rsplit(" ", 1)[1].strip(), "--raters", str(accounts), "--campaign", CAMPAIGN]
            subprocess.run([sys.executable, "-m", "rlhf.simulation.vote", *named, *vote], cwd=TOP, check=True)
        finally:
            app.terminate()
    return freeze(database, CAMPAIGN, out, "snapshot")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, help="which clips meet (default: every two of a prompt)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--raters", type=int, default=16)
    parser.add_argument("--target-votes", type=int, default=2)
    args = parser.parse_args(argv[:cut])
    print(json.dumps(collect(args.manifest, args.pairs, args.out, args.raters, args.target_votes, argv[cut + 1 :])))
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
