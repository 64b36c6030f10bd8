"""TRL's GRPOTrainer and RLOOTrainer over the flat policy, played by our own sampler.

    prompt words -> prompt ids -> codes [B, K, T] by base_models.sampling -> ids -> score [B] -> advantages within a prompt -> LoRA

What differs from the stock trainers:
  * the cached sampler with merged LoRA plays (`_generate_single_turn`), and a clip's seed follows from its place in the run. At the
    first round what it says of its clips is held against the trainer's own scorer: sampled one way and scored another is refused.
  * the judge gets the codes that were played. TRL would hand a reward model re-tokenised text, whose ids are not those.
  * K native heads at the wrapper's temperature; checkpoints without pickle that hold the random state (`FlatCheckpoints`).
  * KL(policy || reference) in nats a *clip* from the sampler's log-probs: TRL's own figure is nats a code.

Shao et al. 2024, arXiv:2402.03300 (GRPO). Ahmadian et al. 2024, arXiv:2402.14740 (RLOO).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from adapters.lora import lora_config, lora_layers
from base_models.checkpoint import load_training_state
from base_models.sampling import generate
from rlhf.flat_dpo import FlatCheckpoints
from rlhf.flat_policy import FlatCausalLM, flat_order, flatten_codes, make_tokenizer, prompt_id, unflatten_ids, use_native_heads
from rlhf.journal import timed
from rlhf.judges import Score
from rlhf.played import kl_figures
from rlhf.rollout import sample_seed

TOLERANCE = 1e-4
"""How far sampler and scorer may differ in a code's log-prob, nats, in float32."""


class Judge:
    """The reward function that TRL calls: completion ids -> codes -> score; None where the score is not finite."""

    __name__ = "reward"

    def __init__(self, score: Score, prompts: Sequence[str], n_q: int, card: int) -> None:
        self.score, self.prompts, self.n_q, self.card = score, list(prompts), n_q, card
        self.seconds: dict[str, float] = {}
        """By phase (play, judge), since somebody told them."""

    def __call__(self, completion_ids: list[list[int]], row: list[int], **_: Any) -> list[float | None]:
        codes = unflatten_ids(torch.tensor(completion_ids), self.n_q, self.card)
        with timed(self.seconds, "judge"):
            marks = self.score(codes, [self.prompts[i] for i in row]).tolist()
        return [mark if math.isfinite(mark) else None for mark in marks]


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
        self.seconds, self.prompts = judge.seconds, judge.prompts
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
        """TRL's scores of all processes' clips [B, 1]; those that are not finite move nothing (TRL leaves them out), but are counted."""
        scores: Tensor = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
        self._metrics["train"]["scores_not_finite"].append(float(torch.isnan(scores).all(1).sum()))
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

    def _remembered(self) -> dict[str, Any]:
        return {"kl": self.kl if math.isfinite(self.kl) else None}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        known = load_training_state(resume_from_checkpoint, restore_rng=False)[3].get("kl")
        self.kl = float("nan") if known is None else known

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """TRL shuffles a round's clips by torch's own generator."""
        if checkpoint is not None:
            load_training_state(checkpoint)


class FlatGRPOTrainer(PlaysItself, GRPOTrainer):
    """GRPO: advantages are scores within a prompt, divided by their spread; ratios are clipped code by code."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        return self.play(prompt_ids), None


class FlatRLOOTrainer(PlaysItself, RLOOTrainer):
    """RLOO: a clip's score beside the mean of its prompt's others, KL in the score; ratios are clipped clip by clip."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        return self.play(prompt_ids)
