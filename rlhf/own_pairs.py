"""The policy's own clips, judged by a reward model, as preference pairs: DPO that stays on policy.

    prompts -> n clips each, codes [n, K, T] -> score [n] -> best against worst -> rows of the DPO trainer, a round at a time
                                             -> or each clip edited both ways (rlhf.edits): better against worse

A few hundred rated pairs say what *they* say, and a policy that has learnt them by heart has learnt little else. A reward model
that was fitted on the same votes can judge any clip, so each round the policy as it then is plays new clips, and learns from the
best and the worst of each prompt; the reference stays the base. That is sampling from the policy and ranking by a reward (Liu et
al. 2023, arXiv:2309.06657), round after round (Xu et al. 2023, arXiv:2312.16682; best against worst of n: Dong et al. 2024,
arXiv:2405.07863). It differs from PPO in that nothing but the order within a prompt is learnt: no critic, no scale of the score.

What it must not do is believe the reward for ever: the KL to the base is measured on held-out prompts between rounds, and a run
ends when it exceeds its budget.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from adapters.lora import adapter_disabled
from base_models.checkpoint import read_json, write_json
from base_models.conditions import Conditions
from base_models.lm import MusicLM
from base_models.sampling import generate
from rlhf.dense import limited
from rlhf.dpo_report import NothingLeftError, Recorder
from rlhf.edits import Edits, antithetic_edits
from rlhf.flat_dpo import LiveRows, PreferenceCollator, reference_logps, smoothed
from rlhf.flat_policy import FlatCausalLM, flat_order
from rlhf.journal import speeds, timed
from rlhf.played import kl_by_book, kl_figures
from rlhf.rewards import Mixed, Score
from rlhf.rollout import prompt_of, sample_seed

Pairing = Literal["best_worst", "all", "edits"]
Labels = Literal["hard", "soft"]


@dataclass(frozen=True)
class Judged:
    """Clips with a score: codes [B, K, T]; rows [B], of the prompt table; code_logps [B, K, T], nats, the sampler's; score [B]."""

    codes: Tensor
    rows: list[int]
    code_logps: Tensor
    score: Tensor


def play_and_judge(
    lm: MusicLM,
    table: Conditions,
    prompts: Sequence[str],
    rows: Sequence[int],
    seeds: Sequence[int],
    score: Score | None,
    n_frames: int,
    temperature: float,
    batch_size: int,
    seconds: dict[str, float],
) -> Judged:
    """Play one clip for each row of the table, `batch_size` at once, and judge it.

    Args: table, prompts: the same prompts as conditions and as words. rows, seeds [B]: one clip each. score: None leaves the scores
        NaN, where they come with the slopes. seconds: what `play` and `judge` take is added there.
    """
    codes, logps, scores = [], [], []
    cond = table.to(next(lm.parameters()).device)
    for start in range(0, len(rows), batch_size):
        part = list(rows[start : start + batch_size])
        with timed(seconds, "play"):
            made = generate(lm, cond.index(part), n_frames, seeds=seeds[start : start + batch_size], temperature=temperature)
            codes.append(made.codes.cpu())
            logps.append(made.code_logps.cpu())
        with timed(seconds, "judge"):
            judged = score(made.codes, [prompts[row] for row in part]).detach() if score else torch.full((len(part),), math.nan)
            scores.append(judged.float().cpu())
    return Judged(torch.cat(codes), list(rows), torch.cat(logps), torch.cat(scores))


def pair_up(score: Tensor, pairing: Pairing) -> list[tuple[int, int]]:
    """Scores of one prompt's clips [n] -> (chosen, rejected) places; clips whose score is not finite are left out.

    best_worst: one pair, the largest gap. all: every pair, which costs n - 1 times the training and tells more of the middle.
    Equal scores order nothing.
    """
    order = [place for place in torch.argsort(score, descending=True, stable=True).tolist() if math.isfinite(score[place])]
    pairs = [(order[0], order[-1])] if pairing == "best_worst" and order else [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]
    return [(chosen, rejected) for chosen, rejected in pairs if score[chosen] > score[rejected]]


def edited_codes(better: Tensor, worse: Tensor) -> list[int]:
    """codes [K, T] of a clip's two edits -> 1 where they differ, else 0, in flat order [K * T]; all 1 where they are the same."""
    book, frame = flat_order(*better.shape)
    differ = (better != worse)[book, frame]
    return (differ if differ.any() else torch.ones_like(differ)).int().tolist()


def label(difference: float, labels: Labels) -> float:
    """How probably the better clip is preferred: 1 (hard), or sigmoid(score difference) as the reward model is calibrated (soft)."""
    return 1.0 if labels == "hard" else 1.0 / (1.0 + math.exp(-difference))


@dataclass(frozen=True)
class Plan:
    """How a round is made; `rlhf.train_dpo.Config` says what each figure means."""

    n_prompts: int
    n_clips: int
    n_rated: int
    pairing: Pairing
    labels: Labels
    label_smoothing: float
    n_frames: int
    temperature: float
    sample_batch: int
    score_batch: int
    held_out_clips: int
    kl_budget: float
    edit_price: float
    seed: int
    held: tuple[str, ...] = ()
    """Parts of the reward that stay at the base's level (rlhf.rewards.Reward.hold)."""

    @property
    def pairs_per_prompt(self) -> int:
        if self.pairing == "edits":
            return self.n_clips
        return 1 if self.pairing == "best_worst" else self.n_clips * (self.n_clips - 1) // 2

    @property
    def n_rows(self) -> int:
        return self.n_prompts * self.pairs_per_prompt + self.n_rated


class OwnPairs:
    """Makes the rows of a round from the policy as it is now, and measures it on prompts that it never learns from."""

    def __init__(
        self,
        flat: FlatCausalLM,
        args: Any,
        plan: Plan,
        prompts: Sequence[str],
        first_row: int,
        held_out: Sequence[int],
        score: Score,
        rated: Sequence[dict[str, Any]] = (),
    ) -> None:
        """prompts: one a row of the table, from `first_row` on. held_out: which of them are kept for measuring. rated: scored rows
        of rated pairs, of which `plan.n_rated` go into each round, in turn."""
        self.flat, self.args, self.plan, self.score = flat, args, plan, score
        self.lm = flat.trunk.lm
        self.prompts = {first_row + i: prompt for i, prompt in enumerate(prompts)}
        self.held_out = [first_row + i for i in held_out]
        self.learnt = [row for row in self.prompts if row not in set(self.held_out)]
        self.rated = list(rated)
        self.base_scores: Tensor | None = None
        self.heard: Judged | None = None
        """What was played when it was last measured."""
        self.seconds: dict[str, float] = {}
        """By phase (look, play, judge), since they were told."""
        self.collator = PreferenceCollator(pad_token_id=flat.config.pad_token_id, max_length=None)

    def round(self, number: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Play, judge, pair: `plan.n_rows` scored rows and what can be told of them. A function of the policy, seed and number."""
        plan, rank, world = self.plan, self.args.process_index, self.args.world_size
        size = plan.n_prompts * plan.n_clips
        indices = range(number * size, (number + 1) * size)
        rows = [self.learnt[i] for i in prompt_of(indices, len(self.learnt), plan.n_clips, plan.seed)]
        mine = [i for i in range(size) if (i // plan.n_clips) % world == rank]
        by_slope = plan.pairing == "edits"
        seeds = [sample_seed(plan.seed, indices[i]) for i in mine]
        judged = self._play([rows[i] for i in mine], seeds, self.seconds, not by_slope)
        with timed(self.seconds, "judge"):
            edits, own_scores = self._edits(judged, [indices[i] for i in mine]) if by_slope else (None, judged.score)
            pairs = self._pairs(judged, [indices[i] for i in mine], edits)
        made: list[tuple[int, dict[str, Any]]] = []
        gaps, unused = [], 0
        for index, row, better, worse, gap in pairs:
            used = gap is not None
            unused += not used
            gaps += [gap] if gap is not None else []
            p = 0.5 if gap is None else label(gap, plan.labels)
            prompt, chosen = self.flat.sequence(row, better)
            _, rejected = self.flat.sequence(row, worse)
            soft = {"p_chosen": smoothed(p, plan.label_smoothing), "weight": float(used)}
            row_of_pair = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, **soft}
            if by_slope:  # the sides differ where they were edited, and only there one is better
                differ = edited_codes(better, worse)
                row_of_pair |= {"chosen_mask": differ, "rejected_mask": differ}
            made.append((index, row_of_pair))
        told = [(own_scores.tolist(), gaps, unused)]
        if world > 1:
            made, told = gather_object(made), gather_object(told)
        fresh = [row for _, row in sorted(made, key=lambda pair: pair[0])]
        with timed(self.seconds, "judge"), adapter_disabled(self.lm):
            fresh = reference_logps(self.flat, fresh, self.args, self.collator, plan.score_batch)
        turn = [self.rated[(number * plan.n_rated + i) % len(self.rated)] for i in range(plan.n_rated)]
        scores = torch.tensor([x for part, _, _ in told for x in part])
        scores, all_gaps = scores[torch.isfinite(scores)], [x for _, part, _ in told for x in part]
        return fresh + turn, {
            "own/score": scores.mean().item() if len(scores) else float("nan"),
            "own/gap": sum(all_gaps) / max(len(all_gaps), 1),
            "own/pairs": float(len(all_gaps)),
            "own/pairs_unordered": float(sum(n for _, _, n in told)),
        }

    def _pairs(self, judged: Judged, indices: Sequence[int], edits: Edits | None) -> list[tuple[int, int, Tensor, Tensor, float | None]]:
        """(place in the run, row of the table, better, worse: codes [K, T], gap in score), `pairs_per_prompt` a prompt; the gap is None
        where a pair is not to be used."""
        plan, n = self.plan, self.plan.n_clips
        if edits is not None:
            found = zip(indices, judged.rows, edits.better, edits.worse, edits.gap.tolist())
            return [(i, row, a, b, gap if math.isfinite(gap) and gap > 0 else None) for i, row, a, b, gap in found]
        pairs: list[tuple[int, int, Tensor, Tensor, float | None]] = []
        for start in range(0, len(indices), n):
            codes, score = judged.codes[start : start + n], judged.score[start : start + n]
            places = pair_up(score, "all" if plan.pairing == "all" else "best_worst")
            padded = [*places, *[None] * (plan.pairs_per_prompt - len(places))]
            for place in padded:
                a, b = place or (0, 0)
                gap = None if place is None else float(score[a] - score[b])
                pairs.append((indices[start], judged.rows[start], codes[a], codes[b], gap))
        return pairs

    def _edits(self, judged: Judged, indices: Sequence[int]) -> tuple[Edits, Tensor]:
        """Every clip edited both ways by the policy as it is, and the clips' scores [B]; slopes are limited by the median of all
        processes' clips."""
        plan, device = self.plan, self.args.device
        assert isinstance(self.score, Mixed)
        table, parts = self.flat.trunk.table.to(device), [slice(i, i + plan.score_batch) for i in range(0, len(indices), plan.score_batch)]
        names = [self.prompts[row] for row in judged.rows]
        found = [self.score.slope(judged.codes[p].to(device), names[p]) for p in parts]
        slope, score = (torch.cat([pair[i] for pair in found]) for i in (0, 1))
        everywhere = slope.flatten(1).norm(dim=1).tolist()
        typical = float(torch.tensor(gather_object(everywhere) if self.args.world_size > 1 else everywhere).nanmedian())
        slope = limited(slope, typical=typical)
        assert self.base_scores is not None
        spread = float(self.base_scores[torch.isfinite(self.base_scores)].std())
        unit = max(spread, self.score.reward.least, 1e-6)
        made = [
            antithetic_edits(
                self.lm,
                self.score,
                judged.codes[p].to(device),
                slope[p],
                table.index(judged.rows[p]),
                names[p],
                [sample_seed(plan.seed ^ 0xED17, index) for index in indices[p]],
                unit,
                plan.edit_price,
                plan.temperature,
            )
            for p in parts
        ]
        edits = Edits(*(torch.cat([getattr(part, name).cpu() for part in made]) for name in ("better", "worse", "gap")))
        return edits, score.float().cpu()

    @torch.no_grad()
    def measure(self, number: int = 0) -> dict[str, float]:
        """Held-out prompts, the same seeds each time: mean score, KL(policy || base) in nats a clip, and the share of clips that the
        reward prefers to the base's clip of the same prompt and seed (ties half). Every process does it all: they agree exactly.

        number: of the round that is to come; held weights move from where the round before had left them.
        """
        with timed(self.seconds, "look"):
            return self._measure(number)

    def _measure(self, number: int) -> dict[str, float]:
        plan, apart = self.plan, dict[str, float]()
        rows = [self.held_out[i % len(self.held_out)] for i in range(plan.held_out_clips)]
        seeds = [sample_seed(plan.seed ^ 0x4E1D, i) for i in range(len(rows))]
        if self.base_scores is None:
            with adapter_disabled(self.lm):
                base = self._play(rows, seeds, apart)
            names = [self.prompts[row] for row in rows]
            if isinstance(self.score, Mixed):  # the base's clips set the scale of the reward's parts
                self.score.measure(base.codes.to(self.args.device), names)
                base = dataclasses.replace(base, score=self.score(base.codes.to(self.args.device), names).float().cpu())
            self.base_scores = base.score
        self.heard = played = self._play(rows, seeds, apart, not plan.held)
        if plan.held:
            self.heard = played = self._hold(number, played)
        book_kl = []
        for start in range(0, len(rows), plan.score_batch):
            part = slice(start, start + plan.score_batch)
            cond = self.flat.trunk.table.index(rows[part]).to(self.args.device)
            codes, logps = played.codes[part].to(self.args.device), played.code_logps[part].to(self.args.device)
            book_kl.append(kl_by_book(self.lm, codes, cond, logps, plan.temperature).cpu())
        both = torch.isfinite(played.score) & torch.isfinite(self.base_scores)
        mine, theirs = played.score[both], self.base_scores[both]
        return {
            "held_out/score": mine.mean().item(),
            "held_out/score_base": theirs.mean().item(),
            "held_out/preferred_to_base": ((mine > theirs).float() + 0.5 * (mine == theirs).float()).mean().item(),
            **{f"held_out/{name}": value for name, value in kl_figures(torch.cat(book_kl).mean(0)).items()},
            **{f"held_out/weight_{name}": self.score.reward.now[name] for name in plan.held if isinstance(self.score, Mixed)},
        }

    def _hold(self, number: int, played: Judged) -> Judged:
        """Move the weights of held parts by what was played, which is judged by the weights of the start.

        Weights after each round stand in held.json, so that a resumed run takes up those of the round before, whatever it had done since.
        """
        assert isinstance(self.score, Mixed)
        reward, path = self.score.reward, Path(self.args.output_dir) / "held.json"
        known = read_json(path) if number else {}
        reward.now |= known[str(number - 1)] if number else {name: reward.parts[name].weight for name in self.plan.held}
        marks = reward.marks(played.codes.to(self.args.device), [self.prompts[row] for row in played.rows])
        reward.hold(self.plan.held, marks)
        if self.args.should_save:
            write_json(path, {**known, str(number): {name: reward.now[name] for name in self.plan.held}})
        return dataclasses.replace(played, score=reward.judge(marks, stated=True).total.float().cpu())

    def _play(self, rows: Sequence[int], seeds: Sequence[int], seconds: dict[str, float], judged: bool = True) -> Judged:
        plan, table = self.plan, self.flat.trunk.table
        names = [self.prompts.get(row, "") for row in range(len(table))]
        how = (self.score if judged else None, plan.n_frames, plan.temperature, plan.sample_batch)
        return play_and_judge(self.lm, table, names, rows, seeds, *how, seconds)


class Rounds(TrainerCallback):
    """Between rounds: measure; stop where the KL budget is spent; else play, judge and hand the next rows to the trainer."""

    def __init__(self, own: OwnPairs, live: LiveRows, epochs: int, recorder: Recorder) -> None:
        self.own, self.live, self.epochs, self.recorder = own, live, epochs, recorder
        self.seconds: dict[str, float] = {}
        """Of the round that is being learnt."""
        recorder.by_step = False
        self.stopped = ""
        self.last: dict[str, float] = {}
        self.number = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._next(state, control)
        if self.stopped:
            raise NothingLeftError  # a resumed run that had stopped: the trainer would take a step before it asks

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if int(state.epoch + 1e-6) % self.epochs == 0 or control.should_training_stop:
            self._next(state, control)

    def _next(self, state: Any, control: Any) -> None:
        number = int((state.epoch or 0) + 1e-6) // self.epochs
        figures = self.own.measure(number)
        kl = figures["held_out/kl"]
        if not kl <= self.own.plan.kl_budget:  # NaN too
            self.stopped = f"kl {kl:.1f} nats a clip exceeds the budget of {self.own.plan.kl_budget:g}"
            control.should_training_stop = True
        if not control.should_training_stop and state.global_step < state.max_steps:
            rows, more = self.own.round(number)
            self.live.fill(rows)
            figures |= more
        self.last = figures
        self.number = number
        self.recorder.tell(state.global_step, {"round": float(number), **figures, **self._speeds()})
        heard = self.own.heard
        assert heard is not None
        self.recorder.play(state.global_step, [(self.own.prompts[row], codes) for row, codes in zip(heard.rows, heard.codes)])

    def _speeds(self) -> dict[str, float]:
        """Seconds of what has just been played and judged, and of learning in the round before, whose speed is known now."""
        lm, plan = self.own.lm, self.own.plan
        codes = plan.n_prompts * plan.n_clips * lm.n_q * plan.n_frames
        before, self.seconds = self.seconds | self.recorder.seconds, dict(self.own.seconds)
        self.recorder.seconds.clear()
        self.own.seconds.clear()
        told = speeds(before, codes) if "learn" in before else {}
        return {name: told[name] for name in ("seconds_learn", "tokens_per_second") if name in told} | speeds(self.seconds, codes)

    def summary(self) -> dict[str, Any]:
        """First and last held-out figures, and why it ended."""
        names = ("held_out/score", "held_out/preferred_to_base", "held_out/kl")
        told = {name.replace("/", "_"): round(self.last[name], 4) for name in names}
        return {
            "rounds": self.number,
            "stopped": self.stopped or "rounds",
            "held_out_score_base": round(self.last["held_out/score_base"], 4),
        } | told
