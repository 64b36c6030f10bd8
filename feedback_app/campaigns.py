"""From a samples manifest to a campaign: python -m feedback_app.campaigns --db URL --name NAME --manifest FILE

Measures each clip's loudness once, so that every pair is played equally loud.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from base_models.audio import integrated_lufs, read_audio, true_peak_dbfs
from base_models.errors import UserError
from db.campaigns import CampaignSummary
from db.errors import StoreError
from db.store import Store, open_store


def measure(path: Path) -> tuple[float, float]:
    """(integrated loudness LUFS, true peak dBFS) of a file. Raises UserError for audio that cannot be read."""
    wav, sample_rate = read_audio(path)
    return float(integrated_lufs(wav, sample_rate)), float(true_peak_dbfs(wav, sample_rate))


def read_rows(manifest_path: Path) -> list[dict[str, Any]]:
    """The rows of a manifest.jsonl. Raises UserError."""
    try:
        lines = list(io.StringIO(manifest_path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{manifest_path}: {error}", "a manifest.jsonl", "pass the one that sampling wrote") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise UserError(f"{manifest_path}:{number}: {error}", "one JSON object a line", "sample again") from error
        if row is not None:
            rows.append(row)
    return rows


def register_campaign(
    store: Store,
    name: str,
    manifest_path: str | Path,
    *,
    target_votes: int = 3,
    min_listen_ms: int = 3000,
    pairs: Sequence[tuple[str, str]] | None = None,
) -> CampaignSummary:
    """Registers a manifest's clips and pairs under `name`; again with the same rows adds nothing. See `create_campaign`."""
    manifest_path = Path(manifest_path)
    rows = read_rows(manifest_path)
    return store.create_campaign(name, rows, manifest_path.parent, target_votes, min_listen_ms, pairs=pairs, measure=measure)


def every_pair(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """All pairs of clips that answer the same prompt, as hashes: n (n - 1) / 2 pairs of n clips, each clip in n - 1 of them."""
    of_prompt: dict[str, list[str]] = {}
    for row in rows:
        of_prompt.setdefault(str(row.get("prompt_id")), []).append(str(row.get("sha256")))
    return [pair for clips in of_prompt.values() for pair in combinations(clips, 2)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m feedback_app.campaigns", description=__doc__.splitlines()[0])
    parser.add_argument("--db", default="sqlite:///runs/demo/encore.db", help="database URL")
    parser.add_argument("--name", required=True, help="the campaign's name")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest.jsonl that sampling wrote")
    parser.add_argument("--target-votes", type=int, default=3, help="votes wanted for each pair")
    parser.add_argument("--all-pairs", action="store_true", help="compare every two clips of a prompt, not each clip once")
    parser.add_argument("--min-listen-ms", type=int, default=3000, help="listening asked for on each side")
    args = parser.parse_args(argv)
    try:
        with open_store(args.db) as store:
            found = register_campaign(
                store,
                args.name,
                args.manifest,
                target_votes=args.target_votes,
                min_listen_ms=args.min_listen_ms,
                pairs=every_pair(read_rows(args.manifest)) if args.all_pairs else None,
            )
    except (UserError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"campaign {found.name}: {found.n_clips} clips, {found.n_pairs} pairs ({found.n_new_pairs} new)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
