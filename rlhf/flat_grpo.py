"""TRL's GRPOTrainer and RLOOTrainer over the flat policy, played by our own sampler.

    prompt words -> prompt ids -> codes [B, K, T] by base_models.sampling -> ids -> marks [B, P] -> score [B] -> advantages within a prompt
    -> LoRA

What differs from the stock trainers:
  * the cached sampler with merged LoRA plays (`_generate_single_turn`), and a clip's seed follows from its place in the run. At the
    first round what it says of its clips is held against the trainer's own scorer: sampled one way and scored another is refused.
  * the judge gets the codes that were played. TRL would hand a reward model re-tokenised text, whose ids are not those.
  * the parts of the reward are added in units of the base (`rlhf.rewards`). TRL's own weights would add them in whatever units they have.
  * K native heads at the wrapper's temperature; checkpoints without pickle that hold the random state (`FlatCheckpoints`).
  * KL(policy || reference) in nats a *clip* from the sampler's log-probs: TRL's own figure is nats a code.

Shao et al. 2024, arXiv:2402.03300 (GRPO). Ahmadian et al. 2024, arXiv:2402.14740 (RLOO).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import TrainerState
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from adapters.lora import lora_config, lora_layers
from base_models.checkpoint import load_training_state, rng_state, set_rng_state
from base_models.errors import UserError
from base_models.sampling import generate
from rlhf.flat_dpo import FlatCheckpoints
from rlhf.flat_policy import FlatCausalLM, flat_order, flatten_codes, make_tokenizer, prompt_id, unflatten_ids, use_native_heads
from rlhf.journal import timed
from rlhf.played import kl_figures
from rlhf.rewards import Reward
from rlhf.rollout import sample_seed

TOLERANCE = 1e-4
"""How far sampler and scorer may differ in a code's log-prob, nats, in float32."""


class Judge:
    """The reward function that TRL calls: completion ids -> codes -> marks [B, P] of all parts -> score; None where it is not finite.

    The clips of the first round give the parts their units: a fresh adapter is the identity, so they are the base's."""

    __name__ = "reward"

    def __init__(self, reward: Reward, prompts: Sequence[str], n_q: int, card: int) -> None:
        self.reward, self.prompts, self.n_q, self.card = reward, list(prompts), n_q, card
        self.gather: Callable[[Tensor], Tensor] = lambda mine: mine
        """What this process has [B, ...] -> what all have, in the order of the clips."""
        self.figures: dict[str, float] = {}
        """What each part says of the newest clips of all processes, trained on or not; no z of one that the first round asked nothing."""
        self.seconds: dict[str, float] = {}
        """By phase (play, judge), since somebody told them."""

    def __call__(
        self, completion_ids: list[list[int]], row: list[int], trainer_state: TrainerState | None = None, **_: Any
    ) -> list[float | None]:
        """row: the prompt of each clip. trainer_state: without one it is the first round. Raises UserError where nothing in the first
        round tells what a part that is trained on should weigh."""
        codes = unflatten_ids(torch.tensor(completion_ids), self.n_q, self.card)
        words = [self.prompts[i] for i in row]
        with timed(self.seconds, "judge"):
            mine = self.reward.marks(codes, words, everything=True)
        marks = self.gather(mine)
        if trainer_state is None or trainer_state.global_step == 0:
            self.measure(marks, self.gather(torch.tensor(row)).tolist())
        self.figures = self.reward.figures(marks)
        total = self.reward.judge(mine, words).total.tolist()
        return [score if math.isfinite(score) else None for score in total]

    def measure(self, marks: Tensor, rows: list[int]) -> None:
        """Take the parts' units from clips of the base, of all processes: marks [B, P] and the prompt of each."""
        self.reward.measure(marks, [self.prompts[i] for i in rows], rows)
        if not self.reward.measured:
            silent = ", ".join(name for name in self.reward.trained if name not in self.reward.scales)
            raise UserError(
                f"a weight of {silent}, of which no clip of the first round tells anything",
                "a round with a prompt that asks for it, or its marks have no unit",
                "raise --batch-size, or leave it out of --weights",
            )


class PlaysItself(FlatCheckpoints):
    """What GRPO and RLOO have in common here; it stands before TRL's trainer among the bases."""

    _metrics: Any
    kl: float
    """KL(policy || reference), nats a clip, of the newest clips; NaN before any."""

    def __init__(
        self,
        flat: FlatCausalLM,
        args: GRPOConfig | RLOOConfig,
        rows: Sequence[int],
        judge: Judge,
        r: int = 16,
        alpha: float = 32.0,
        seed: int = 0,
        sample_batch: int = 64,
        callbacks: list[Any] | None = None,
    ) -> None:
        """rows: the prompt of each group of clips, in the order in which they are played; `args.shuffle_dataset` is False."""
        self.flat, self.lm = flat, flat.trunk.lm
        self.n_frames, self.seed, self.sample_batch = args.max_completion_length // flat.config.n_q, seed, sample_batch
        self.kl, self.played, self.checked = float("nan"), torch.zeros(0), False
        self.judge, self.seconds, self.prompts = judge, judge.seconds, judge.prompts
        self.heard: list[tuple[str, Tensor]] = []
        """The newest clips, the first of each prompt: words, codes [K, T]."""
        trl: Any = super()
        trl.__init__(
            model=flat,
            reward_funcs=[judge],
            args=args,
            train_dataset=Dataset.from_list([{"prompt": f"prompt_{row}", "row": row} for row in rows]),
            processing_class=make_tokenizer(flat.config.n_q, flat.config.card, flat.config.n_prompts),
            peft_config=lora_config(r, alpha),
            callbacks=callbacks,
        )
        use_native_heads(flat)
        judge.gather = self._everywhere

    def _everywhere(self, mine: Tensor) -> Tensor:
        everyone: Tensor = self.accelerator.gather(mine.to(self.accelerator.device))
        return everyone.to(mine.device)

    def play(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """One clip for each prompt id, by our own sampler, as completion ids."""
        with timed(self.seconds, "play"):
            return self._play(prompt_ids)

    def _play(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        K, V = self.flat.config.n_q, self.flat.config.card
        rows = [ids[0] - prompt_id(0, K, V) for ids in prompt_ids]
        rank, n = self.args.process_index, len(rows)
        first = self.state.global_step * n * self.args.world_size + rank * n
        seeds = [sample_seed(self.seed, first + i) for i in range(n)]
        book, frame = flat_order(K, self.n_frames)
        cond = self.flat.trunk.table.to(next(self.lm.parameters()).device)
        codes, logps = [], []
        for start in range(0, n, self.sample_batch):
            part = rows[start : start + self.sample_batch]
            made = generate(
                self.lm,
                cond.index(part),
                self.n_frames,
                seeds=seeds[start : start + self.sample_batch],
                temperature=self.flat.trunk.temperature,
            )
            codes.append(made.codes)
            logps.append(made.code_logps[:, book, frame])
        self.played = torch.cat(logps)
        self.heard = [(self.prompts[rows[i]], codes[0][i]) for i in range(0, len(codes[0]), self.args.num_generations)]
        ids = flatten_codes(torch.cat(codes), V)
        if not self.checked:
            self.check_scorer(torch.tensor(prompt_ids, device=ids.device), ids)
        return ids.tolist()

    @torch.no_grad()
    def check_scorer(self, prompts: Tensor, ids: Tensor, clips: int = 4) -> None:
        """Sampler and scorer must be one distribution (float32, the first clips). Raises RuntimeError where they are not."""
        whole = torch.cat([prompts, ids], 1)[:clips]
        labels = whole.clone()
        labels[:, 0] = -100
        scored = self.flat(whole, torch.ones_like(whole), labels=labels, fused_lm_head=True).log_probs
        worst = float((scored - self.played[:clips]).abs().max())
        if not worst <= TOLERANCE:
            raise RuntimeError(f"sampler and scorer differ by {worst:.2g} nats a code: temperature, guidance or weights are not the same")
        self.checked = True

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's scores of all processes' clips [B, 1]; those that are not finite move nothing (TRL leaves them out), but are counted.
        With them, what each part of the reward says is told."""
        scores: Tensor = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
        for name, value in {"scores_not_finite": float(torch.isnan(scores).all(1).sum()), **self.judge.figures}.items():
            self._metrics["train"][name].append(value)
        return scores

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's scorer; what it says with the adapter switched off is the reference, and gives the KL."""
        scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]
        if not torch.is_grad_enabled() and next(iter(lora_layers(self.lm).values())).disable_adapters:
            by_place = (self.played - scored[0]).sum(0)
            book = flat_order(self.flat.config.n_q, self.n_frames)[0].to(by_place.device)
            books = by_place.new_zeros(self.flat.config.n_q).index_add(0, book, by_place)
            *total, count = self.accelerator.reduce(torch.cat([books, books.new_tensor([len(self.played)])]), "sum").tolist()
            figures = kl_figures([value / count for value in total])
            self.kl = figures.pop("kl")
            for name, value in {"kl_nats_per_clip": self.kl, **figures}.items():
                self._metrics["train"][name].append(value)
        return scored

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.streams = gather_object([rng_state()])
        super()._save_checkpoint(model, trial)

    def _remembered(self) -> dict[str, Any]:
        return {"kl": self.kl if math.isfinite(self.kl) else None, "reward": self.judge.reward.state_dict()}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        extra = load_training_state(resume_from_checkpoint, restore_rng=False)[3]
        self.kl = float("nan") if extra.get("kl") is None else extra["kl"]
        self.judge.reward.load_state_dict(extra["reward"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """TRL shuffles a round's clips by torch's own generator, which it seeds differently in each process."""
        if checkpoint is not None:
            streams = load_training_state(checkpoint)[2].get("streams", [])
            if self.args.process_index < len(streams):  # else more of them than before, or an old checkpoint: as in the first process
                set_rng_state(*streams[self.args.process_index])


class FlatGRPOTrainer(PlaysItself, GRPOTrainer):
    """GRPO: advantages are scores within a prompt, divided by their spread; ratios are clipped code by code."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        return self.play(prompt_ids), None


class FlatRLOOTrainer(PlaysItself, RLOOTrainer):
    """RLOO: a clip's score beside the mean of its prompt's others, KL in the score; ratios are clipped clip by clip."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        return self.play(prompt_ids)
