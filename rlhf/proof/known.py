"""A second judge of genre: fitted on real melodies that are played as each genre plays, not on what the base plays.

    python -m rlhf.proof.known --policy DIR --n 600 --seed 90 --duration 4 --out DIR

    melody x genre x mood x band -> arranged, rendered -> through the codec and back -> GenreProbe on waveforms -> probe.npz, figures.json

The probe that is fitted on the base's clips knows the base's own notion of a genre, mistakes and all; this one has heard none of its
clips. Its melodies are those that the corpus keeps for tests: neither the base nor a classifier of the reward has been trained on them.
Every fourth group of melodies is left out of the fit and tells the judge's accuracy. The codec stands between, as it does for clips."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from base_models.checkpoint import write_json
from base_models.codec import Codec
from base_models.corpus.known import Facts, Player
from base_models.corpus.styles import GENRES, MOODS
from base_models.errors import UserError, ended
from base_models.measures import GenreProbe, probe_features
from base_models.policy import PRETRAINED, load_policy

BUCKET = "test"
"""Which melodies: see base_models.corpus.build.piece_bucket."""


def is_held(group: str) -> bool:
    """Whether a group of near-duplicate melodies tells accuracy and is not fitted on."""
    return hashlib.sha256(f"known {group}".encode()).digest()[0] % 4 == 0


def rendering(player: Player, genre: str, rng: np.random.Generator) -> tuple[np.ndarray, Facts]:
    """(wav [L] in [-1, 1], facts): a mood, a band, a melody and a key by chance, in that genre."""
    return player.play(str(rng.choice(list(MOODS))), None, rng, genre)


@torch.no_grad()
def fit_known(codec: Codec, n: int, duration_s: float, seed: int, out: Path) -> dict[str, Any]:
    """n renderings, genres in turn -> the probe in OUT/probe.npz; returns how many it was fitted on and its accuracy on other melodies."""
    if n < len(GENRES):
        raise UserError(f"{n} renderings", f"{len(GENRES)} or more, one a genre", "ask for more")
    player = Player(codec.sample_rate, duration_s, [BUCKET])
    features, genres, held = [], [], []
    for index in tqdm(range(n), desc="known renderings", unit="clip"):
        genre = GENRES[index % len(GENRES)]
        wav, facts = rendering(player, genre, np.random.default_rng([seed, index]))
        heard = codec.decode(codec.encode(torch.from_numpy(wav)[None, None]))[0].numpy()
        features.append(probe_features(heard, codec.sample_rate))
        genres.append(genre)
        held.append(is_held(facts.group))
    rows, told = np.stack(features), np.array(held)
    names = np.array(genres)
    probe = GenreProbe.fit_features(rows[~told], names[~told].tolist())
    out.mkdir(parents=True, exist_ok=True)
    probe.save(out / "probe.npz")
    guesses = np.array([probe.classes[i] for i in probe.probabilities_of(rows[told]).argmax(1)]) if told.any() else np.array([])
    accuracy = float((guesses == names[told]).mean()) if told.any() else None
    return {"clips": int((~told).sum()), "held_out": int(told.sum()), "accuracy": accuracy}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=PRETRAINED)
    parser.add_argument("--n", type=int, default=600)
    parser.add_argument("--seed", type=int, default=90)
    parser.add_argument("--duration", type=float, default=4.0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    figures = fit_known(load_policy(args.policy).codec, args.n, args.duration, args.seed, args.out)
    write_json(args.out / "figures.json", figures)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
