"""Does a reward for what the prompt says make "sad piano" sadder and more piano? And do the checks know real clips?

    python benchmarks/consistency.py --corpus .cache/corpus --out runs/consistency            # about ten minutes on two quiet cores
    python benchmarks/consistency.py --corpus .cache/corpus --out runs/consistency --steps 0  # the checks alone

    real held-out clips -> each check under the right prompt and under another clip's: AUC
    real training clips -> two probes on waveforms: which mood, piano or not
    PPO on mood + instrument (no listener, prompts without "sad piano") -> base and adapter play "sad piano", other seeds
    -> how sure the *probes* are of sad and of piano, clip by clip, with the interval of the difference

The probes hear waveforms (base_models.measures) and share nothing with the space that rewards: what fools it does not fool them.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.library import load_adapter, unload_adapters
from base_models.audio import read_audio
from base_models.checkpoint import read_jsonl, write_json
from base_models.corpus.styles import MOODS
from base_models.errors import UserError
from base_models.measures import GenreProbe, probe_features
from base_models.policy import PRETRAINED, Policy, load_policy
from base_models.sampling import generate
from base_models.settings import run
from rlhf import train_ppo
from rlhf.asked import asked_keys, asked_tempo, instrument_versions, mood_versions
from rlhf.consistency import checks
from rlhf.metrics import mean_ci
from rlhf.ppo_task import Task
from rlhf.sample_pairs import clip_seed

ASKED = "sad piano"
INSTRUMENTS = ("piano", "violin", "flute", "acoustic guitar", "trumpet", "church organ", "vibraphone", "choir")


@dataclass(frozen=True)
class Config:
    corpus: Path = Path(".cache/corpus")
    """The demo corpus, as `encore corpus build` makes it."""
    policy: Path = PRETRAINED
    """The base."""
    out: Path = Path("runs/consistency")
    """Where the run and figures.json go."""
    probe_clips: int = 1200
    """Real training clips that the probes learn from."""
    steps: int = 40
    """Rounds of PPO; 0 measures the checks alone."""
    batch_size: int = 32
    """Clips a round."""
    n_frames: int = 100
    """Codec frames of a clip."""
    clips: int = 96
    """Clips of "sad piano" that base and adapter each play."""
    seed: int = 0
    """Of everything that is drawn."""


def main(cfg: Config) -> dict[str, Any]:
    rows = read_jsonl(cfg.corpus / "metadata.jsonl")
    policy = load_policy(cfg.policy)
    held_out = [row for row in rows if row["split"] != "train"]
    figures: dict[str, Any] = {"auc": agreement(policy, cfg, held_out)}
    print(json.dumps(figures["auc"], indent=2), flush=True)
    if cfg.steps:
        trained = [row for row in rows if row["split"] == "train"][: cfg.probe_clips]
        if len(trained) < 100:
            raise UserError(f"{len(trained)} training clips", "100 or more for the probes", "build a larger corpus")
        probes = fit_probes(cfg, trained, held_out)
        figures["probes"] = {name: accuracy for name, (_, accuracy) in probes.items()}
        adapter = learn(cfg, policy)
        figures["sad_piano"] = compare(cfg, policy, adapter, {name: probe for name, (probe, _) in probes.items()})
    write_json(cfg.out / "figures.json", figures)
    return figures


# ---- the checks on real clips ----------------------------------------------------------------------------------------


def heard(cfg: Config, rows: list[dict[str, Any]]) -> list[np.ndarray]:
    return [read_audio(cfg.corpus / row["file_name"])[0] for row in rows]


def agreement(policy: Policy, cfg: Config, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per check: the probability that a clip scores higher under its own prompt than another under one that asks for something else."""
    asks: dict[str, Any] = {
        "similarity": lambda prompt: prompt,
        "mood": lambda prompt: mood_versions(prompt) and mood_versions(prompt)[1],  # type: ignore[index]
        "instrument": lambda prompt: instrument_versions(prompt) and instrument_versions(prompt)[0][1:],  # type: ignore[index]
        "tempo": asked_tempo,
        "key": asked_keys,
    }
    with torch.no_grad():
        codes = [policy.codec.encode(torch.from_numpy(wav.mean(0))[None, None])[:, :, : cfg.n_frames] for wav in heard(cfg, rows)]
    rng, found = random.Random(cfg.seed), {}
    for name, judge in checks(policy).items():
        own = [(row, text) for row, text in enumerate(r["captions"][0] for r in rows) if asks[name](text) is not None]
        scores: dict[str, list[float]] = {"right": [], "wrong": []}
        for row, text in own:
            other = rng.choice([t for _, t in own if asks[name](t) != asks[name](text)])
            for kind, prompt in (("right", text), ("wrong", other)):
                scores[kind].append(float(judge(codes[row], [prompt])))
        right, wrong = np.array(scores["right"]), np.array(scores["wrong"])
        higher = (right[:, None] > wrong).mean() + 0.5 * (right[:, None] == wrong).mean()
        found[name] = {"auc": float(higher), "n": len(own)}
    return found


# ---- the judges from outside -----------------------------------------------------------------------------------------


def fit_probes(cfg: Config, trained: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> dict[str, tuple[GenreProbe, float]]:
    """name -> (probe, its accuracy on held-out clips)."""
    labels = {"mood": lambda row: row["mood"], "piano": lambda row: "piano" if "piano" in " ".join(row["instruments"]) else "other"}
    features = []
    for rows in (trained, held_out):
        features.append(np.stack([probe_features(wav[:, : cfg.n_frames * 640], 16000) for wav in heard(cfg, rows)]))
    probes = {}
    for name, label in labels.items():
        probe = GenreProbe.fit_features(features[0], [label(row) for row in trained])
        guess = probe.probabilities_of(features[1]).argmax(1)
        probes[name] = (probe, float(np.mean([probe.classes[g] == label(row) for g, row in zip(guess, held_out)])))
    return probes


# ---- learning and comparing ------------------------------------------------------------------------------------------


def learn(cfg: Config, policy: Policy) -> Path:
    """PPO on mood and instrument alone; the adapter's folder. Goes on where it was interrupted."""
    words = [word for mood in MOODS.values() for word in mood.words]
    prompts = [f"{word} {instrument}" for word in words for instrument in INSTRUMENTS if f"{word} {instrument}" != ASKED]
    judges = checks(policy)
    task = Task(
        lm=policy.lm,
        prompts=prompts,
        table=policy.conditions(prompts),
        score=judges["similarity"],
        base_sha256=policy.sha256,
        checks={name: judges[name] for name in ("mood", "instrument")},
    )
    resume = (cfg.out / "ppo").exists()
    settings = train_ppo.Config(
        out=cfg.out / "ppo",
        weights="human=0,mood=1,instrument=1",
        steps=cfg.steps,
        batch_size=cfg.batch_size,
        n_frames=cfg.n_frames,
        credit="score",
        brake="off",
        seed=cfg.seed,
        resume=resume,
    )
    train_ppo.main(settings, task)
    return cfg.out / "ppo" / "adapter"


@torch.no_grad()
def compare(cfg: Config, policy: Policy, adapter: Path, probes: dict[str, GenreProbe]) -> dict[str, dict[str, Any]]:
    """Base and adapter on "sad piano", shared seeds that training never drew: each judge's mean, and the difference with its interval."""
    judges = checks(policy)
    judged: dict[str, dict[str, np.ndarray]] = {}
    for name in ("base", "adapter"):
        unload_adapters(policy.lm)
        if name == "adapter":
            load_adapter(policy, adapter)
        seeds = [clip_seed(cfg.seed + 77, 0, k) for k in range(cfg.clips)]
        codes = torch.cat([play(policy, cfg.n_frames, seeds[start : start + 32]) for start in range(0, cfg.clips, 32)])
        features = np.stack([probe_features(policy.decode(clip[None])[0].numpy(), 16000) for clip in codes])
        judged[name] = {f"check: {kind}": judges[kind](codes, [ASKED] * len(codes)).numpy() for kind in ("mood", "instrument")}
        for probe, wanted in (("mood", "sad"), ("piano", "piano")):
            share = probes[probe].probabilities_of(features)
            judged[name][f"probe: {wanted}"] = share[:, probes[probe].classes.index(wanted)]
    unload_adapters(policy.lm)
    told = {}
    for kind in judged["base"]:
        gain = mean_ci(judged["adapter"][kind] - judged["base"][kind], list(range(cfg.clips)))
        means = {name: float(rows[kind].mean()) for name, rows in judged.items()}
        told[kind] = {**means, "gain": gain.value, "ci": list(gain.ci)}
    return told


def play(policy: Policy, n_frames: int, seeds: list[int]) -> Tensor:
    return generate(policy.lm, policy.conditions([ASKED] * len(seeds)), n_frames, seeds=seeds).codes


if __name__ == "__main__":
    run(main, Config, show=lambda figures: json.dumps(figures, indent=2))
