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

from adapters.library import Manifest, read_adapter
from base_models.checkpoint import read_jsonl
from base_models.errors import UserError
from base_models.policy import PRETRAINED, load_policy
from base_models.settings import to_mapping
from rlhf.preferences import content_sha256


def trace(folder: str | Path, runs: str | Path = "runs") -> list[str]:
    """The lines for an adapter's folder, of a mix with those of its parts. Raises UserError where one of them is damaged."""
    runs = Path(runs)
    manifest = read_adapter(folder).manifest
    return [*_adapter_lines(manifest, runs, ""), _base_line(manifest.base_sha256)]


def _adapter_lines(manifest: Manifest, runs: Path, indent: str) -> list[str]:
    told = f"{manifest.method}, {manifest.created_at}, {manifest.licence}"
    lines = [f"{indent}adapter  {manifest.name}  {manifest.adapter_sha256}  ({told})"]
    snapshots = [manifest.snapshot_sha256]
    if manifest.reward_sha256:
        reward = _find(runs, "manifest.json", "reward_sha256", manifest.reward_sha256)
        lines.append(f"{indent}  reward   {manifest.reward_sha256}  {reward or 'not found below ' + str(runs)}")
        snapshots.append(_json(reward / "manifest.json").get("snapshot_sha256") if reward else None)  # its own, if it is another
    for snapshot in dict.fromkeys(filter(None, snapshots)):
        lines += [indent + line for line in _snapshot_lines(runs, snapshot)]
    for sha256 in parts_of(to_mapping(manifest)):
        part = _find(runs, "manifest.json", "adapter_sha256", sha256, adapter=True)
        missing = [f"{indent}  adapter  {sha256}  not found below {runs}"]
        lines += _adapter_lines(read_adapter(part).manifest, runs, indent + "  ") if part else missing
    return lines


def parts_of(manifest: dict[str, Any]) -> list[str]:
    """The hashes of the adapters that were mixed into one."""
    return [part["adapter_sha256"] for part in manifest.get("config", {}).get("parts", [])] if manifest.get("method") == "mix" else []


def descendants(snapshots: Iterable[str], runs: str | Path = "runs") -> list[str]:
    """The lines for snapshots, by hash: each reward model and adapter below `runs` that was trained on one, itself, by its reward or by a
    part that was mixed into it."""
    lines = []
    made = [(path.parent, _json(path)) for path in sorted(Path(runs).rglob("manifest.json"))]
    rewards, adapters = ([(f, c) for f, c in made if (f / "adapter_config.json").exists() == adapts] for adapts in (False, True))
    for snapshot in dict.fromkeys(snapshots):
        found = _find(Path(runs), "snapshot.json", "sha256", snapshot)
        lines.append(f"snapshot {snapshot}  {found or 'not found below ' + str(runs)}")
        by = [(folder, content) for folder, content in rewards if content.get("snapshot_sha256") == snapshot]
        of_it = {content.get("reward_sha256") for _, content in by} - {None}
        grown, more = [], [(f, c) for f, c in adapters if c.get("snapshot_sha256") == snapshot or c.get("reward_sha256") in of_it]
        while more:  # a mix may be a part of another
            grown += more
            known = {content.get("adapter_sha256") for _, content in grown}
            more = [(f, c) for f, c in adapters if (f, c) not in grown and known & {*parts_of(c)}]
        lines += [f"  reward   {content.get('reward_sha256')}  {folder}" for folder, content in by]
        lines += [f"  adapter  {content.get('adapter_sha256')}  {folder}" for folder, content in grown]
        if not by and not grown:
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


def _find(runs: Path, name: str, key: str, sha256: str, adapter: bool = False) -> Path | None:
    """The folder below `runs` whose JSON file `name` carries the hash; an adapter's manifest names its parents too, and is meant only by
    `adapter`."""
    for path in sorted(runs.rglob(name)):
        if (path.parent / "adapter_config.json").exists() == adapter and _json(path).get(key) == sha256:
            return path.parent
    return None
