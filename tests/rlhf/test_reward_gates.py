import numpy as np
import pytest
import torch

from base_models.checkpoint import write_json
from rlhf import reward_gates
from rlhf.metrics import calibration_error_by_chance, pair_calibration_error
from rlhf.reward_committee import Committee
from rlhf.reward_gates import Gate, GateError, demand, doubt, gates, overfit, share_of_ceiling
from rlhf.reward_heads import Head, Pairs

GOOD = {
    "accuracy": 0.76, "ci": [0.74, 0.78], "ceiling": 0.8, "n_pairs": 600, "ece": 0.02, "overfit": 1.0,
    "above_baseline": {"value": 0.1, "ci": [0.05, 0.15]},
}  # fmt: skip


def verdicts(**changes):
    return [gate.passed for gate in gates(GOOD | changes)]


def test_a_good_model_passes_every_gate():
    assert verdicts() == [True] * 5
    demand(gates(GOOD))


@pytest.mark.parametrize(
    ("changes", "which"),
    [
        ({"ci": [0.49, 0.6]}, 0),
        ({"accuracy": 0.73}, 1),
        ({"ceiling": None}, 1),
        ({"ceiling": 0.5}, 1),
        ({"ece": 0.06}, 2),
        ({"above_baseline": {"value": 0.1, "ci": [-0.01, 0.2]}}, 3),
        ({"overfit": 0.9}, 4),
    ],
)
def test_each_gate_fails_by_its_own_number_alone(changes, which):
    assert [index for index, passed in enumerate(verdicts(**changes)) if not passed] == [which]
    with pytest.raises(GateError) as failed:
        demand(gates(GOOD | changes))
    assert failed.value.exit_code == 1
    assert gates(GOOD | changes)[which].name in str(failed.value)


def test_few_votes_are_not_asked_to_be_better_calibrated_than_chance_lets_them():
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 1, 120)

    def passes(scale: float, n: int) -> bool:
        margin, votes = scale * margins[:n], [1] * n
        label = (rng.random(n) < 1 / (1 + np.exp(-margins[:n]))).astype(float)
        by_chance = calibration_error_by_chance(margin, votes, n_draws=100)
        return bool(verdicts(ece=pair_calibration_error(margin, label), ece_by_chance=by_chance)[2])

    assert sum(passes(1.0, 120) for _ in range(40)) >= 34  # an honest model
    assert sum(passes(6.0, 120) for _ in range(40)) <= 4  # one that is far too sure
    assert calibration_error_by_chance(np.tile(margins, 20), [2] * 2400) < 0.05
    assert verdicts(ece=0.06, ece_by_chance=0.04)[2] is False


def test_the_share_of_the_ceiling_is_not_asked_of_few_pairs():
    assert verdicts(accuracy=0.6, ci=[0.55, 0.65], n_pairs=499)[1] is None
    demand(gates(GOOD | {"n_pairs": 499, "ceiling": None}))
    assert share_of_ceiling({"accuracy": 0.65, "ceiling": 0.8}) == pytest.approx(0.5)


def test_lines_say_verdict_and_number():
    lines = [gate.line for gate in gates(GOOD | {"ece": 0.061, "ceiling": None})]
    assert lines[2].startswith("FAIL")
    assert "0.061" in lines[2]
    assert "unknown" in lines[1]
    assert reward_gates.as_json(gates(GOOD))[0]["passed"] is True


@pytest.mark.parametrize(
    ("changes", "which", "value", "asked"),
    [
        ({"ece": 0.05004}, 2, "0.05004", "at most 0.05000"),
        ({"ece": 0.08741, "ece_by_chance": 0.08736}, 2, "0.08741", "at most 0.08736"),
        ({"ci": [0.49996, 0.6]}, 0, "0.49996", "above .5"),
        ({"ci": [0.5, 0.6]}, 0, "0.500", "above .5"),
        ({"accuracy": 0.73998, "ceiling": 0.8}, 1, "0.7999", "0.8 from 500 pairs on; here 600"),
        ({"above_baseline": {"value": 0.1, "ci": [-0.00004, 0.2]}}, 3, "-0.00004", "above 0"),
        ({"overfit": 0.9496}, 4, "0.9496", "0.95 or more"),
    ],
)
def test_a_gate_that_fails_tells_a_number_that_is_not_its_limit(changes, which, value, asked):
    """Unless they are the same, which is not above."""
    gate = gates(GOOD | changes)[which]
    assert gate.line == f"FAIL  {gate.name}: {value} (asked: {asked})"
    assert reward_gates.missed([gate]) == (f"{gate.name} {value}", asked)
    assert Gate(**reward_gates.as_json([gate])[0]) == gate


def test_gates_of_figures_that_an_earlier_version_wrote_are_read():
    assert Gate(name="calibration error", value=0.06, asked="at most 0.050", passed=False).line.startswith("FAIL  ")


def test_a_head_that_sees_nothing_does_not_overfit():
    generator = torch.Generator().manual_seed(0)
    first = torch.arange(0, 80, 2)
    pairs = Pairs(first, first + 1, torch.ones(40), torch.ones(40), torch.zeros(40, dtype=torch.long))
    head = Head("linear", ("all",), 1.0)
    alone = Committee((head,))
    assert overfit(alone, {head: torch.randn(80, 30, generator=generator)}, pairs, seed=0) == 1
    assert overfit(alone, {head: torch.ones(80, 30)}, pairs, seed=0) == 0.5


def test_a_reward_no_better_than_chance_is_doubted_and_another_is_not(tmp_path):
    assert "nobody can tell" in (doubt(tmp_path) or "")
    write_json(tmp_path / "figures.json", {"ci": [0.47, 0.52]})
    assert "[0.470, 0.520]" in (doubt(tmp_path) or "")
    write_json(tmp_path / "figures.json", {"ci": [0.51, 0.55]})
    assert doubt(tmp_path) is None
    write_json(tmp_path / "figures.json", {"ci": [0.51, 0.55], "evidence": 3.2})
    assert doubt(tmp_path) is None
    write_json(tmp_path / "figures.json", {"ci": [0.51, 0.55], "evidence": 1.3})
    assert "1.3 standard errors" in (doubt(tmp_path) or "")


def test_figures_of_the_model_that_stood_there_before_vouch_for_nothing(tmp_path):
    """A training that is killed between the model and its figures leaves the new one beside the old."""
    write_json(tmp_path / "figures.json", {"ci": [0.61, 0.65], "evidence": 5.0, "reward_sha256": "old"})
    write_json(tmp_path / "manifest.json", {"kind": "reward", "reward_sha256": "new"})
    assert "figures.json of another reward model" in (doubt(tmp_path) or "")
    write_json(tmp_path / "manifest.json", {"kind": "reward", "reward_sha256": "old"})
    assert doubt(tmp_path) is None
