import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from adapters.library import read_adapter
from base_models.errors import UserError
from rlhf.round_price import Price, next_price
from rlhf.train_dpo import PRESETS, Config, check, main


def test_the_price_follows_the_kl_at_most_twofold_and_never_below_its_start():
    assert next_price(1.0, 60, 50, least=0.1) == pytest.approx(1.2)
    assert next_price(1.0, 500, 50, least=0.1) == 2
    assert next_price(1.0, 1, 50, least=0.1) == 0.5
    assert next_price(0.15, 1, 50, least=0.1) == 0.1


def test_a_policy_that_drifts_as_its_price_lets_it_is_brought_to_the_target():
    """KL = strength / price^.7: strong rewards and weak ones end at one KL."""
    for strength in (3.0, 30.0, 300.0):
        price = 0.001
        for _ in range(30):
            price = next_price(price, strength * price**-0.7, 50, least=0.001)
        assert strength * price**-0.7 == pytest.approx(50, rel=0.01)


def test_a_round_takes_up_the_price_of_the_round_before_whatever_was_done_since(tmp_path):
    price = Price(0.1, 50, tmp_path / "price.json", writes=True)
    told = [price.of(number, kl) for number, kl in enumerate((0, 75, 100))]
    assert told == pytest.approx([0.1, 0.15, 0.3])
    assert Price(0.1, 50, tmp_path / "price.json", writes=False).of(2, 100) == pytest.approx(0.3)
    elsewhere = Price(0.1, 50, tmp_path / "a-disk-of-its-own" / "price.json", writes=False)
    assert [elsewhere.of(number, kl) for number, kl in enumerate((0, 75, 100))] == told  # a node without the file
    assert price.of(0, 0) == 0.1
    assert json.loads((tmp_path / "price.json").read_text()) == {"0": 0.1}


def test_a_run_that_had_no_target_takes_one_up_at_the_price_that_it_paid(tmp_path):
    path = tmp_path / "price.json"
    moved, still = Price(0.1, 50, path, writes=True), Price(0.1, None, path, writes=True)
    assert [moved.of(number, kl) for number, kl in enumerate((0, 75, 100))] == pytest.approx([0.1, 0.15, 0.3])
    assert still.of(2, 999) == 0.1
    assert json.loads(path.read_text()) == pytest.approx({"0": 0.1, "1": 0.15, "2": 0.1})  # it forgets nothing that it resumed from
    assert still.of(2, 999) == 0.1  # resumed without a target, and it is this that the next round goes on from
    assert Price(0.1, 50, path, writes=True).of(3, 75) == pytest.approx(0.15)


def test_a_run_that_has_lost_its_file_does_not_resume_at_another_price(tmp_path):
    Price(0.1, 50, tmp_path / "price.json", writes=True).of(0, 0)
    with pytest.raises(UserError, match=r"round 3 and .*price.json without the one before; expected the value of round 2"):
        Price(0.1, 50, tmp_path / "price.json", writes=True).of(3, 60)


def config(out, **changes):
    return dataclasses.replace(Config(**PRESETS["smoke_reward"]), out=out, precision="fp32", kl_weight=0.01, target_kl=0.5, **changes)


def test_a_run_is_brought_back_towards_its_target_and_resumes_bitwise_at_the_price_it_had(tmp_path):
    kept = main(config(tmp_path / "whole", rounds=5, save_every=1))
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    told = [row for row in rows if "kl_weight" in row]
    prices = [row["kl_weight"] for row in told]
    assert prices[0] == 0.01
    for before, row in zip(prices, told[1:]):
        assert row["kl_weight"] == pytest.approx(next_price(before, row["held_out/kl"], 0.5, 0.01))
    assert prices[-1] > 0.02  # this toy leaps far beyond half a nat
    free = main(dataclasses.replace(config(tmp_path / "free", rounds=5), target_kl=None))
    assert kept["held_out_kl"] < 0.5 * free["held_out_kl"]
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "adapter")
    shutil.rmtree(sorted((tmp_path / "cut" / "checkpoints").iterdir())[-1])
    main(config(tmp_path / "cut", rounds=5, save_every=1, resume=True))
    one, two = (read_adapter(tmp_path / name / "adapter").lora.tensors for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_kl": -1.0}, "--target-kl -1"),
        ({"average": 1.0}, "--average 1"),
        ({"average": 0.5, "toy": False, "toy_reward": False, "target_kl": None}, "--average 0.5 without --reward"),
        ({"kl_budget": 0.5}, "a target below the budget"),
        ({"kl_weight": 0.0}, "with --kl-weight 0.0"),
        ({"toy_reward": False}, "rounds of own clips"),
        ({"toy": False}, "--toy-reward without --toy"),
    ],
)
def test_a_target_that_nothing_can_keep_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        check(dataclasses.replace(config(Path(tmp_path)), **changes))
