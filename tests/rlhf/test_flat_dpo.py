"""The losses beside DPO, each against TRL's own or by hand; and pairs that act on marked stretches alone."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.cpo.cpo_trainer import CPOTrainer

from adapters.library import read_adapter
from adapters.lora import adapter_disabled
from base_models.checkpoint import read_json
from base_models.errors import UserError
from rlhf import train_dpo
from rlhf.controllers import AdaptiveKLController
from rlhf.dpo_arguments import kto_arguments, training_arguments
from rlhf.dpo_task import Task, toy_task
from rlhf.flat_dpo import FlatDPOTrainer, PreferenceCollator, marked_codes, preference_rows, reference_logps
from rlhf.flat_kto import BadClip, JudgementCollator, bad_clips, judgement_rows, judgements
from rlhf.flat_policy import PAD, FlatCausalLM, flat_order
from rlhf.losses import ipo_loss, kto_loss, simpo_loss
from rlhf.preferences import Preference, Spans, content_sha256, load_snapshot
from rlhf.rollout import code_logits
from rlhf.train_dpo import PRESETS, Config

K, T = 4, 12
RATE = 25.0


def config(out: Path, **changes: Any) -> Config:
    return dataclasses.replace(Config(**PRESETS["smoke"]), **{"out": out, "precision": "fp32", "kl_clips": 0, **changes})


def metrics(out: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "logps/chosen" in row]


def some(*values: float) -> Tensor:
    return torch.tensor(values)


# -- losses


def test_simpo_is_trls_formula():
    chosen, rejected = some(-310.0, -290.0), some(-320.0, -280.0)
    codes = some(100.0, 100.0)
    oracle = SimpleNamespace(
        alpha=0.0, accelerator=SimpleNamespace(device="cpu"), loss_type="simpo", beta=2.5, simpo_gamma=0.7, label_smoothing=0.0
    )
    theirs, _, _ = CPOTrainer.cpo_loss(oracle, chosen / codes, rejected / codes)
    torch.testing.assert_close(simpo_loss(chosen, rejected, codes, codes, 2.5, 0.7), theirs)


def test_simpo_of_a_tie_leans_to_neither_side():
    codes, tie = some(100.0), some(0.5)
    one = simpo_loss(some(-310.0), some(-320.0), codes, codes, 2.5, 0.7, tie)
    two = simpo_loss(some(-320.0), some(-310.0), codes, codes, 2.5, 0.7, tie)
    torch.testing.assert_close(one, two)
    assert simpo_loss(some(-310.0), some(-310.0), codes, codes, 2.5, 0.7, tie) < one


def test_ipo_stops_asking_at_its_margin_in_nats_a_code():
    codes = some(100.0)
    reached = ipo_loss(some(-300.0), some(-310.0), some(-300.0), some(-300.0), codes, codes, beta=5.0)  # 10 nats over 100 codes
    assert float(reached) == pytest.approx(0.0, abs=1e-9)
    short_clip = ipo_loss(some(-300.0), some(-310.0), some(-300.0), some(-300.0), some(50.0), some(50.0), beta=5.0)
    assert float(short_clip) == pytest.approx(0.01, abs=1e-6)


def test_ipo_of_a_soft_label_has_its_minimum_at_its_share_of_the_margin():
    h = torch.linspace(-2, 2, 401)
    zeros, ones = torch.zeros_like(h), torch.ones_like(h)
    loss = ipo_loss(h, zeros, zeros, zeros, ones, ones, 0.5, torch.full_like(h, 0.75))
    assert float(h[loss.argmin()]) == pytest.approx(0.5, abs=1e-6)


def test_kto_by_hand():
    loss = kto_loss(some(-9.0, -9.0), some(-10.0, -10.0), torch.tensor([True, False]), 0.5, beta=2.0)
    expected = [1 - 1 / (1 + math.exp(-1.0)), 1 - 1 / (1 + math.exp(1.0))]
    torch.testing.assert_close(loss, torch.tensor(expected))


@pytest.mark.parametrize(("loss", "beta", "first"), [("ipo", 5.0, 0.01), ("simpo", 20.0, None), ("kto", 0.1, 0.5)])
def test_each_loss_starts_where_it_must_and_learns_to_tell_chosen_from_rejected(tmp_path, loss, beta, first):
    figures = train_dpo.main(config(tmp_path / "run", loss=loss, beta=beta, steps=20, weight_pairs=False))
    rows = metrics(tmp_path / "run")
    name = "kto/loss" if loss == "kto" else "dpo/loss"
    assert figures["first_loss"] == pytest.approx(0.5 if loss == "kto" else math.log(2), abs=1e-6)
    if first is not None:
        assert rows[0][name] == pytest.approx(first, abs=1e-6)
    assert all(row["loss"] == pytest.approx(row[name], abs=1e-5) for row in rows)
    gap = [row["logps/chosen"] - row["logps/rejected"] for row in rows]
    assert sum(gap[-4:]) / 4 > sum(gap[:4]) / 4 + 1.0
    if loss != "kto":
        assert figures["held_out_accuracy"] == 1.0
    assert read_adapter(tmp_path / "run" / "adapter").manifest.method == loss


def test_a_resumed_kto_run_ends_bitwise_where_the_unbroken_one_does(tmp_path):
    changes: dict[str, Any] = {"loss": "kto", "save_every": 3, "steps": 6}
    train_dpo.main(config(tmp_path / "whole", **changes))
    assert "rounds_averaged" not in read_json(tmp_path / "whole" / "checkpoints" / "step_00000006" / "state.json")  # it has no rounds
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for folder in ("adapter", "checkpoints/step_00000006"):
        shutil.rmtree(tmp_path / "cut" / folder)
    train_dpo.main(config(tmp_path / "cut", resume=True, **changes))
    assert metrics(tmp_path / "cut")[-1]["step"] == 6
    one, two = (read_adapter(tmp_path / name / "adapter").lora.tensors for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


# -- clips one by one


def pair(p: float, weight: float, prompt_id: str = "0") -> Preference:
    task = toy_task(Config())
    return dataclasses.replace(task.pairs[0], p=p, weight=weight, prompt_id=prompt_id)


def test_desirable_and_undesirable_clips_weigh_the_same_and_a_tie_says_nothing():
    bad = np.zeros((K, T), dtype=np.int64)
    found = judgements([pair(1.0, 1.0), pair(0.75, 2.0), pair(0.5, 1.0)], [0, 1, 2], [(3, bad, 4.0)])
    assert [(row, desirable) for row, _, desirable, _ in found] == [(0, True), (0, False), (1, True), (1, False), (3, False)]
    weights = [weight for _, _, _, weight in found]
    assert sum(weights) == pytest.approx(5.0)
    assert weights[0] + weights[2] == pytest.approx(2.5)
    assert weights[4] == pytest.approx(4 * weights[1])


def test_both_bad_votes_are_learnt_from(tmp_path):
    """Clips that nobody compared, all bad: their log-prob falls, which no loss over pairs could do."""
    task = toy_task(Config())
    bad = tuple(BadClip(p.prompt_id, p.prompt, None, p.rejected_codes, 4.0) for p in task.pairs[40:])
    few = dataclasses.replace(task, pairs=task.pairs[:24], bad=bad)
    flat = FlatCausalLM(few.lm, few.table).eval()
    rows = judgement_rows(flat, judgements(few.pairs, [0] * 24, [(0, clip.codes, clip.weight) for clip in bad]), 8, 0)
    assert sum(not row["label"] for row in rows) == 24 - 3 + 24
    assert all(len(row["KL_completion_ids"]) == K * T for row in rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dpo, "toy_task", lambda _: few)
        train_dpo.main(config(tmp_path / "run", loss="kto", steps=20, held_out=0.0))
    told = metrics(tmp_path / "run")
    assert sum(row["logps/rejected"] for row in told[-5:]) < sum(row["logps/rejected"] for row in told[:5]) - 1


@pytest.mark.parametrize("n_pairs", [4, 2])
def test_a_clip_meets_another_ones_codes_for_kl_also_where_it_is_alone_in_the_last_batch(n_pairs):
    """A clip that met itself would be measured against its own reward: its loss would stay 1/2, whatever was learnt."""
    task = toy_task(Config(), n_pairs=n_pairs)
    found = judgements(task.pairs, range(n_pairs), [(9, np.ones((K, T), dtype=np.int64), 1.0)])
    assert len(found) % 4 == 1
    rows = judgement_rows(FlatCausalLM(task.lm, task.table).eval(), found, 4, 0)
    assert all(row["KL_completion_ids"] != row["completion_ids"] for row in rows)


def test_both_bad_votes_of_a_snapshot_become_bad_clips(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((K, T), dtype=np.int16))
    common = {"prompt_id": "p", "prompt": "x", "policy_sha256": "0", "codes_uri": "a.npy"}
    clips = [{**common, "sha256": name} for name in ("a", "b", "c")]
    vote = {"pair_id": "1", "prompt_id": "p", "prompt": "x", "clip_x": "a", "clip_y": "b"}
    votes = [{**vote, "vote_id": str(i), "rater": str(i), "choice": choice} for i, choice in enumerate(("both_bad", "both_bad", "x"))]
    for name, rows in (("votes.jsonl", votes), ("clips.jsonl", clips)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "snapshot.json").write_text(json.dumps({"name": "x", "sha256": content_sha256(tmp_path)}))
    assert [(clip.prompt_id, clip.weight) for clip in bad_clips(load_snapshot(tmp_path))] == [("p", 2.0), ("p", 2.0)]


# -- nothing is cut


def test_a_sequence_of_more_than_1024_ids_stays_whole_in_every_collator(tmp_path):
    task = toy_task(Config(), n_pairs=2, n_prompts=1, n_frames=300)
    flat = FlatCausalLM(task.lm, task.table).eval()
    args = training_arguments(config(tmp_path), 2)
    assert args.max_length is None
    assert kto_arguments(config(tmp_path, loss="kto"), args).max_length is None
    rows = preference_rows(flat, task.pairs, [0, 0], 0.0)
    batch = PreferenceCollator(pad_token_id=PAD, max_length=None)(rows)
    assert batch["input_ids"].shape == (4, 1 + K * 300)
    assert int(batch["completion_mask"].sum()) == 4 * K * 300
    found = judgement_rows(flat, judgements(task.pairs, [0, 0], []), 2, 0)
    assert JudgementCollator(pad_token_id=PAD, max_length=None)(found)["input_ids"].shape[1] == 1 + K * 300
    scored = reference_logps(flat, rows, args, PreferenceCollator(pad_token_id=PAD, max_length=None), 2)
    with torch.no_grad():
        whole = task.lm.logps(torch.as_tensor(task.pairs[0].chosen_codes)[None], task.table.index([0])).sum()
    assert scored[0]["ref_chosen_logps"] == pytest.approx(float(whole), abs=1e-2)


# -- marks


def marked(spans: Spans, n: int = 8) -> Task:
    task = toy_task(Config(), n_pairs=n)
    return dataclasses.replace(task, pairs=[dataclasses.replace(p, p=1.0, rejected_marks=spans) for p in task.pairs])


def test_a_mark_covers_the_frames_that_sound_within_it_in_every_book():
    _, frame = flat_order(K, T)
    mask = torch.tensor(marked_codes(((90, 210),), K, T, RATE)).bool()  # frames 2.25 to 5.25: 2, 3, 4, 5
    assert set(frame[mask].tolist()) == {2, 3, 4, 5}
    assert int(mask.sum()) == 4 * K
    assert not any(marked_codes(((10_000, 11_000),), K, T, RATE))
    assert sum(marked_codes(((100, 101),), K, T, RATE)) == K


def trainer_of(task: Task, out: Path, mask: bool) -> tuple[FlatDPOTrainer, list[dict[str, Any]]]:
    cfg = config(out)
    args = training_arguments(cfg, len(task.pairs))
    flat = FlatCausalLM(task.lm, task.table).eval()
    rows = preference_rows(flat, task.pairs, [task.row_of(p) for p in task.pairs], 0.0, RATE if mask else None)
    rows = reference_logps(flat, rows, args, PreferenceCollator(pad_token_id=PAD, max_length=None), 8)
    return FlatDPOTrainer(flat, args, rows, (), 4, 8.0), rows


def test_the_gradient_reaches_the_marked_region_alone(tmp_path):
    """Of both clips: the logits of a frame outside of the mark get no gradient, in any book; those within do."""
    trainer, rows = trainer_of(marked(((100, 200),)), tmp_path, mask=True)  # frames 2.5 to 5: 2, 3, 4
    heard: list[Tensor] = []

    def listen(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        heard.append(output)

    for head in trainer.lm.decoder.lm_heads:
        head.register_forward_hook(listen)
    batch = trainer.data_collator(rows)
    with torch.enable_grad():
        trainer._compute_loss(trainer.model, batch).backward()
    assert len(heard) == K
    for logits in heard:  # [2 B, T, V], book by book already at its frames
        touched = logits.grad.abs().amax(-1)
        assert not touched[:, [0, 1, *range(5, T)]].any()
        assert (touched[:, 2:5] > 0).all()


def test_a_mark_over_the_whole_clip_is_plain_dpo_and_ties_and_marks_out_of_reach_stay_whole(tmp_path):
    _, plain = trainer_of(marked(()), tmp_path / "a", mask=False)
    _, whole = trainer_of(marked(((0, 10_000),)), tmp_path / "b", mask=True)
    _, beyond = trainer_of(marked(((5_000, 6_000),)), tmp_path / "c", mask=True)
    for rows in (whole, beyond):
        assert [row["ref_rejected_logps"] for row in rows] == [row["ref_rejected_logps"] for row in plain]
        collate = PreferenceCollator(pad_token_id=PAD, max_length=None)
        assert torch.equal(collate(rows)["completion_mask"], collate(plain)["completion_mask"])
    tie = dataclasses.replace(marked(((100, 200),)).pairs[0], p=0.5)
    task = marked(())
    (row,) = preference_rows(FlatCausalLM(task.lm, task.table), [tie], [0], 0.0, RATE)
    assert all(row["rejected_mask"])


def test_marks_change_what_is_learnt_and_the_first_loss_is_still_log_2(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dpo, "toy_task", lambda _: marked(((100, 200),), n=32))
        train_dpo.main(config(tmp_path / "mask", steps=10, marks="mask"))
    rows = metrics(tmp_path / "mask")
    assert rows[0]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["logps/rejected"] == pytest.approx(-3 * K * math.log(32), rel=0.1)  # three frames of codes, not twelve
    assert rows[-1]["dpo/loss"] < math.log(2) - 0.005


# -- the anchor


def test_the_anchor_is_the_kl_of_whole_distributions_zero_at_first_and_draws_a_moved_policy_back(tmp_path):
    task = toy_task(Config(), n_pairs=8)
    task = dataclasses.replace(task, pairs=[dataclasses.replace(p, weight=0.0) for p in task.pairs])  # the pairs themselves say nothing
    trainer, rows = trainer_of(task, tmp_path, mask=False)
    trainer.kl_price = AdaptiveKLController(0.5)

    def loss() -> Tensor:
        with torch.enable_grad():
            return trainer._compute_loss(trainer.model, trainer.data_collator(rows))

    assert loss().item() == 0.0  # the same policy twice, bit by bit
    adapter = [p for p in trainer.lm.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    codes = torch.stack([torch.as_tensor(c) for side in ("chosen_codes", "rejected_codes") for c in (getattr(p, side) for p in task.pairs)])
    cond = task.table.index([task.row_of(p) for p in task.pairs] * 2)
    moved = code_logits(trainer.lm, codes.long(), cond)[0].log_softmax(-1)
    with adapter_disabled(trainer.lm):
        base = code_logits(trainer.lm, codes.long(), cond)[0].log_softmax(-1)
    kl = (moved.exp() * (moved - base)).sum((1, 2, 3)).mean()
    assert kl > 0.5
    assert loss().item() == pytest.approx(0.5 * kl.item(), rel=1e-4)
    trainer.kl_price = AdaptiveKLController(0.5, target_kl=kl.item() / 2, least=0.5, power=1.0)
    assert loss().item() == pytest.approx(2 * 0.5 * kl.item(), rel=1e-4)  # twice the target, and so twice the price
    trainer.kl_price = AdaptiveKLController(0.5, target_kl=2 * kl.item(), least=0.5, power=1.0)
    assert loss().item() == pytest.approx(0.5 * kl.item(), rel=1e-4)  # never less than given
    optimiser = torch.optim.SGD(adapter, lr=0.5)
    for _ in range(5):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    assert loss().item() < 0.8 * 0.5 * kl.item()


# -- refusals


def test_kto_refuses_what_only_pairs_can_do(tmp_path):
    with pytest.raises(UserError, match="a loss over pairs"):
        train_dpo.main(config(tmp_path, loss="kto", marks="mask"))
    with pytest.raises(UserError, match="--loss kto with --reward"):
        train_dpo.main(Config(out=tmp_path, loss="kto", reward=tmp_path, prompts=tmp_path))
    with pytest.raises(UserError, match="--loss kto with --batch-size 1; expected 2 or more"):
        train_dpo.main(config(tmp_path, loss="kto", batch_size=1))
