import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from adapters.library import read_adapter
from base_models.errors import UserError
from rlhf.controllers import MOST_ANSWER
from rlhf.round_price import Price, next_price
from rlhf.train_dpo import PRESETS, Config, check, main


def test_the_price_follows_the_root_of_the_kl_at_most_twofold_and_never_below_its_start():
    assert next_price(1.0, 72, 50, least=0.1) == pytest.approx(1.2)
    assert next_price(1.0, 500, 50, least=0.1) == 2
    assert next_price(1.0, 1, 50, least=0.1) == 0.5
    assert next_price(1.0, -1e-7, 50, least=0.1) == 0.5  # what rounding may make of 0
    assert next_price(0.15, 1, 50, least=0.1) == 0.1


def test_a_policy_that_drifts_as_its_price_lets_it_is_brought_to_the_target():
    """KL = strength / price^2, as where a reward grows with the step and KL with its square: strong rewards and weak ones end at one KL
    without swinging about it, as many rounds after as the price has to double."""
    for strength in (3e-4, 3e-3, 0.03):
        price, kl = 0.001, [strength / 0.001**2]
        for _ in range(6):
            price = next_price(price, kl[-1], 50, least=0.001)
            kl.append(strength / price**2)
        assert all(after < before or after == pytest.approx(50) for before, after in itertools.pairwise(kl))
        assert kl[-1] == pytest.approx(50, rel=0.01)


def test_a_round_takes_up_the_price_of_the_round_before_whatever_was_done_since(tmp_path):
    price = Price(0.1, 50, tmp_path / "price.json", writes=True)
    told = [price.of(number, kl) for number, kl in enumerate((0, 72, 200))]
    assert told == pytest.approx([0.1, 0.12, 0.24])
    assert Price(0.1, 50, tmp_path / "price.json", writes=False).of(2, 200) == pytest.approx(0.24)
    elsewhere = Price(0.1, 50, tmp_path / "a-disk-of-its-own" / "price.json", writes=False)
    assert [elsewhere.of(number, kl) for number, kl in enumerate((0, 72, 200))] == told  # a node without the file
    assert price.of(0, 0) == 0.1
    assert json.loads((tmp_path / "price.json").read_text()) == {"0": 0.1}


def test_the_first_rounds_rise_to_the_target_in_equal_steps_and_are_priced_by_their_own(tmp_path):
    price = Price(0.1, 60, tmp_path / "price.json", writes=True, ramp=3)
    assert [price.target(number) for number in range(5)] == [20, 40, 60, 60, 60]
    told = [price.of(number, kl) for number, kl in enumerate((0, 57.6, 86.4, 60))]
    assert told == pytest.approx([0.1, 0.12, 0.144, 0.144])
    assert Price(0.1, None, tmp_path / "none.json", writes=False, ramp=3).target(0) is None


def test_a_run_that_had_no_target_takes_one_up_at_the_price_that_it_paid(tmp_path):
    path = tmp_path / "price.json"
    moved, still = Price(0.1, 50, path, writes=True), Price(0.1, None, path, writes=True)
    assert [moved.of(number, kl) for number, kl in enumerate((0, 72, 200))] == pytest.approx([0.1, 0.12, 0.24])
    assert still.of(2, 999) == 0.1
    assert json.loads(path.read_text()) == pytest.approx({"0": 0.1, "1": 0.12, "2": 0.1})  # it forgets nothing that it resumed from
    assert still.of(2, 999) == 0.1  # resumed without a target, and it is this that the next round goes on from
    assert Price(0.1, 50, path, writes=True).of(3, 72) == pytest.approx(0.12)


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


def test_a_price_that_answers_within_a_round_lets_it_leap_less_far(tmp_path):
    late, at_once = (main(config(tmp_path / f"{power:g}", rounds=2, kl_power=power))["held_out_kl"] for power in (0.0, 1.0))
    assert 0.5 < at_once < 0.8 * late
    rows = [json.loads(line) for line in (tmp_path / "1" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "dpo/kl_price" in row]
    assert len(steps) > 2
    for row in steps:
        assert row["dpo/kl_price"] == pytest.approx(0.01 * min(max(row["dpo/kl_of_pairs"] / 0.5, 1), MOST_ANSWER), rel=1e-4)


def test_with_a_ramp_the_first_rounds_answer_to_their_part_of_the_target_and_the_last_to_all_of_it(tmp_path):
    main(config(tmp_path, rounds=2, kl_power=1.0, kl_ramp=8))  # at most the rounds there are
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    looks = [row for row in rows if "kl_weight" in row]
    assert looks[1]["kl_weight"] == pytest.approx(next_price(0.01, looks[1]["held_out/kl"], 0.5, 0.01))
    seen = set()
    for row in rows:
        if "dpo/kl_price" in row:
            number = sum(row["step"] > look["step"] for look in looks) - 1
            base, target = looks[number]["kl_weight"], 0.5 * (number + 1) / 2
            assert row["dpo/kl_price"] == pytest.approx(max(base * min(row["dpo/kl_of_pairs"] / target, MOST_ANSWER), 0.01), rel=1e-4)
            seen.add(number)
    assert seen == {0, 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_ramp": 0}, "--kl-ramp 0"),
        ({"kl_ramp": 4, "target_kl": None}, "--kl-ramp 4 with --target-kl None"),
        ({"target_kl": -1.0}, "--target-kl -1"),
        ({"kl_power": -1.0}, "--kl-power -1"),
        ({"kl_power": 1.0, "target_kl": None}, "--kl-power 1 with --target-kl None"),
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
