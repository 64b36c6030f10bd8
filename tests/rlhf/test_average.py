"""The mean of a run's adapters is the mean, is what looks hear and the run leaves, and outlives an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapters.library import read_adapter
from adapters.lora import adapter_tensors, attach_lora, set_adapter_tensors
from base_models.checkpoint import load_training_state
from base_models.errors import UserError
from rlhf.average import Average
from rlhf.ppo_task import toy_task
from rlhf.train_ppo import check, main
from tests.rlhf.ppo_toys import CODES, config


def test_the_mean_is_plain_at_first_and_then_forgets() -> None:
    lm = toy_task(0).lm
    attach_lora(lm, 2, 4.0)
    start, mean, by_hand = adapter_tensors(lm), Average(lm, 0.75), None
    for number in range(1, 9):
        set_adapter_tensors(lm, {name: torch.full_like(tensor, float(number**2)) for name, tensor in start.items()})
        mean.update()
        kept = min(0.75, 1 - 1 / number)
        by_hand = number**2 if by_hand is None else kept * by_hand + (1 - kept) * number**2
        if number == 3:
            assert by_hand == pytest.approx((1 + 4 + 9) / 3)
    assert all(torch.allclose(tensor, torch.full_like(tensor, by_hand)) for tensor in mean.tensors.values())
    with mean.in_place():
        assert all(bool((tensor == mean.tensors[name]).all()) for name, tensor in adapter_tensors(lm).items())
    assert all(bool((tensor == 64).all()) for tensor in adapter_tensors(lm).values())


def test_a_run_leaves_the_mean_of_what_its_rounds_left(tmp_path: Path) -> None:
    how = {**CODES, "average": 0.5, "save_every": 1, "batch_size": 8}
    for steps in (1, 2, 3, 4):  # checkpoints of a run are thinned out: each of these ends where another round left it
        main(config(tmp_path / str(steps), steps=steps, lr_end=1.0, **how))
    rounds = [load_training_state(tmp_path / str(n) / "checkpoints" / f"step_{n:08d}")[1]["adapter"] for n in (1, 2, 3, 4)]
    mean = rounds[0]
    for adapter in rounds[1:]:
        mean = {name: 0.5 * mean[name] + 0.5 * adapter[name] for name in mean}
    left = read_adapter(tmp_path / "4" / "adapter").lora.tensors
    assert all(torch.allclose(left[name], mean[name], atol=1e-6) for name in mean)
    assert not all(torch.allclose(left[name], rounds[-1][name], atol=1e-6) for name in mean)


def test_looks_hear_the_mean_and_an_interruption_changes_nothing(tmp_path: Path) -> None:
    how = {**CODES, "average": 0.8, "batch_size": 8, "look_every": 2, "save_every": 2}
    whole = main(config(tmp_path / "whole", steps=6, **how))
    plain = main(config(tmp_path / "plain", steps=6, **{**how, "average": 0.0}))
    assert whole["heldout_kl"] < plain["heldout_kl"]  # of rounds that go away from the base, the mean stays behind
    assert whole["kl"] < plain["kl"]
    assert whole["clips"] == plain["clips"] == 48  # what its drift was measured on was not learnt from
    main(config(tmp_path / "cut", steps=6, max_minutes=1e-9, **how))
    again = main(config(tmp_path / "cut", steps=6, resume=True, **how))
    one, other = (read_adapter(tmp_path / name / "adapter") for name in ("whole", "cut"))
    assert one.manifest.adapter_sha256 == other.manifest.adapter_sha256
    assert again["kl"] == whole["kl"]
    with pytest.raises(UserError, match="average"):
        main(config(tmp_path / "cut", steps=8, resume=True, **{**how, "average": 0.5}))


def test_a_mean_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for wrong in (1.0, -0.1):
        with pytest.raises(UserError, match=f"--average {wrong:g}"):
            check(config(tmp_path, average=wrong), world=1)
    for wrong, target in ((-1.0, 40.0), (1.0, None)):
        with pytest.raises(UserError, match=f"--kl-power {wrong:g} with --target-kl"):
            check(config(tmp_path, kl_power=wrong, target_kl=target), world=1)
