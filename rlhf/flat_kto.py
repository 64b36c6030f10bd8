"""TRL's KTOTrainer over the flat policy: clips that were judged one by one, "both bad" among them.

    votes -> (clip, desirable or not, weight) -> 1 - sigmoid(+-beta (log pi/ref - kl)) -> LoRA

A pair orders two clips; a "both bad" orders nothing, but says that neither is any good, which only an unpaired loss can use. What
differs from the stock trainer: ids pass through, examples are weighted (the difference to `rlhf.losses.kto_loss` is added to TRL's
loss), the reference has spoken before the adapter exists, and checkpoints hold no pickle. As in TRL the point of reference `kl` is
estimated on clips under the prompts of their neighbours in the batch, so the order of the rows is fixed once. A clip that is alone in
the last batch, which TRL would measure against itself, has its neighbour in the batch before.

Ethayarajh et al. 2024, arXiv:2402.01306.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer

from adapters.lora import lora_config
from rlhf.flat_dpo import FlatCheckpoints, autocast
from rlhf.flat_policy import FlatCausalLM, make_tokenizer, use_native_heads
from rlhf.losses import kto_loss
from rlhf.preferences import Preference, Snapshot, both_bad, checked_codes


@dataclass(frozen=True)
class BadClip:
    """A clip that raters called bad without a comparison; weight is how often they did."""

    prompt_id: str
    prompt: str
    tempo_bpm: float | None
    codes: NDArray[Any]
    weight: float


def bad_clips(
    snapshot: Snapshot, weights: Mapping[str, float] | None = None, n_q: int | None = None, card: int | None = None
) -> tuple[BadClip, ...]:
    """Both clips of every "both bad" answer, each once, with the weight of the raters who said so; one of weight 0 or less says nothing.

    Raises: UserError when codes are not of n_q books of `card` entries: many of these clips are in no pair that would tell.
    """
    votes: dict[str, float] = defaultdict(float)
    for vote in both_bad(snapshot):
        weight = 1.0 if weights is None else max(0.0, weights.get(vote.rater, 0.0))
        for clip in (vote.clip_x, vote.clip_y) if weight else ():
            votes[clip] += weight
    found = [(snapshot.clips[clip], n) for clip, n in sorted(votes.items())]
    return tuple(BadClip(c.prompt_id, c.prompt, c.tempo_bpm, checked_codes(snapshot, c.sha256, n_q, card), n) for c, n in found)


Judgement = tuple[int, NDArray[Any], bool, float]
"""Row of the prompt table, codes [K, T], desirable, weight."""


def judgements(pairs: Sequence[Preference], table_rows: Sequence[int], bad: Sequence[tuple[int, NDArray[Any], float]]) -> list[Judgement]:
    """Pairs and bad clips (row, codes, weight) -> one judgement a clip.

    The chosen clip of a pair is desirable and the rejected one is not, with the weight (2 p - 1) * weight: a tie says nothing. Then
    undesirable clips are weighed so that both kinds weigh the same together (eq. 8 of the paper: a ratio of 1 to 4/3), mean 1.
    """
    found: list[Judgement] = []
    for pair, row in zip(pairs, table_rows, strict=True):
        weight = (2 * pair.p - 1) * pair.weight
        if weight > 0:
            found += [(row, pair.chosen_codes, True, weight), (row, pair.rejected_codes, False, weight)]
    found += [(row, codes, False, weight) for row, codes, weight in bad]
    total = {kind: sum(weight for _, _, desirable, weight in found if desirable == kind) for kind in (True, False)}
    scale = {kind: len(found) / (2 * total[kind]) if total[kind] else 0.0 for kind in total}
    return [(row, codes, desirable, weight * scale[desirable]) for row, codes, desirable, weight in found]


def judgement_rows(flat: FlatCausalLM, found: Sequence[Judgement], batch_size: int, seed: int) -> list[dict[str, Any]]:
    """Judgements -> the trainer's rows, in an order drawn once; each with its neighbour's clip in its batch for `kl`, one that is alone in
    the last batch with the one before it: its own would be its reward, and no reference."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = []
    for place in order:
        table_row, codes, desirable, weight = found[place]
        prompt, ids = flat.sequence(table_row, torch.as_tensor(codes))
        rows.append({"prompt_ids": prompt, "completion_ids": ids, "label": desirable, "weight": weight})
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        for i, row in enumerate(part):
            row["KL_completion_ids"] = (part[i - 1] if len(part) > 1 else rows[start - 1])["completion_ids"]
    return rows


class JudgementCollator(DataCollatorForUnpairedPreference):
    """TRL's collator, which would drop the weights."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return super().torch_call(examples) | {"weight": torch.tensor([float(row["weight"]) for row in examples])}


@torch.no_grad()
def reference_judgements(
    flat: FlatCausalLM, rows: Sequence[dict[str, Any]], args: KTOConfig, collator: JudgementCollator, batch_size: int
) -> list[dict[str, Any]]:
    """The rows with `ref_logps` and `ref_KL_logps` [nats a clip], by `flat` as it is now: call it before LoRA is attached."""
    starts = list(range(0, len(rows), batch_size))
    done: list[tuple[int, list[float], list[float]]] = []
    for start in starts[args.process_index :: args.world_size]:
        batch = {k: v.to(args.device) for k, v in collator(list(rows[start : start + batch_size])).items()}
        sums = []
        for side in ("", "KL_"):
            labels = batch[f"{side}input_ids"].masked_fill(batch[f"{side}completion_mask"] == 0, -100)
            with autocast(args):
                out = flat(batch[f"{side}input_ids"], batch[f"{side}attention_mask"], labels=labels, fused_lm_head=True)
            sums.append(out.log_probs.sum(1).tolist())
        done.append((start, sums[0], sums[1]))
    told = sorted(gather_object(done) if args.world_size > 1 else done)
    own, neighbour = [x for _, part, _ in told for x in part], [x for _, _, part in told for x in part]
    return [{**row, "ref_logps": a, "ref_KL_logps": b} for row, a, b in zip(rows, own, neighbour, strict=True)]


class FlatKTOTrainer(FlatCheckpoints, KTOTrainer):
    """KTO over `FlatCausalLM`; see the module's docstring."""

    def __init__(
        self,
        flat: FlatCausalLM,
        args: KTOConfig,
        train_rows: Sequence[dict[str, Any]],
        r: int = 16,
        alpha: float = 32.0,
        callbacks: list[Any] | None = None,
    ) -> None:
        self.lm = flat.trunk.lm
        super().__init__(
            model=flat,
            args=args,
            data_collator=JudgementCollator(pad_token_id=flat.config.pad_token_id, max_length=None),
            train_dataset=Dataset.from_list(list(train_rows)),
            processing_class=make_tokenizer(flat.config.n_q, flat.config.card, flat.config.n_prompts),
            peft_config=lora_config(r, alpha),
            callbacks=callbacks,
        )
        use_native_heads(flat)

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False) -> Any:
        weight = inputs.pop("weight")
        heard: list[Any] = []

        def listening(**kwargs: Any) -> Any:
            heard.append(model(**kwargs))
            return heard[-1]

        loss = super()._compute_loss(listening, inputs, return_outputs)
        assert self.model is not None
        figures = self._metrics["train" if self.model.training else "eval"]
        desirable = inputs["label"].bool()
        plain = kto_loss(heard[-1].log_probs.sum(1), inputs["ref_logps"], desirable, figures["kl"][-1], self.beta)
        local = torch.stack([(weight * plain).sum(), plain.sum(), torch.ones_like(plain).sum()]).detach().double()
        total = self.accelerator.reduce(local, "sum")
        figures["kto/loss"].append((total[0] / total[2]).item())
        figures["kto/loss_unweighted"].append((total[1] / total[2]).item())
        return loss + (weight * plain - plain).mean()
