"""TRL's DPOTrainer over the flat policy, with what a music model's votes need.

What differs from the stock trainer, and why:
  * ids pass through: there is no text to tokenise (`_prepare_dataset`), and nothing is ever truncated (`max_length=None`).
  * the reference has spoken before the adapter exists (`reference_logps`), by the same code in the same precision; TRL's own
    cache of it lies in a folder of one process, which a second process never finds (`_precompute_ref_logps`).
  * labels are soft and pairs are weighted: TRL 1.16's "sigmoid" loss knows neither (its `label_smoothing` is for two other
    losses and would be ignored silently). The difference to `rlhf.losses.dpo_loss` is added to TRL's loss (`_compute_loss`).
  * "simpo" is among the losses, which TRL's DPOTrainer lacks; its own, experimental, trainer knows no soft labels and no weights.
  * a pair may act on a stretch of its clips alone, where raters marked what is bad (`marked_codes`).
  * K native heads instead of one head over all ids (`use_native_heads`).
  * checkpoints without pickle (`FlatCheckpoints`): adapter and optimiser as safetensors, the rest as JSON, whole or not at all.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.kto_config import KTOConfig

from adapters.lora import adapter_tensors, lora_config, set_adapter_tensors
from base_models.checkpoint import load_training_state, save_training_state
from base_models.lm import MusicLM
from rlhf.average import Average
from rlhf.controllers import AdaptiveKLController
from rlhf.flat_policy import ExpectedEdits, FlatCausalLM, flat_order, make_tokenizer, use_native_heads
from rlhf.losses import dpo_loss, ipo_loss, simpo_loss
from rlhf.preferences import Preference, Spans

PairLoss = Literal["sigmoid", "ipo", "simpo"]

EXTRA_COLUMNS = ("p_chosen", "weight")


def smoothed(p: float, label_smoothing: float) -> float:
    """Conservative DPO: the raters' p, mixed with a coin at the rate at which a label is thought to be wrong."""
    return p * (1.0 - 2.0 * label_smoothing) + label_smoothing


def marked_codes(spans: Spans, n_q: int, n_frames: int, frame_rate: float) -> list[int]:
    """Stretches in ms -> 1 for every code, in flat order [K * T], that sounds within one of them, else 0.

    A stretch (t0, t1) covers frames floor(t0 / 1000 * frame_rate) to ceil(t1 / 1000 * frame_rate). A code sounds in its *frame*, and
    code k of frame t is said at step t + k under the delay pattern: so a stretch of frames a to b takes its codes from steps a to
    b + K - 1, and of the steps at its edges only the books that speak of frames inside.
    """
    frames = np.zeros(n_frames, dtype=bool)
    for t0_ms, t1_ms in spans:
        frames[math.floor(t0_ms / 1000 * frame_rate) : math.ceil(t1_ms / 1000 * frame_rate)] = True
    _, frame = flat_order(n_q, n_frames)
    marked: list[int] = frames[frame.numpy()].astype(int).tolist()
    return marked


def preference_rows(
    flat: FlatCausalLM,
    pairs: Sequence[Preference],
    table_rows: Sequence[int],
    label_smoothing: float,
    marks_at: float | None = None,
) -> list[dict[str, Any]]:
    """Pairs -> what the trainer reads: ids of prompt, chosen and rejected, the soft label and the weight.

    Args: marks_at: the codec's frames a second, to let a pair act on what its raters marked as bad; None takes whole clips.
    With R the codes of the rejected clip within its marks, and C those of the chosen clip at the same times, such a pair's log-ratios
    are sums over R and C instead of all codes: log pi/ref (c_{k,t} | all codes said before), (k, t) in C or R. The codes before a
    stretch are its context and get no blame of their own. (Blame where the fault is: Yu et al. 2023, arXiv:2312.00849, weigh
    corrected segments; here the rest weighs 0. The same stretch of the chosen clip, since clips of one prompt run in one tempo, and
    a sum over unequal lengths would push one side's likelihood whatever it says.) Ties, and marks that one of the two clips is too
    short for, leave the pair whole.
    """
    rows = []
    for pair, row in zip(pairs, table_rows, strict=True):
        prompt, chosen = flat.sequence(row, torch.as_tensor(pair.chosen_codes))
        _, rejected = flat.sequence(row, torch.as_tensor(pair.rejected_codes))
        label = {"p_chosen": smoothed(pair.p, label_smoothing), "weight": pair.weight}
        row_of_pair = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, **label}
        if marks_at is not None:
            spans = pair.rejected_marks if pair.p > 0.5 else ()
            masks = [marked_codes(spans, codes.shape[0], codes.shape[1], marks_at) for codes in (pair.chosen_codes, pair.rejected_codes)]
            if not all(any(mask) for mask in masks):
                masks = [[1] * len(mask) for mask in masks]
            row_of_pair |= {"chosen_mask": masks[0], "rejected_mask": masks[1]}
        rows.append(row_of_pair)
    return rows


class LiveRows(torch.utils.data.Dataset[dict[str, Any]]):
    """The trainer's rows, which change from round to round while their number stays (the data loader is made once)."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.rows: list[dict[str, Any]] = []

    def fill(self, rows: list[dict[str, Any]]) -> None:
        assert len(rows) == self.n, f"{len(rows)} rows for {self.n} places"
        self.rows = rows

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


class PreferenceCollator(DataCollatorForPreference):
    """TRL's collator, which would drop the labels and weights; codes outside of a pair's marks are no completion."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        for place, (side, row) in enumerate((side, row) for side in ("chosen", "rejected") for row in examples):
            if (mask := row.get(f"{side}_mask")) is not None:
                start = len(row["prompt_ids"])
                batch["completion_mask"][place, start : start + len(mask)] *= torch.tensor(mask)
        if "slope" in examples[0]:
            batch["slope"] = torch.stack([row["slope"] for row in examples])
        return batch | {name: torch.tensor([float(row[name]) for row in examples]) for name in EXTRA_COLUMNS}


@torch.no_grad()
def reference_logps(
    flat: FlatCausalLM, rows: Sequence[dict[str, Any]], args: DPOConfig, collator: PreferenceCollator, batch_size: int
) -> list[dict[str, Any]]:
    """The rows with `ref_chosen_logps` and `ref_rejected_logps` [nats], by `flat` as it is now: call it before LoRA is attached.

    With several processes each scores its share, and all get the whole.
    """
    device, rank, world = args.device, args.process_index, args.world_size
    starts = list(range(0, len(rows), batch_size))
    done: list[tuple[int, list[float], list[float]]] = []
    for start in starts[rank::world]:
        batch = {k: v.to(device) for k, v in collator(list(rows[start : start + batch_size])).items()}
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        with autocast(args):
            out = flat(batch["input_ids"], batch["attention_mask"], labels=labels, fused_lm_head=True)
        chosen, rejected = out.log_probs.sum(1).chunk(2)
        done.append((start, chosen.tolist(), rejected.tolist()))
    chosen_all, rejected_all = [], []
    for _, chosen_part, rejected_part in sorted(gather_object(done) if world > 1 else done):
        chosen_all += chosen_part
        rejected_all += rejected_part
    logps = zip(chosen_all, rejected_all, strict=True)
    return [{**row, "ref_chosen_logps": c, "ref_rejected_logps": r} for row, (c, r) in zip(rows, logps, strict=True)]


def autocast(args: DPOConfig | KTOConfig) -> contextlib.AbstractContextManager[Any]:
    """The precision in which the trainer's own forward pass runs."""
    return torch.autocast(args.device.type, torch.bfloat16) if args.bf16 else contextlib.nullcontext()


class FlatCheckpoints:
    """For a TRL trainer over a flat policy: checkpoints of the adapter called "default", without pickle, whole or not at all."""

    lm: MusicLM
    args: Any
    state: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    parents: Mapping[str, Any] = MappingProxyType({})
    """What the run comes from; a checkpoint says it, and is not resumed with anything else."""
    streams: Sequence[tuple[dict[str, Tensor], dict[str, Any]]] = ()
    """The random streams of every process, for a trainer that draws from them."""
    average: Average | None = None
    """The mean of the rounds' adapters that goes with them, for a trainer in rounds."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """`output_dir/checkpoints/step_XXXXXXXX`, written by the first process; whole with the trainer's own state or not at all."""
        if self.args.should_save:
            states = {"optimizer": self.optimizer.state_dict(), "scheduler": self.lr_scheduler.state_dict(), "streams": self.streams}
            mean = self.average.tensors if self.average is not None else {}
            counted = {} if self.average is None else {"rounds_averaged": self.average.rounds}
            save_training_state(
                str(self.args.output_dir),
                self.state.global_step,
                {"adapter": adapter_tensors(self.lm), **({"average": mean} if mean else {})},
                states,
                {**self.parents, **self._remembered(), **counted},
                also=lambda folder: self.state.save_to_json(str(folder / TRAINER_STATE_NAME)),
            )
        self.accelerator.wait_for_everyone()

    def _remembered(self) -> dict[str, Any]:
        """More that a checkpoint says."""
        return {}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        _, tensors, _, extra = load_training_state(resume_from_checkpoint, restore_rng=False)
        set_adapter_tensors(self.lm, tensors["adapter"])
        if self.average is not None:
            self.average.load(tensors.get("average", {}), extra["rounds_averaged"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            states = load_training_state(checkpoint, restore_rng=False)[2]
            self.optimizer.load_state_dict(states["optimizer"])
            self.lr_scheduler.load_state_dict(states["scheduler"])
            plan = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
            for group, rate, share in zip(self.optimizer.param_groups, plan.base_lrs, plan.lr_lambdas):
                group["lr"] = rate * share(plan.last_epoch)  # of a run that is given more steps the rate falls to the new end
            plan._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing is drawn here but the order of the data, which the trainer replays from its seed, and clips, which have seeds."""


class FlatDPOTrainer(FlatCheckpoints, DPOTrainer):
    """DPO over `FlatCausalLM`; see the module's docstring. The adapter it trains is called "default" in `lm`."""

    def __init__(
        self,
        flat: FlatCausalLM,
        args: DPOConfig,
        train_rows: Sequence[dict[str, Any]] | LiveRows,
        eval_rows: Sequence[dict[str, Any]] = (),
        r: int = 16,
        alpha: float = 32.0,
        callbacks: list[Any] | None = None,
        loss: PairLoss = "sigmoid",
        gamma: float = 0.5,
        kl_price: AdaptiveKLController | None = None,
        codebooks: Tensor | None = None,
        edit_price: float = 0.0,
        sft_weight: float = 0.0,
    ) -> None:
        """`args.loss_type` begins with TRL's name of `loss`, or with "sigmoid" where TRL has none (simpo). gamma: SimPO's margin.
        kl_price: what a nat of divergence from the reference costs (`_anchor`); None: nothing. codebooks [K, V, D], edit_price: of rows
        that bring the slope of a score instead of a second clip (`_expected`). sft_weight: of the likelihood of chosen clips."""
        self.pair_loss, self.gamma = loss, gamma
        self.kl_price = kl_price or AdaptiveKLController(0.0)
        self.codebooks, self.edit_price, self.sft_weight = codebooks, edit_price, sft_weight
        self.evaluated: Tensor | None = None
        """Sums over the held-out pairs of this evaluation so far, as of `_tell`."""
        self.lm: MusicLM = flat.trunk.lm
        live = train_rows if isinstance(train_rows, LiveRows) else None
        known = [{"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0]}] if live else list(train_rows)  # type: ignore[arg-type]
        super().__init__(
            model=flat,
            args=args,
            data_collator=PreferenceCollator(pad_token_id=flat.config.pad_token_id, max_length=None),
            train_dataset=Dataset.from_list(known),
            eval_dataset=Dataset.from_list(list(eval_rows)) if eval_rows else None,
            processing_class=make_tokenizer(flat.config.n_q, flat.config.card, flat.config.n_prompts),
            peft_config=lora_config(r, alpha),
            callbacks=callbacks,
        )
        if live is not None:
            self.train_dataset = live  # TRL looks at a row of a table on disk; the data loader is made of this
        use_native_heads(flat)

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False) -> Any:
        p_chosen, weight = inputs.pop("p_chosen"), inputs.pop("weight")
        if "slope" in inputs:
            return self._expected(model, inputs, p_chosen, weight)
        heard: list[Any] = []

        def listening(**kwargs: Any) -> Any:
            heard.append(model(**kwargs, anchored=self.kl_price.kl_coef > 0))
            return heard[-1]

        loss = super()._compute_loss(listening, inputs, return_outputs)
        chosen, rejected = heard[0].log_probs.sum(1).chunk(2)
        logps = (chosen, rejected, inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
        n_chosen, n_rejected = inputs["completion_mask"].sum(1).chunk(2)
        soft, reward_chosen, reward_rejected = dpo_loss(*logps, self.beta, p_chosen)
        plain, _, _ = dpo_loss(*logps, self.beta)
        trl, ours = plain, soft
        if self.pair_loss == "ipo":
            trl = ipo_loss(*logps, n_chosen, n_rejected, self.beta)
            ours = ipo_loss(*logps, n_chosen, n_rejected, self.beta, p_chosen)
        elif self.pair_loss == "simpo":
            ours = simpo_loss(chosen, rejected, n_chosen, n_rejected, self.beta, self.gamma, p_chosen)
        self._tell(weight * ours, plain, reward_chosen, reward_rejected, p_chosen)
        # What a clip won by weighs here too: a tie makes neither of its clips likelier (TRL's own "sft" would, whichever stands first).
        likelihood = (weight * (2 * p_chosen - 1).clamp(min=0) * -chosen / n_chosen).mean() if self.sft_weight else 0.0
        return loss + (weight * ours - trl).mean() + self.sft_weight * likelihood + self._anchor(heard[0].kl)

    def _expected(self, model: Any, inputs: dict[str, Tensor], p_chosen: Tensor, weight: Tensor) -> Tensor:
        """DPO's loss where a pair is all edits of a clip for the better against all for the worse: their expected log-ratios stand for
        those of a draw. Both sides are the clip as it was played; `slope` says how they would be edited."""
        assert self.codebooks is not None
        clips = slice(len(p_chosen))
        ids, mask = inputs["input_ids"][clips], inputs["attention_mask"][clips]
        labels = ids.masked_fill(inputs["completion_mask"][clips] == 0, -100)
        edits = ExpectedEdits(inputs["slope"], self.codebooks.to(ids.device), self.edit_price)
        out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, anchored=self.kl_price.kl_coef > 0, edits=edits)
        nothing = torch.zeros_like(out.margin)
        loss, better, worse = dpo_loss(out.margin, nothing, nothing, nothing, self.beta, p_chosen)
        self._tell(weight * loss, dpo_loss(out.margin, nothing, nothing, nothing, self.beta)[0], better, worse, p_chosen)
        figures = self._figures()
        figures["rewards/margins"].append(self.accelerator.gather(self.beta * out.margin.detach()).mean().item())
        figures["logps/chosen"].append(
            self.accelerator.gather(out.log_probs.detach().sum(1)).mean().item()
        )  # of both sides: it is one clip
        return (weight * loss).mean() + self._anchor(out.kl)

    def _anchor(self, kl: Tensor | None) -> Tensor | float:
        """What departure from the reference costs: price * mean KL(policy || reference) [nats a clip] over the pairs' clips, where the
        price may answer that KL (--kl-power).

        A pair says which of two clips is to become likelier, and nothing of all that they have in common: there a step's noise moves
        the policy, and no later pair moves it back. (A sequential KL beside the pairs, as in token-level DPO: Zeng et al. 2024,
        arXiv:2404.11999; here of both clips, with its gradient.)
        """
        if kl is None:
            return 0.0
        measured = float(self.accelerator.reduce(kl.detach().mean(), "mean"))
        figures, price = self._figures(), self.kl_price.price(measured)
        figures["dpo/kl_of_pairs"].append(measured)
        figures["dpo/kl_price"].append(price)
        return price * kl.mean()

    def _tell(self, loss: Tensor, hard: Tensor, reward_chosen: Tensor, reward_rejected: Tensor, p_chosen: Tensor) -> None:
        """Figures that TRL does not log, over all processes."""
        decided = p_chosen > 0.5 + 1e-6
        right = ((reward_chosen > reward_rejected) & decided).to(loss)
        drift, margin = -(reward_chosen + reward_rejected) / (2 * self.beta), reward_chosen - reward_rejected
        of_each = torch.stack([loss, hard, right, decided.to(loss), drift, torch.ones_like(drift), margin], 1).detach().double()
        assert self.model is not None
        if not self.model.training:  # the last batch may be filled up with pairs that have been met, which are left out here
            told = self.accelerator.gather_for_metrics(of_each).sum(0)
            self.evaluated = told if self.evaluated is None else self.evaluated + told
            return  # `log` tells of all batches
        total = self.accelerator.reduce(of_each.sum(0), "sum")
        figures = self._figures()
        figures["dpo/loss"].append((total[0] / total[5]).item())
        figures["dpo/loss_hard_labels"].append((total[1] / total[5]).item())
        if total[3] > 0:
            figures["dpo/accuracy_decided"].append((total[2] / total[3]).item())
        figures["dpo/kl_reference_to_policy"].append((total[4] / total[5]).item())

    def log(self, logs: dict[str, float], *more: Any, **named: Any) -> None:
        """TRL's figures of an evaluation are means of the batches' means, of which the last may be of one pair: ours are of all pairs."""
        if self.evaluated is not None:
            loss, hard, right, decided, drift, n, margin = self.evaluated.tolist()
            of_all = {"dpo/loss": loss / n, "dpo/loss_hard_labels": hard / n, "dpo/kl_reference_to_policy": drift / n}
            of_all |= {"rewards/margins": margin / n} | ({"dpo/accuracy_decided": right / decided} if decided else {})
            self._metrics["eval"].update({name: [value] for name, value in of_all.items()})
            self.evaluated = None
        super().log(logs, *more, **named)

    def _figures(self) -> Any:
        """TRL's lists of figures, of what is going on: training or evaluation."""
        assert self.model is not None
        return self._metrics["train" if self.model.training else "eval"]
