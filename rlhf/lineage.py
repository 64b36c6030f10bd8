"""Where an adapter comes from: its reward model, snapshot, votes and base, walked by their hashes.

    encore lineage runs/demo/ppo/adapter             # backwards: what it was made from
    encore lineage --rater ada --db URL              # forwards: what was trained on a person's votes
    encore lineage --snapshot SHA256                 # the same for a snapshot, of a rater who was forgotten say

Each line names a thing, its hash, and whether it was found below `runs` and still has that hash. A parent that is missing is said to
be missing: a broken chain is a finding, not an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adapters.library import read_adapter
from base_models.checkpoint import read_jsonl
from base_models.errors import UserError
from base_models.policy import PRETRAINED, load_policy
from rlhf.preferences import content_sha256


def trace(folder: str | Path, runs: str | Path = "runs") -> list[str]:
    """The lines for an adapter's folder. Raises UserError when the folder is none or damaged."""
    manifest = read_adapter(folder).manifest
    lines = [f"adapter  {manifest.name}  {manifest.adapter_sha256}  ({manifest.method}, {manifest.created_at}, {manifest.licence})"]
    reward = _find(Path(runs), "manifest.json", "reward_sha256", manifest.reward_sha256) if manifest.reward_sha256 else None
    if manifest.reward_sha256:
        lines.append(f"  reward   {manifest.reward_sha256}  {reward or 'not found below ' + str(runs)}")
    if manifest.snapshot_sha256:
        lines += _snapshot_lines(Path(runs), manifest.snapshot_sha256)
    lines.append(_base_line(manifest.base_sha256))
    return lines


def descendants(snapshots: Iterable[str], runs: str | Path = "runs") -> list[str]:
    """The lines for snapshots, by hash: each reward model and adapter below `runs` that was trained on one, itself or by its reward."""
    lines = []
    made = [(path.parent, _json(path)) for path in sorted(Path(runs).rglob("manifest.json"))]
    for snapshot in dict.fromkeys(snapshots):
        found = _find(Path(runs), "snapshot.json", "sha256", snapshot)
        lines.append(f"snapshot {snapshot}  {found or 'not found below ' + str(runs)}")
        rewards: set[str] = set()
        for adapters in (False, True):
            for folder, content in made:
                if (folder / "adapter_config.json").exists() != adapters:
                    continue
                own_reward = content.get("reward_sha256")
                if content.get("snapshot_sha256") != snapshot and not (adapters and own_reward in rewards):
                    continue
                if not adapters and own_reward:
                    rewards.add(own_reward)
                kind, key = ("adapter", "adapter_sha256") if adapters else ("reward ", "reward_sha256")
                lines.append(f"  {kind}  {content.get(key)}  {folder}")
        if lines[-1].startswith("snapshot"):
            lines.append(f"  nothing below {runs} was trained on it")
    return lines


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _snapshot_lines(runs: Path, sha256: str) -> list[str]:
    found = _find(runs, "snapshot.json", "sha256", sha256)
    if found is None:
        return [f"  snapshot {sha256}  not found below {runs}"]
    content = json.loads((found / "snapshot.json").read_text(encoding="utf-8"))
    state = "unchanged" if content_sha256(found) == sha256 else "CHANGED since it was frozen"
    clips = read_jsonl(found / "clips.jsonl")
    licences = sorted({str(clip.get("licence")) for clip in clips})
    consents = sorted({str(clip.get("consent")) for clip in clips})
    return [
        f"  snapshot {sha256}  {found}, {state}",
        f"    votes  {content['n_votes']} by {content['n_raters']} raters, excluded {content['n_excluded']}",
        f"    clips  {len(clips)}; licence {', '.join(licences)}; consent {', '.join(consents)}",
    ]


def _base_line(sha256: str) -> str:
    try:
        shipped = load_policy(PRETRAINED).sha256
    except UserError:
        shipped = None
    return f"  base     {sha256}  {'the base that ships with Encore' if sha256 == shipped else 'not the base that ships with Encore'}"


def _find(runs: Path, name: str, key: str, sha256: str) -> Path | None:
    """The folder below `runs` whose JSON file `name` carries the hash."""
    for path in sorted(runs.rglob(name)):
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        own = isinstance(content, dict) and not (path.parent / "adapter_config.json").exists()  # an adapter names its parents too
        if own and content.get(key) == sha256:
            return path.parent
    return None
