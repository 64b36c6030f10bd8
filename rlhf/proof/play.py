"""Play held-out prompts with one system and measure all that needs no judge.

    python -m rlhf.proof.play --policy DIR --prompts heldout.jsonl --out DIR --system ppo [--adapter DIR] [--best-of 8 --reward DIR]
        [--beside BASE_DIR] [--proxy REWARD_DIR] [--probe probe.npz] [--real-probe probe.npz] [--rated manifest.jsonl] [--tokens DIR]

    prompts -> clips (seeds shared with the base) -> per clip: KL, text-audio similarity, tempo, genre, nearest training clip, proxy
            -> figures.json {mean figures} and clips.json {the same clip by clip}

Genre has two judges, and no reward hears either: one is fitted once on the base's own clips of training prompts (`--fit-probe`), and so
knows the base's notion of a genre; the other on renderings of real melodies (rlhf.proof.known). Neither has heard what it judges.
The nearest clip is looked for among the clips that were rated (they are what fine-tuning could copy) and, where tokens of the corpus are
given, among the base's training clips. The proxy is the reward model's opinion: it is told to be seen beside gold, never as proof."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters.library import load_adapter
from base_models.audio import read_audio
from base_models.checkpoint import read_jsonl, write_json
from base_models.corpus.tokens import load_tokens
from base_models.errors import ended
from base_models.evaluate_base import nearest_training_clip
from base_models.measures import GenreProbe, estimate_tempo, tempo_matches
from base_models.policy import PRETRAINED, Policy, load_policy
from rlhf.best_of_n import asked
from rlhf.evaluate_models import clip_features, kl_to_base, read_codes
from rlhf.metrics import diversity
from rlhf.reward_model import load_reward
from rlhf.sample_pairs import Settings, read_prompts, sample

Rows = list[dict[str, Any]]


def sounds(manifest: Path, rows: Rows) -> tuple[list[np.ndarray], int]:
    """Waveforms [L] of a manifest's rows, and their sample rate."""
    read = [read_audio(manifest.parent / row["file"]) for row in rows]
    return [wav[0] for wav, _ in read], read[0][1]


def similarity(policy: Policy, codes: torch.Tensor, prompts: Sequence[str]) -> np.ndarray:
    """Cosine between a clip and its prompt in the shared audio-text space, [N]."""
    assert policy.contrastive is not None
    text = policy.contrastive.embed_text(list(prompts))
    return np.asarray((torch.from_numpy(clip_features(policy, codes)) * text.cpu()).sum(1))


def proxy_scores(reward_dir: Path, policy: Policy, codes: torch.Tensor, prompts: Sequence[str]) -> np.ndarray:
    reward = load_reward(reward_dir, policy)
    parts = [reward.score(codes[start : start + 64], list(prompts[start : start + 64])) for start in range(0, len(codes), 64)]
    return torch.cat(parts).float().cpu().numpy()


@torch.no_grad()
def measure(args: argparse.Namespace, policy: Policy, manifest: Path) -> dict[str, np.ndarray]:
    """Figure -> one value a clip; NaN where a clip has none."""
    rows = read_jsonl(manifest)
    codes, prompts = read_codes(manifest, rows), [row["prompt"] for row in rows]
    wavs, sample_rate = sounds(manifest, rows)
    found = {"similarity": similarity(policy, codes, prompts)}
    stated = [row["tempo_bpm"] for row in rows]
    found["tempo"] = np.array(
        [np.nan if bpm is None else float(tempo_matches(estimate_tempo(wav, sample_rate), bpm)) for wav, bpm in zip(wavs, stated)]
    )
    for name, probe in (("genre", args.probe), ("genre_real", args.real_probe)):
        if probe:
            heard = GenreProbe.load(probe).predict(wavs, sample_rate)
            found[name] = np.array([float(guess == row["genre"]) for guess, row in zip(heard, rows)])
    if args.rated:
        found["nearest_rated"] = nearest_training_clip(codes, read_codes(args.rated, read_jsonl(args.rated))).numpy()
    if args.tokens:
        corpus = load_tokens(args.tokens)
        train = torch.as_tensor(corpus.codes[np.array([row["split"] for row in corpus.rows]) == "train"])
        found["nearest_training"] = nearest_training_clip(codes, train).numpy()
    if args.adapter:
        found["kl"] = kl_to_base(policy, rows, codes)
    if args.proxy:
        found["proxy"] = proxy_scores(args.proxy, policy, codes, prompts)
        if args.beside:
            base = args.beside / "samples" / "manifest.jsonl"
            beside = read_jsonl(base)
            found["proxy_base"] = proxy_scores(args.proxy, policy, read_codes(base, beside), [row["prompt"] for row in beside])
    return found


def play(args: argparse.Namespace) -> dict[str, Any]:
    policy = load_policy(args.policy)
    manifests = load_adapter(policy, args.adapter, [args.weight]) if args.adapter else []
    hashes = [manifest.adapter_sha256 for manifest in manifests]
    best = asked(args.best_of, args.reward, policy, args.score_command, manifests)
    settings = Settings(n=args.n, seed=args.seed, duration_s=args.duration)
    manifest = sample(policy, read_prompts(args.prompts), args.out / "samples", settings, args.system, hashes, best, [args.weight])
    found = measure(args, policy, manifest)
    rows = read_jsonl(manifest)
    figures: dict[str, Any] = {"clips": len(rows), "prompts": len({row["prompt_id"] for row in rows}), "adapter_sha256": hashes}
    figures |= {"weight": args.weight} if args.adapter else {}
    figures |= {name: float(np.nanmean(values)) if np.isfinite(values).any() else None for name, values in found.items()}
    if args.n > 1:
        figures["diversity"] = diversity(clip_features(policy, read_codes(manifest, rows)), [row["prompt_id"] for row in rows])
    if best is not None:  # log best/base = log best/adapter, bounded on average, + log adapter/base, measured on the clips that won
        figures["kl"] = best.kl_bound + (figures["kl"] if args.adapter else 0.0)
    for name in ("nearest_rated", "nearest_training"):
        if name in found:
            figures[f"{name}_copied"] = float((found[name] > 0.5).mean())
    columns = {name: [None if np.isnan(value) else round(float(value), 5) for value in values] for name, values in found.items()}
    write_json(args.out / "clips.json", {"file": [row["file"] for row in rows], "prompt_id": [row["prompt_id"] for row in rows], **columns})
    write_json(args.out / "figures.json", figures)
    return figures


def fit_probe(manifest: Path, out: Path) -> dict[str, Any]:
    """A genre probe from sampled clips, fitted on three quarters of the prompts and told by the last; saved as probe.npz."""
    rows = [row for row in read_jsonl(manifest) if row.get("genre")]
    wavs, sample_rate = sounds(manifest, rows)
    held = np.array([int(row["prompt_id"].rsplit("-", 1)[-1]) // 12 % 4 == 3 for row in rows])
    parts = [
        ([w for w, h in zip(wavs, held) if h == side], [r["genre"] for r, h in zip(rows, held) if h == side]) for side in (False, True)
    ]
    probe = GenreProbe.fit(parts[0][0], sample_rate, parts[0][1])
    probe.save(out / "probe.npz")
    figures = {"clips": len(parts[0][0]), "accuracy": probe.accuracy(parts[1][0], sample_rate, parts[1][1]) if parts[1][0] else None}
    write_json(out / "figures.json", figures)
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=PRETRAINED)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--system", default="base")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--weight", type=float, default=1.0, help="of the adapter")
    parser.add_argument("--best-of", type=int, default=1)
    parser.add_argument("--reward", type=Path)
    parser.add_argument("--score-command")
    parser.add_argument("--beside", type=Path, help="the cell in which the base played the same prompts")
    parser.add_argument("--proxy", type=Path, help="a reward model whose opinion is told beside the others")
    parser.add_argument("--probe", type=Path, help="of genre, fitted on the base's own clips (--fit-probe)")
    parser.add_argument("--real-probe", type=Path, help="of genre, fitted on renderings of real melodies (rlhf.proof.known)")
    parser.add_argument("--rated", type=Path, help="the manifest of the clips that were rated")
    parser.add_argument("--tokens", type=Path, help="the base's corpus, tokenised")
    parser.add_argument("-n", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--duration", type=float, default=4.0)
    parser.add_argument("--fit-probe", type=Path, metavar="MANIFEST", help="fit the genre probe on these clips, and nothing else")
    args = parser.parse_args(argv)
    print(json.dumps(fit_probe(args.fit_probe, args.out) if args.fit_probe else play(args)))
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
