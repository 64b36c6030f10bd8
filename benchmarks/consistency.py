"""Does a reward for what the prompt says make "sad piano" sadder and more piano, to judges that the reward does not know?

    python benchmarks/consistency.py --out runs/consistency --seeds 6 7 8    # five minutes of one core a seed, ten for judges
    python benchmarks/consistency.py --out runs/violin --pair "dark violin"                # another pair: choose settings there
    python benchmarks/consistency.py --out runs/others --learn others --judge-on heldout   # learnt from other pairs than those judged
    python benchmarks/consistency.py --out runs/consistency --reward runs/reward --taste warm     # beside, and together with, listeners
    python benchmarks/consistency.py --out runs/consistency --steps 0                      # the judges and the checks alone

    real melodies, moods, leads and genres drawn apart -> two judges on waveforms; what they hear of melodies they do not know
    the same held-out clips -> each check of rlhf/consistency.py under the right prompt and under another clip's: AUC
    every word for the pair's mood with its instrument -> train_ppo.py --weights mood=1,instrument=3,diversity=0.5, no listener
    base, adapters and the mean of all seeds' adapters play the pair with the same new seeds -> how sure the judges are of the mood and
    of the instrument, interval by clip; diversity and KL beside.
    With --learn others: learnt from 20 pairs, judged on 10 others, interval by pair

The checks are ears on the codec's latents (rlhf/ears.py) and the audio-text space, and a policy that is trained on them may fool them.
The judges hear waveforms by other features, fitted on other melodies: theirs are of `val`, told on `test`; those of ears are of `train`.
They share the soundfont, the codec and the way clips are made, and so perhaps some of what can be fooled.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import random
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from adapters.library import save_mix
from base_models.audio import read_audio
from base_models.checkpoint import read_json, read_jsonl, write_json
from base_models.corpus.known import LEADS, OTHER
from base_models.corpus.styles import GENRE_NAMES, MOODS
from base_models.errors import UserError
from base_models.policy import PRETRAINED, Policy, load_policy
from base_models.settings import run
from benchmarks.consistency_judges import Judges, Known, above, known_clips, load_clips, save_clips, sound_features
from rlhf import train_ppo
from rlhf.asked import asked_keys, asked_tempo
from rlhf.consistency import checks
from rlhf.evaluate_models import BASE, evaluate, read_codes
from rlhf.judges import Score
from rlhf.metrics import mean_ci
from rlhf.reward_model import load_reward
from rlhf.rewards import parse_weights
from rlhf.sample_pairs import Prompt, Settings

ASKED = "sad piano"
VARIED = "diversity=0.5"
"""Held at the base's level. Without it a policy finds the one clip that ears are sure of, which is neither sad nor a piano."""
CHECKS = f"mood=1,instrument=3,{VARIED}"
Part = Literal["heldout", "tuning", "train"]
PARTS: tuple[Part, ...] = ("heldout", "tuning", "train", "train")


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    out: Path = Path("runs/consistency")
    """Where runs, clips, figures.json and table.md go."""
    known: Path = Path(".cache/consistency")
    """Where the clips of which everything is known are kept from run to run."""
    policy: Path = PRETRAINED
    """The base."""
    reward: Path | None = None
    """A reward model; then two more adapters are trained, on it alone (human=1) and on it with the checks."""
    taste: str | None = None
    """The simulated taste behind that reward model, asked for its own opinion of the clips."""
    fit_clips: int = 2400
    """Known clips that the judges learn from."""
    test_clips: int = 120
    """Known clips of other melodies, by which it is told what the judges hear; half as many again as the corpus has them."""
    learn: Literal["pair", "others"] = "pair"
    """Which prompts are learnt from: every word for the mood of --pair with its instrument, or twenty other pairs."""
    pair: str = ASKED
    """A mood and an instrument."""
    judge_on: Literal["heldout", "tuning"] = "heldout"
    """With --learn others: which pairs are played. Settings are chosen on the tuning pairs."""
    weights: str = CHECKS
    """What is trained on."""
    steps: int = 36
    """Rounds of PPO; 0 measures judges and checks alone."""
    batch_size: int = 128
    """Clips a round."""
    samples_per_prompt: int = 32
    """Clips of a prompt in a row, among which diversity is held."""
    credit: Literal["auto", "score", "codes"] = "score"
    """score learns from clips as they are played; codes (auto) follows the slope of the ears, which leads to what fools them."""
    lr: float = 7e-4
    """Learning rate."""
    kl_coef: float = 0.02
    """Price of a nat, in standard deviations of the score."""
    n_frames: int = 100
    """Codec frames of a clip."""
    clips: int = 4
    """Clips of each prompt that is judged."""
    pair_clips: int = 96
    """Clips of --pair."""
    seeds: tuple[int, ...] = (0,)
    """Training runs of each kind."""


def main(cfg: Config) -> dict[str, Any]:
    learnt = learnt_from(cfg)
    policy = load_policy(cfg.policy)
    # 1. Judges, and what they hear.
    fit, apart, usual = (known(cfg, policy, *source) for source in sources(cfg))
    judges = Judges.fit(fit)
    figures: dict[str, Any] = {
        "hearing": {"any lead in any genre": judges.hearing(apart), "as the corpus plays": judges.hearing(usual)},
        "checks": agreement(policy, apart),
    }
    print(json.dumps(figures, indent=2), flush=True)
    # 2. Learn.
    adapters: dict[str, Path] = {}
    if cfg.steps:
        kinds = {"checks": cfg.weights}
        if cfg.reward is not None:
            kinds |= {"listeners": f"human=1,{VARIED}", "both": f"human=1,{cfg.weights}"}
        for seed in cfg.seeds:
            adapters |= {f"{kind}-{seed}": learn(cfg, f"{kind}-{seed}", learnt, weights, seed) for kind, weights in kinds.items()}
        if len(cfg.seeds) > 1:
            adapters |= {f"{kind}_averaged-0": averaged(cfg, kind) for kind in kinds}
    # 3. Compare.
    if adapters:
        if cfg.learn == "others":
            figures["prompts"] = compare(cfg, policy, judges, adapters, prompts(cfg.judge_on), cfg.clips, f"clips-{cfg.judge_on}")
        if cfg.learn == "pair" or cfg.pair in prompts(cfg.judge_on):
            figures[cfg.pair] = compare(cfg, policy, judges, adapters, [cfg.pair], cfg.pair_clips, "clips-pair")
        (cfg.out / "table.md").write_text(table(figures), encoding="utf-8")
    write_json(cfg.out / "figures.json", figures)
    return figures


# ---- prompts ---------------------------------------------------------------------------------------------------------


def prompts(part: Part) -> list[str]:
    """Every word for a mood with every instrument, parted by pairs of mood and instrument, so that no word
    for "sad" is trained on with a piano. Each instrument has one mood held out, one for tuning and two to train on."""
    chosen = []
    for row, lead in enumerate(LEADS):
        for column, mood in enumerate(MOODS.values()):
            if PARTS[(column - row - 2) % len(PARTS)] == part:
                chosen += [f"{word} {lead}" for word in mood.words]
    return chosen


def learnt_from(cfg: Config) -> list[str]:
    """The prompts that a run plays."""
    mood, _, lead = cfg.pair.partition(" ")
    if mood not in MOODS or lead not in LEADS:
        raise UserError(f"--pair {cfg.pair!r}", f"one of {', '.join(MOODS)} and one of {', '.join(LEADS)}", 'give one such as "sad piano"')
    return [f"{word} {lead}" for word in MOODS[mood].words] if cfg.learn == "pair" else prompts("train")


def asked(prompt: str) -> tuple[str, str]:
    """(mood, lead) that a prompt of `prompts` asks for."""
    word, lead = prompt.split(" ", 1)
    return next(mood.name for mood in MOODS.values() if word in mood.words), lead


# ---- judges and checks on known clips --------------------------------------------------------------------------------


def sources(cfg: Config) -> list[tuple[int, tuple[str, ...], int, bool]]:
    """(clips, which melodies, seed, whether any lead plays in any genre): to fit, to test, and as the corpus has them. Ears of the reward
    are fitted on `train`: what its judges learn from and are told by are other melodies."""
    apart, usual = (cfg.test_clips, ("test",), 2, True), (cfg.test_clips // 2, ("test",), 3, False)
    return [(cfg.fit_clips, ("val",), 1, True), apart, usual]


def known(cfg: Config, policy: Policy, n: int, bucket: tuple[str, ...], seed: int, swap: bool) -> list[Known]:
    """Known clips, from --known where they were made before."""
    name = f"{policy.codec.sha256()[:12]}-{n}x{cfg.n_frames}-{'-'.join(bucket)}-{seed}-{'apart' if swap else 'usual'}.npz"
    if not (cfg.known / name).is_file():
        save_clips(cfg.known / name, known_clips(policy.codec, n, bucket, cfg.n_frames, seed, swap))
    return load_clips(cfg.known / name)


def agreement(policy: Policy, clips: list[Known], seed: int = 0) -> dict[str, dict[str, float]]:
    """Per check: the probability that a clip scores higher under its own prompt than another under one that asks for something else."""
    clips = [clip for clip in clips if clip.lead != OTHER]
    named = [f"{clip.mood} {clip.lead}" for clip in clips]
    stated = [f"{clip.lead}, {clip.tempo_bpm:.0f} BPM, in {clip.key}" for clip in clips]
    asks: dict[str, tuple[list[str], list[Any]]] = {  # prompts, and what each asks for
        "similarity": (named, named),
        "mood": (named, [clip.mood for clip in clips]),
        "instrument": (named, [clip.lead for clip in clips]),
        "genre": ([f"{GENRE_NAMES[clip.genre][0]} with {clip.lead}" for clip in clips], [clip.genre for clip in clips]),
        "tempo": (stated, [asked_tempo(text) for text in stated]),
        "key": (stated, [asked_keys(text) for text in stated]),
    }
    codes, rng, found = torch.stack([clip.codes for clip in clips]), random.Random(seed), {}
    judges = checks(policy)
    for name, (own, what) in asks.items():
        asked = [i for i, mine in enumerate(what) if mine is not None]  # a Dorian tune has no key that the check knows
        others = [rng.choice([own[j] for j in asked if what[j] != what[i]]) for i in asked]
        right, wrong = (judged(judges[name], codes[asked], texts) for texts in ([own[i] for i in asked], others))
        if not (np.isfinite(right).all() and np.isfinite(wrong).all()):
            raise ValueError(f"the check {name!r} finds nothing asked for in its prompts")
        found[name] = {"auc": above(right, wrong), "n": len(asked)}
    return found


@torch.no_grad()
def judged(score: Score, codes: torch.Tensor, texts: list[str]) -> np.ndarray:
    """[N], in parts that fit into memory."""
    parts = [score(codes[start : start + 64], texts[start : start + 64]) for start in range(0, len(codes), 64)]
    return torch.cat(parts).numpy()


# ---- learning and comparing ------------------------------------------------------------------------------------------


def learn(cfg: Config, name: str, learnt: list[str], weights: str, seed: int) -> Path:
    """An adapter's folder; what was trained before is not trained again, what was interrupted goes on. The same prompts are looked at on
    the way, by clips of other seeds."""
    out, file = cfg.out / name, cfg.out / "train.txt"
    if not (out / "adapter" / "manifest.json").is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(learnt) + "\n", encoding="utf-8")
        settings = train_ppo.Config(
            out=out,
            policy=cfg.policy,
            reward=cfg.reward if "human" in weights else None,
            prompts=file,
            heldout_prompts=file,
            heldout_clips=12 if cfg.learn == "pair" else 2,  # of 4 prompts, or of 20: looks that tell something
            weights=weights,
            hold="diversity" if "diversity" in parse_weights(weights) else "",
            credit=cfg.credit,
            steps=cfg.steps,
            batch_size=cfg.batch_size,
            samples_per_prompt=cfg.samples_per_prompt,
            n_frames=cfg.n_frames,
            lr=cfg.lr,
            kl_coef=cfg.kl_coef,
            kl_budget=150.0,
            listen=0,
            seed=seed,
            resume=out.exists(),
        )
        train_ppo.main(settings)
    return out / "adapter"


def averaged(cfg: Config, kind: str) -> Path:
    """The mean of the adapters of all seeds: as sure to the ears as each of them, at less drift."""
    out = cfg.out / f"{kind}_averaged" / "adapter"
    save_mix(out, [cfg.out / f"{kind}-{seed}" / "adapter" for seed in cfg.seeds], name=f"{kind}_averaged")
    return out


def compare(
    cfg: Config, policy: Policy, judges: Judges, adapters: Mapping[str, Path], texts: list[str], n: int, folder: str
) -> dict[str, dict[str, Any]]:
    """system -> {figure: mean, and for adapters its gain over the base's clip of the same prompt and seed with the interval}.

    The interval resamples pairs of mood and instrument, or clips where there is one pair only. Clips of all training seeds are pooled.
    """
    wanted = [Prompt(text, f"{row:03d}", "heldout", mood=asked(text)[0]) for row, text in enumerate(texts)]
    settings = Settings(n=n, seed=77, duration_s=cfg.n_frames / policy.codec.frame_rate)
    spread = evaluate(policy, adapters, wanted, cfg.out / folder, settings)
    marks = {name: opinions(cfg, policy, judges, Path(entry["manifest"])) for name, entry in spread.items()}
    pairs = [" ".join(asked(text)) for text in texts for _ in range(n)]
    clusters = pairs if len(set(pairs)) > 1 else [str(clip) for clip in range(len(pairs))]
    told: dict[str, dict[str, Any]] = {BASE: {name: {"mean": float(values.mean())} for name, values in marks[BASE].items()}}
    for kind in dict.fromkeys(name.rpartition("-")[0] for name in adapters):
        runs = [name for name in adapters if name.rpartition("-")[0] == kind]
        told[kind] = {}
        for name in marks[BASE]:
            gains = np.concatenate([marks[system][name] - marks[BASE][name] for system in runs])
            gain = mean_ci(gains, clusters * len(runs))
            mean = float(np.mean([marks[system][name].mean() for system in runs]))
            told[kind][name] = {"mean": mean, "gain": gain.value, "ci": list(gain.ci), "n": gain.n, "clusters": gain.n_clusters}
        for name in ("kl", "diversity_ratio"):
            told[kind][name] = {"mean": float(np.mean([spread[system][name] for system in runs]))}
    return told


@torch.no_grad()
def opinions(cfg: Config, policy: Policy, judges: Judges, manifest: Path) -> dict[str, np.ndarray]:
    """What everybody thinks of the clips of a manifest: name of the figure -> [N]."""
    rows = read_jsonl(manifest)
    texts, codes = [row["prompt"] for row in rows], read_codes(manifest, rows)
    features = np.stack([sound_features(*read_audio(manifest.parent / row["file"])) for row in rows])
    moods, leads = (list(names) for names in zip(*map(asked, texts)))
    found = {
        "mood": judges.probability("mood", features, moods),
        "instrument": judges.probability("lead", features, leads),
        "mood right": judges.right("mood", features, moods).astype(float),
        "instrument right": judges.right("lead", features, leads).astype(float),
    }
    found["both right"] = found["mood right"] * found["instrument right"]
    for name, score in checks(policy).items():
        if name in ("similarity", "mood", "instrument"):
            found[f"check: {name}"] = judged(score, codes, texts)
    if cfg.reward is not None:
        found["reward model"] = judged(load_reward(cfg.reward, policy).score, codes, texts)
    if cfg.taste is not None:
        found["taste"] = gold(cfg.taste, manifest)
    return found


def gold(taste: str, manifest: Path) -> np.ndarray:
    """The simulated taste's opinion [N], from a process of its own."""
    out = manifest.parent / f"gold-{taste}.json"
    command = ["-m", "rlhf.simulation.judge", "--manifest", str(manifest), "--out", str(out), "--taste", taste]
    done = subprocess.run([sys.executable, *command], cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"a judge that ended with {done.returncode}: {done.stderr.strip()[-300:]}", "scores", "check --taste")
    return np.array([clip["gold"] for clip in read_json(out)["clips"]])


# ---- telling ---------------------------------------------------------------------------------------------------------


def table(figures: Mapping[str, Any]) -> str:
    """Markdown: a row a system, the figure and, in brackets, the interval of its gain over the base."""
    blocks = []
    for title, told in figures.items():
        if title in ("hearing", "checks"):
            continue
        names = [*told[BASE], "kl", "diversity_ratio"]
        lines = [f"| {title} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for system, row in told.items():
            lines.append(f"| {system} | {' | '.join(cell(row.get(name)) for name in names)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def cell(entry: Mapping[str, Any] | None) -> str:
    """.412, or .530 (+.118 [.090, .146])."""
    if entry is None:
        return "-"
    if "gain" not in entry:
        return f"{entry['mean']:.3f}"
    return f"{entry['mean']:.3f} ({entry['gain']:+.3f} [{entry['ci'][0]:+.3f}, {entry['ci'][1]:+.3f}])"


if __name__ == "__main__":
    run(main, Config, show=lambda figures: json.dumps(figures, indent=2))
