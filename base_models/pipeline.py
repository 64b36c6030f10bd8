"""From a prompt to a mastered track, in three lines:

    pipeline = MusicPipeline.from_pretrained()
    track = pipeline.generate("sad piano, slow", duration_s=6.0, seed=7)
    track.save("track.wav")

    prompt -> Conditions -> codes [1, K, T] -> wav [1, C, L] -> mastered [2, L'] at 44.1 kHz

An adapted policy goes through the same door: `adapters.library.load_adapter(policy, folder)`, then `MusicPipeline(policy)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from base_models.conditions import TEMPO_RANGE_BPM
from base_models.errors import UserError
from base_models.mastering import TARGET_LUFS, MasteredTrack, master
from base_models.policy import PRETRAINED, Policy, load_policy
from base_models.sampling import generate

MAX_PROMPT_CHARACTERS = 1_000
DURATION_RANGE_S = (1.0, 30.0)
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Track(MasteredTrack):
    """A mastered track that knows where it came from: the same prompt, seed, settings and policy give the same codes."""

    prompt: str
    seed: int
    codes: Tensor
    """[K, T] int64."""
    policy_sha256: str


def check_prompt(prompt: str) -> str:
    """The prompt without outer blanks; UserError for one that says nothing or too much."""
    text = prompt.strip()
    if not text:
        raise UserError("an empty prompt", "a few words about the music", 'write something like "sad piano, slow"')
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise UserError(
            f"a prompt of {len(text):,} characters",
            f"at most {MAX_PROMPT_CHARACTERS:,}",
            "say it in fewer words; one sentence is plenty",
        )
    if any("\ud800" <= character <= "\udfff" for character in text):  # half an emoji, or a byte that is no UTF-8
        raise UserError(f"a prompt that is no text: {text[:20]!a}", "characters of Unicode", "take out what is broken, or save it as UTF-8")
    if not any(character.isalpha() for character in text):
        shown = text if len(text) <= 20 else text[:20] + "..."
        raise UserError(f"a prompt without a letter: {shown!r}", "words", 'write something like "sad piano, slow"')
    return text


def check_request(prompt: str, duration_s: float, seed: int) -> str:
    """`check_prompt`, and UserError for a duration or a seed that no track can have."""
    text = check_prompt(prompt)
    if not DURATION_RANGE_S[0] <= duration_s <= DURATION_RANGE_S[1]:
        raise UserError(f"a duration of {duration_s} s", "{} to {} s".format(*DURATION_RANGE_S), "ask for 6 s")
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"the seed {seed}", "a whole number from 0 to 2^63 - 1", "pick another seed")
    return text


def check_sampling(temperature: float, top_k: int, cfg_coef: float, card: int) -> None:
    """UserError for settings that no codebook of `card` codes can be sampled with."""
    if not 0 < temperature < math.inf:
        raise UserError(f"a temperature of {temperature}", "a number above 0", "ask for 1")
    if not 0 <= top_k <= card:
        raise UserError(f"a top-k of {top_k}", f"0 (all) to {card}, the size of a codebook", "ask for 0")
    if not math.isfinite(cfg_coef):
        raise UserError(f"guidance of {cfg_coef}", "a finite number", "ask for 1, which is none")


class MusicPipeline:
    """A policy with mastering behind it."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @classmethod
    def from_pretrained(cls, folder: str | Path = PRETRAINED, device: str | torch.device = "cpu") -> MusicPipeline:
        """Load a policy's folder; without one, the demo base that ships with Encore."""
        return cls(load_policy(folder, device))

    def generate(
        self,
        prompt: str,
        duration_s: float = 6.0,
        seed: int = 0,
        *,
        tempo_bpm: float | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        cfg_coef: float = 1.0,
        sample_rate: int | None = 44_100,
        stereo: bool = True,
        target_lufs: float = TARGET_LUFS,
    ) -> Track:
        """Sample, decode and master one track.

        Args: tempo_bpm: else read from the prompt ("120 BPM"), else free. temperature, top_k, cfg_coef: as in
        base_models.sampling.generate. sample_rate: None keeps the codec's. Raises UserError for what it cannot do.
        """
        text = check_request(prompt, duration_s, seed)
        if tempo_bpm is not None and not TEMPO_RANGE_BPM[0] <= tempo_bpm <= TEMPO_RANGE_BPM[1]:
            raise UserError(f"a tempo of {tempo_bpm} BPM", "{} to {} BPM".format(*TEMPO_RANGE_BPM), "ask for 120")
        policy = self.policy
        check_sampling(temperature, top_k, cfg_coef, policy.lm.card)
        sampled = generate(
            policy.lm,
            policy.conditions([text], [tempo_bpm]),
            policy.n_frames(duration_s),
            seeds=[seed],
            temperature=temperature,
            top_k=top_k,
            cfg_coef=cfg_coef,
        )
        return self.finish(sampled.codes, text, seed, sample_rate=sample_rate, stereo=stereo, target_lufs=target_lufs)

    def finish(
        self,
        codes: Tensor,
        prompt: str,
        seed: int,
        *,
        sample_rate: int | None = 44_100,
        stereo: bool = True,
        target_lufs: float = TARGET_LUFS,
    ) -> Track:
        """Decode and master codes [1, K, T] that were sampled for this prompt with this seed."""
        policy = self.policy
        wav = policy.decode(codes)[0].float().cpu().numpy()
        mastered = master(wav, policy.codec.sample_rate, target_lufs, sample_rate, stereo)
        return Track(**vars(mastered), prompt=prompt, seed=seed, codes=codes[0].cpu(), policy_sha256=policy.sha256)
