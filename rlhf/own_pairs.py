"""The policy's own clips, judged by a reward model, as preference pairs: DPO that stays on policy.

    prompts -> n clips each, codes [n, K, T] -> score [n] -> best against worst -> rows of the DPO trainer, a round at a time
                                             -> or each clip edited both ways (rlhf.edits): better against worse

A few hundred rated pairs say what *they* say, and a policy that has learnt them by heart has learnt little else. A reward model
that was fitted on the same votes can judge any clip, so each round the policy as it then is plays new clips, and learns from the
best and the worst of each prompt; the reference stays the base. That is sampling from the policy and ranking by a reward (Liu et
al. 2023, arXiv:2309.06657), round after round (Xu et al. 2023, arXiv:2312.16682; best against worst of n: Dong et al. 2024,
arXiv:2405.07863). It differs from PPO in that nothing but the order within a prompt is learnt: no critic, no scale of the score.

What it must not do is believe the reward for ever: the KL to the base is measured on held-out prompts between rounds, and a run
is drawn back or ends when it exceeds its budget.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from adapters.lora import adapter_disabled
from rlhf.by_round import ByRound
from rlhf.dense import limited, typical_length
from rlhf.edits import Edits, antithetic_edits
from rlhf.flat_dpo import PreferenceCollator, reference_logps, smoothed
from rlhf.flat_policy import FlatCausalLM
from rlhf.journal import timed
from rlhf.judges import Score
from rlhf.played import kl_by_book, kl_figures
from rlhf.rewards import Mixed, Reward
from rlhf.rollout import look_seed, prompt_of, sample_seed
from rlhf.round_plan import Plan
from rlhf.round_rows import Judged, Made, edited_codes, label, pair_up, play_and_judge

LOOK = 0x4E1D
VERIFY = 4
"""Of so many edited clips the reward is asked about one where labels are hard: of 160 edits a round it orders 0 to 6 otherwise than meant
(shipped base, five runs), and to ask about all of them would double what judging costs."""


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
        self.held = ByRound[dict[str, float]](Path(args.output_dir) / "held.json", args.should_save)
        """The weights of held parts after each round."""
        self.collator = PreferenceCollator(pad_token_id=flat.config.pad_token_id, max_length=None)

    def round(self, number: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Play, judge, pair: `plan.n_rows` scored rows and what can be told of them. A function of the policy, seed and number."""
        plan, rank, world = self.plan, self.args.process_index, self.args.world_size
        size = plan.n_prompts * plan.n_clips
        indices = range(number * size, (number + 1) * size)
        rows = [self.learnt[i] for i in prompt_of(indices, len(self.learnt), plan.n_clips, plan.seed)]
        mine = [i for i in range(size) if (i // plan.n_clips) % world == rank]
        seeds = [sample_seed(plan.seed, indices[i]) for i in mine]
        judged = self._play([rows[i] for i in mine], seeds, self.seconds, not plan.by_slope)
        numbers = [indices[i] for i in mine]
        with timed(self.seconds, "judge"):
            slope, own_scores = self._slopes(judged) if plan.by_slope else (None, judged.score)
            made, gaps, unused = (
                self._expected(judged, numbers, slope) if plan.pairing == "expected" else self._sampled(judged, numbers, slope)
            )
        told = [(own_scores.tolist(), gaps, unused)]
        if world > 1:
            made, told = gather_object(made), gather_object(told)
        fresh = [row for _, row in sorted(made, key=lambda pair: pair[0])]
        if plan.pairing != "expected":
            with timed(self.seconds, "judge"), adapter_disabled(self.lm):
                fresh = reference_logps(self.flat, fresh, self.args, self.collator, plan.score_batch)
        turn = [self.rated[(number * plan.n_rated + i) % len(self.rated)] for i in range(plan.n_rated)]
        scores = torch.tensor([x for part, _, _ in told for x in part])
        scores, all_gaps = scores[torch.isfinite(scores)], [x for _, part, _ in told for x in part]
        return fresh + turn, {
            "own/score": scores.mean().item() if len(scores) else float("nan"),
            **({"own/gap": sum(all_gaps) / len(all_gaps)} if all_gaps else {}),
            "own/pairs": float(sum(row["weight"] > 0 for row in fresh)),
            "own/pairs_unordered": float(sum(n for _, _, n in told)),
        }

    def _sampled(self, judged: Judged, indices: Sequence[int], slope: Tensor | None) -> tuple[Made, list[float], int]:
        """Rows of pairs of clips, numbered; the gaps in score that are known; how many pairs are not to be used."""
        plan, made, gaps, unused = self.plan, Made(), list[float](), 0
        edits = None if slope is None else self._edits(judged, indices, slope)
        for index, row, better, worse, gap in self._pairs(judged, indices, edits):
            used = gap is not None
            unused += not used
            gaps += [gap] if gap is not None and math.isfinite(gap) else []
            p = 0.5 if gap is None else label(gap, plan.labels)
            prompt, chosen = self.flat.sequence(row, better)
            _, rejected = self.flat.sequence(row, worse)
            soft = {"p_chosen": smoothed(p, plan.label_smoothing), "weight": float(used)}
            row_of_pair = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, **soft}
            if edits is not None:  # the sides differ where they were edited, and only there one is better
                differ = edited_codes(better, worse)
                row_of_pair |= {"chosen_mask": differ, "rejected_mask": differ}
            made.append((index, row_of_pair))
        return made, gaps, unused

    def _expected(self, judged: Judged, indices: Sequence[int], slope: Tensor | None) -> tuple[Made, list[float], int]:
        """The same where all edits of a clip for the better are one side and all for the worse the other: the clip with its slope."""
        assert slope is not None
        made, moved = Made(), slope.flatten(1).any(1).tolist()
        unit = self._unit()
        for index, row, codes, d_score, used in zip(indices, judged.rows, judged.codes, slope.cpu(), moved, strict=True):
            prompt, ids = self.flat.sequence(row, codes)
            sides = {"prompt_ids": prompt, "chosen_ids": ids, "rejected_ids": ids, "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}
            soft = {"p_chosen": smoothed(1.0, self.plan.label_smoothing), "weight": float(used)}
            made.append((index, sides | soft | {"slope": d_score / unit}))
        return made, [], len(moved) - sum(moved)

    def _pairs(self, judged: Judged, indices: Sequence[int], edits: Edits | None) -> list[tuple[int, int, Tensor, Tensor, float | None]]:
        """(place in the run, row of the table, better, worse: codes [K, T], gap in score), `pairs_per_prompt` a prompt; the gap is None
        where a pair is not to be used, NaN where nobody asked."""
        plan, n = self.plan, self.plan.n_clips
        if edits is not None:
            found = zip(indices, judged.rows, edits.better, edits.worse, edits.gap.tolist())
            return [(i, row, a, b, None if gap <= 0 else gap) for i, row, a, b, gap in found]
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

    def _slopes(self, judged: Judged) -> tuple[Tensor, Tensor]:
        """Slope of the score at every clip [B, D, T], limited by the median of all processes' clips, and the scores [B]."""
        device = self.args.device
        assert isinstance(self.score, Mixed)
        names = [self.prompts[row] for row in judged.rows]
        found = [self.score.slope(judged.codes[p].to(device), names[p]) for p in self._parts(len(names))]
        slope, score = (torch.cat([pair[i] for pair in found]) for i in (0, 1))
        everywhere = slope.flatten(1).norm(dim=1).tolist()
        typical = typical_length(torch.tensor(gather_object(everywhere) if self.args.world_size > 1 else everywhere))
        return limited(slope, typical=typical), score.float().cpu()

    def _unit(self) -> float:
        """A standard deviation of the base's scores."""
        assert isinstance(self.score, Mixed)
        assert self.base_scores is not None
        finite = self.base_scores[torch.isfinite(self.base_scores)]
        return max(float(finite.std()) if len(finite) > 1 else 0.0, self.score.reward.least, 1e-6)

    def _edits(self, judged: Judged, indices: Sequence[int], slope: Tensor) -> Edits:
        """Every clip edited both ways by the policy as it is."""
        plan, device = self.plan, self.args.device
        assert isinstance(self.score, Mixed)
        table, names = self.flat.trunk.table.to(device), [self.prompts[row] for row in judged.rows]
        made = [
            antithetic_edits(
                self.lm,
                self.score,
                judged.codes[p].to(device),
                slope[p],
                table.index(judged.rows[p]),
                names[p],
                [sample_seed(plan.seed ^ 0xED17, index) for index in indices[p]],
                self._unit(),
                plan.edit_price,
                plan.temperature,
                torch.tensor([plan.labels == "soft" or index // plan.n_clips % VERIFY == 0 for index in indices[p]]),
            )
            for p in self._parts(len(names))
        ]
        return Edits(*(torch.cat([getattr(part, name).cpu() for part in made]) for name in ("better", "worse", "gap")))

    def _parts(self, n: int) -> list[slice]:
        return [slice(i, i + self.plan.score_batch) for i in range(0, n, self.plan.score_batch)]

    @torch.no_grad()
    def measure(self, number: int = 0) -> dict[str, float]:
        """Held-out prompts, the same seeds each time: mean score, KL(policy || base) in nats a clip, and the share of clips that the
        reward prefers to the base's clip of the same prompt and seed (ties half). Every process does it all: they agree exactly.

        number: of the round that is to come; held weights move from where the round before had left them.
        """
        with timed(self.seconds, "look"):
            return self._measure(number)

    @torch.no_grad()
    def drift(self, number: int = 0) -> dict[str, float]:
        """The KL alone, of the same prompts and seeds, whole and by codebook: nobody judges, and no held weight moves."""
        with timed(self.seconds, "look"):
            rows, seeds = self._looked_at()
            return self._kl(self._play(rows, seeds, {}, judged=False))

    def _looked_at(self, number: int = 0) -> tuple[list[int], list[int]]:
        """Row of the table and seed of every clip of a look; a prompt's clips in a row. number: as of `look_seed`."""
        plan = self.plan
        rows = [self.held_out[(i // plan.n_clips) % len(self.held_out)] for i in range(plan.held_out_clips)]
        return rows, [sample_seed(look_seed(plan.seed, LOOK, number), i) for i in range(len(rows))]

    def _kl(self, played: Judged) -> dict[str, float]:
        """KL(policy || base) of what the policy as it is has played, in nats a clip."""
        plan, book_kl = self.plan, []
        for part in self._parts(len(played.rows)):
            cond = self.flat.trunk.table.index(played.rows[part]).to(self.args.device)
            codes, logps = played.codes[part].to(self.args.device), played.code_logps[part].to(self.args.device)
            book_kl.append(kl_by_book(self.lm, codes, cond, logps, plan.temperature).cpu())
        return {f"held_out/{name}": value for name, value in kl_figures(torch.cat(book_kl).mean(0)).items()}

    def _measure(self, number: int) -> dict[str, float]:
        apart: dict[str, float] = {}
        rows, seeds = self._looked_at()
        whole = self.score if isinstance(self.score, Mixed) else None
        if self.base_scores is None:
            with adapter_disabled(self.lm):
                base = self._play(rows, seeds, apart, whole is None)
            self.base_scores = base.score if whole is None else self._scales(whole, base)
        self.heard = played = self._play(rows, seeds, apart, whole is None)
        parts: dict[str, float] = {}
        if whole is not None:
            self.heard, parts = self._told_apart(whole, number, played)
            played = self.heard
        both = torch.isfinite(played.score) & torch.isfinite(self.base_scores)
        mine, theirs = played.score[both], self.base_scores[both]
        return {
            "held_out/score": mine.mean().item(),
            "held_out/score_base": theirs.mean().item(),
            "held_out/preferred_to_base": ((mine > theirs).float() + 0.5 * (mine == theirs).float()).mean().item(),
            **self._kl(played),
            **{f"held_out/{name}": value for name, value in parts.items()},
        }

    def _scales(self, whole: Mixed, base: Judged) -> Tensor:
        """Let the base's clips set the scale of the reward's parts: those of the look, and --base-looks less one with other seeds, since
        what a policy that has moved on plays shares with them the prompts alone. Returns the scores [B] of the first."""
        reward, words = whole.reward, [self.prompts[row] for row in base.rows]
        looks = [self._marks(reward, base)]
        for number in range(1, 1 if reward.measured else self.plan.base_looks):
            with adapter_disabled(self.lm):
                looks.append(self._marks(reward, self._play(*self._looked_at(number), {}, judged=False)))
        reward.measure(torch.cat(looks), words * len(looks), [*base.rows] * len(looks))
        silent = ", ".join(reward.without_scale)
        not_trained = f"not trained on: {silent}, which no held-out prompt asks for; hold out more, or others" if silent else None
        for line in (reward.not_held(self.plan.held), not_trained):
            if line and self.args.should_save:
                print(line, flush=True)
        return reward.judge(looks[0], words, stated=True).total.float().cpu()

    def _marks(self, reward: Reward, played: Judged) -> Tensor:
        """What every part says of what was played [B, P]."""
        return reward.marks(played.codes.to(self.args.device), [self.prompts[row] for row in played.rows], everything=True)

    def _told_apart(self, whole: Mixed, number: int, played: Judged) -> tuple[Judged, dict[str, float]]:
        """What was played, judged by the weights of the start. Held weights move by it. With it what each part says of it, those
        without a weight too."""
        reward, held = whole.reward, self.plan.held
        reward.begin(held, self.held.before(number) if number and held else None)
        words = [self.prompts[row] for row in played.rows]
        marks = self._marks(reward, played)
        if held:
            reward.hold(held, marks, words, self.plan.hold_rate, self.plan.hold_slack)
            self.held.put(number, reward.held(held))
        figures = {name: value for name, value in reward.figures(marks).items() if not name.endswith("_weight")}
        figures |= {f"weight_{key.replace('/', '_')}": weight for key, weight in reward.held(held).items()}
        return dataclasses.replace(played, score=reward.judge(marks, words, stated=True).total.float().cpu()), figures

    def _play(self, rows: Sequence[int], seeds: Sequence[int], seconds: dict[str, float], judged: bool = True) -> Judged:
        plan, table = self.plan, self.flat.trunk.table
        names = [self.prompts.get(row, "") for row in range(len(table))]
        how = (self.score if judged else None, plan.n_frames, plan.temperature, plan.sample_batch)
        return play_and_judge(self.lm, table, names, rows, seeds, *how, seconds)
