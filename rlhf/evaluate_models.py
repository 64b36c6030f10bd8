"""Compare a base with its adapters on prompts that no training run has seen.

    encore evaluate --policy DIR --adapter runs/dpo/adapter --adapter runs/ppo/adapter --prompts heldout.jsonl --out DIR

    prompts -> clips of the base and of every system, with shared random numbers -> per system: KL to the base, diversity
    -> manifests that a judge or a campaign of listeners compares, prompt by prompt

It measures how far a system has moved and how varied it still is. Which system is better is for ears to say (or, in the demo, for
the simulated listeners' hidden taste, which runs in a process of its own); the reward model's opinion is never used as proof.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters.library import load_adapter, unload_adapters
from adapters.lora import adapter_disabled
from base_models.checkpoint import read_json, read_jsonl, write_json
from base_models.errors import UserError
from base_models.policy import Policy
from rlhf.best_of_n import BestOf
from rlhf.metrics import diversity, mean_ci, paired_outcomes, win_rate
from rlhf.sample_pairs import Prompt, Settings, sample

BASE = "base"


def read_codes(manifest: Path, rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """Codes [N, K, T] of a manifest's rows."""
    arrays = [np.load(manifest.parent / row["codes_file"], allow_pickle=False) for row in rows]
    return torch.from_numpy(np.stack(arrays)).long()


@torch.no_grad()
def kl_to_base(policy: Policy, rows: Sequence[Mapping[str, Any]], codes: torch.Tensor, batch_size: int = 32) -> np.ndarray:
    """KL of the adapted policy to the base in nats a clip, estimated on its own samples: log pi(codes) - log base(codes), [N]."""
    kl = []
    policy.lm.fast_training()
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        cond = policy.conditions([row["prompt"] for row in part], [row["tempo_bpm"] for row in part])
        own = policy.lm.logps(codes[start : start + batch_size], cond)
        with adapter_disabled(policy.lm):
            base = policy.lm.logps(codes[start : start + batch_size], cond)
        kl.append((own - base).sum(1))
    return torch.cat(kl).numpy()


def clip_features(policy: Policy, codes: torch.Tensor) -> np.ndarray:
    """Unit embeddings [N, E] in the shared audio-text space."""
    if policy.contrastive is None:
        raise UserError(f"{policy.path} without contrastive/", "a policy with the shared audio-text space", "train_contrastive.py")
    with torch.no_grad():
        return torch.cat([policy.contrastive.embed_codes(part) for part in codes.split(64)]).numpy()


def evaluate(
    policy: Policy,
    systems: Mapping[str, Path | BestOf],
    prompts: Sequence[Prompt],
    out: Path,
    settings: Settings,
    weights: Mapping[str, float] | None = None,
) -> dict[str, dict[str, Any]]:
    """Sample base and systems and measure KL and diversity.

    Args: systems: name -> adapter folder, or the best of n of the base. settings.n >= 2, since diversity is measured within a prompt.
    weights: strength of an adapter, by name; 1 where none is given.
    Returns: per system {manifest, kl, kl_ci, diversity, diversity_ratio, adapter_sha256}; written to out/evaluation.json. The KL of
        a best of n is its bound, and its interval is empty: a point.
    Raises: UserError for a single clip a prompt, or a system that is called as the base is.
    """
    if settings.n < 2:
        raise UserError(f"n = {settings.n} clips a prompt", "at least 2", "pass -n 2")
    if BASE in systems:
        got = f"a system called {BASE!r}, as the base itself is"
        raise UserError(got, "another name", "mix it by itself under one: encore adapters mix DIR --weight 1 --name NAME --out NEW")
    figures: dict[str, dict[str, Any]] = {}
    unload_adapters(policy.lm)
    for name in (BASE, *systems):
        hashes, best, strength, system = [], None, None, systems.get(name)
        unload_adapters(policy.lm)
        if isinstance(system, BestOf):
            best = system
        elif system is not None:
            strength = [(weights or {}).get(name, 1.0)]
            hashes = [m.adapter_sha256 for m in load_adapter(policy, system, strength)]
        manifest = sample(policy, prompts, out / name, settings, name, hashes, best, strength)
        rows = read_jsonl(manifest)
        codes = read_codes(manifest, rows)
        ids = [row["prompt_id"] for row in rows]
        varied = diversity(clip_features(policy, codes), ids)
        entry: dict[str, Any] = {"manifest": str(manifest), "diversity": varied, "adapter_sha256": hashes[0] if hashes else None}
        if best is not None:
            entry |= {"kl": best.kl_bound, "kl_ci": [best.kl_bound] * 2}
        elif name != BASE:
            kl = mean_ci(kl_to_base(policy, rows, codes), ids)
            entry |= {"kl": kl.value, "kl_ci": list(kl.ci)}
        if name != BASE:
            entry["diversity_ratio"] = varied / figures[BASE]["diversity"]
        figures[name] = entry
    unload_adapters(policy.lm)
    write_json(out / "evaluation.json", figures)
    return figures


def compare_gold(gold_file: Path, systems: Sequence[str], base: str = BASE) -> dict[str, dict[str, Any]]:
    """Win rates against the base from a judge's scores, clip k of a prompt against clip k of the same prompt.

    Returns: per system {gold_win_rate, ci, n, n_ties, gold_gain}: decided pairs, interval by prompt.
    """
    by_system: dict[str, dict[tuple[str, int], tuple[float, str]]] = {}
    for clip in read_json(gold_file)["clips"]:
        by_system.setdefault(clip["system"], {})[clip["prompt_id"], clip["seed"]] = (clip["gold"], clip["prompt_id"])
    results: dict[str, dict[str, Any]] = {}
    for name in systems:
        ours, theirs = by_system[name], by_system[base]
        if ours.keys() != theirs.keys():
            raise UserError(f"{name} and {base} on different prompts or seeds", "the same of both", "sample both with one call")
        keys = sorted(ours)
        mine, other = np.array([ours[k][0] for k in keys]), np.array([theirs[k][0] for k in keys])
        if (mine == other).all():
            raise UserError(f"{name} that plays just what {base} plays", "an adapter that changes something", "train it longer")
        rate = win_rate(paired_outcomes(mine, other), [ours[k][1] for k in keys])
        results[name] = {
            "gold_win_rate": rate.decided.value,
            "ci": list(rate.decided.ci),
            "n": rate.decided.n,
            "n_ties": rate.n_ties,
            "gold_gain": float((mine - other).mean()),
        }
    return results
