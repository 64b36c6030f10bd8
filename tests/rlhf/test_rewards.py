"""Several judges: what a weight means, what NaN means, and that a lone judge is left as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from base_models.errors import UserError
from rlhf.judges import Score
from rlhf.rewards import Part, Reward, check_hold, held_parts, parse_weights, spread_within, weighted

NAN = float("nan")
CODES = torch.zeros(4, 1, 2, dtype=torch.int64)
PROMPTS = ["a", "b", "c", "d"]


def says(*marks: float) -> Score:
    return lambda codes, prompts: torch.tensor(marks)


def measured(reward: Reward) -> tuple[Reward, Tensor]:
    marks = reward.marks(CODES, PROMPTS)
    reward.measure(marks, PROMPTS)
    return reward, marks


def test_a_weight_is_worth_one_spread_of_the_base_whatever_the_parts_units() -> None:
    small, large = says(0.1, 0.2, 0.3, 0.4), says(4000.0, 3000.0, 2000.0, 1000.0)
    reward, marks = measured(Reward({"small": Part(small, 1.0), "large": Part(large, 1.0)}))
    judged = reward.judge(marks, PROMPTS)
    torch.testing.assert_close(judged.total, torch.zeros(4), atol=1e-5, rtol=0)  # mirror images of equal weight
    for z in judged.parts.values():
        assert float(z.mean()) == pytest.approx(0, abs=1e-6)
        assert float(z.std(correction=0)) == pytest.approx(1)


def test_a_spread_is_that_of_clips_of_one_prompt() -> None:
    """What prompts differ by, whatever is played, must not make a part's say smaller."""
    marks = torch.tensor([0.0, 2, 100, 102, 7], dtype=torch.float64)
    assert spread_within(marks, ["a", "a", "b", "b", "c"]) == pytest.approx(2**0.5)  # the square of two clips' half distance, unbiased
    assert spread_within(marks[:2], [5, 5]) == pytest.approx(2**0.5)
    assert spread_within(marks, "abcde") == pytest.approx(float(marks.std(correction=0)))  # no prompt has two
    assert spread_within(torch.tensor([1.0, 1, 3, 3]), "aabb") == pytest.approx(1)  # nor do clips of one prompt differ
    reward = Reward({"human": Part(says(0, 2, 100, 102)), "tempo": Part(says(NAN, 1, 0, 1), asked=True)})
    reward.measure(reward.marks(CODES, PROMPTS), ["a", "a", "b", "b"])
    assert reward.scales["human"] == (51, pytest.approx(2**0.5))
    assert reward.scales["tempo"] == (pytest.approx(2 / 3), pytest.approx(0.5**0.5))  # the lone clip of its prompt says nothing of it


def test_a_spread_within_prompts_is_found_in_random_marks() -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = [f"p{i // 3}" for i in range(3000)]
    offsets = 9 * torch.randn(1000, generator=generator).repeat_interleave(3)
    assert spread_within(offsets + 0.5 * torch.randn(3000, generator=generator), prompts) == pytest.approx(0.5, rel=0.05)


def test_scales_stand_still_once_measured() -> None:
    reward, marks = measured(Reward({"a": Part(says(0, 1, 2, 3)), "b": Part(says(3, 1, 0, 1), 0.5)}))
    better = reward.judge(marks + 10, PROMPTS).total - reward.judge(marks, PROMPTS).total
    torch.testing.assert_close(better, torch.full((4,), 10 / 1.25**0.5 + 0.5 * 10 / 1.1875**0.5))


def test_a_part_of_weight_zero_is_judged_and_never_counted() -> None:
    parts = {"a": Part(says(0, 1, 2, 3)), "b": Part(says(3, 1, 0, 1))}
    without, _ = measured(Reward(parts))
    reward, marks = measured(Reward({**parts, "watched": Part(says(9, NAN, 7, 5), 0.0)}))
    judged = reward.judge(marks, PROMPTS)
    assert "watched" in judged.parts
    assert torch.equal(judged.total, without.judge(without.marks(CODES, PROMPTS), PROMPTS).total)
    assert reward.figures(marks)["reward_watched"] == 7.0


def test_a_part_that_alone_has_a_weight_is_taken_as_it_is() -> None:
    reward, marks = measured(Reward({"a": Part(says(5, 6, 7, NAN), 2.0), "watched": Part(says(1, 2, 3, 4), 0.0)}))
    torch.testing.assert_close(reward.judge(marks, PROMPTS).total, torch.tensor([10.0, 12, 14, NAN]), equal_nan=True)


def test_not_asked_counts_as_the_bases_mean_and_no_opinion_leaves_the_clip_out() -> None:
    human, tempo = Part(says(0, 1, 2, NAN)), Part(says(NAN, 1, 3, 2), asked=True)
    reward, marks = measured(Reward({"human": human, "tempo": tempo}))
    total = reward.judge(marks, PROMPTS).total
    assert float(total[0]) == pytest.approx(-1 / (2 / 3) ** 0.5)  # the listeners' part alone
    assert torch.isfinite(total).tolist() == [True, True, True, False]
    assert reward.figures(marks)["reward_tempo_not_asked"] == 0.25


def test_an_asked_part_that_breaks_to_infinity_is_not_taken_for_not_asked() -> None:
    reward, marks = measured(Reward({"human": Part(says(0, 1, 2, 3)), "tempo": Part(says(float("inf"), 1, 3, 2), asked=True)}))
    assert torch.isfinite(reward.judge(marks, PROMPTS).total).tolist() == [False, True, True, True]


def test_a_part_that_never_differs_on_the_base_keeps_its_unit() -> None:
    reward, marks = measured(Reward({"a": Part(says(0, 1, 2, 3)), "never": Part(says(0, 0, 0, 0))}))
    later = marks.clone()
    later[2, 1] = 1.0
    assert float((reward.judge(later, PROMPTS).total - reward.judge(marks, PROMPTS).total)[2]) == 1.0


def test_scales_survive_a_checkpoint_and_other_weights_are_refused() -> None:
    reward, marks = measured(Reward({"a": Part(says(0, 1, 2, 3)), "b": Part(says(3, 1, 0, 1))}))
    again = Reward(reward.parts)
    again.load_state_dict(reward.state_dict())
    assert torch.equal(again.judge(marks, PROMPTS).total, reward.judge(marks, PROMPTS).total)
    with pytest.raises(UserError, match="the same parts and weights"):
        Reward({**reward.parts, "b": Part(says(3, 1, 0, 1), 0.9)}).load_state_dict(reward.state_dict())


def test_weights_are_read_from_the_command_line() -> None:
    assert parse_weights("human=1.0, similarity=.3,key=0") == {"human": 1.0, "similarity": 0.3, "key": 0.0}


@pytest.mark.parametrize("text", ["", "human", "human=", "=1", "human=x", "human=nan", "human=1,human=2", "human=0"])
def test_weights_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="weights"):
        parse_weights(text)


def test_an_unknown_part_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(UserError, match="tempo"):
        weighted({"human": 1.0, "loudness": 1.0}, says(1, 2, 3, 4), {"tempo": says(1, 2, 3, 4)})


def test_without_a_listener_the_checks_are_the_whole_reward() -> None:
    reward = weighted({"human": 0.0, "tempo": 1.0}, None, {"tempo": says(1, 2, 3, 4)})
    assert reward.names == reward.trained == reward.every_round == ("tempo",)
    with pytest.raises(UserError, match="human"):
        weighted({"human": 1.0, "tempo": 1.0}, None, {"tempo": says(1, 2, 3, 4)})


def test_a_judge_that_is_watched_can_have_no_weight_and_counts_for_nothing() -> None:
    reward = weighted({"human": 1.0}, says(0, 1, 2, 3), {}, watched=says(9, 7, NAN, 5))
    marks = reward.marks(CODES, PROMPTS, everything=True)
    assert reward.judge(marks, PROMPTS).total.tolist() == [0, 1, 2, 3]
    assert reward.figures(marks)["reward_watched"] == 7.0
    with pytest.raises(UserError, match="watched"):
        weighted({"human": 1.0, "watched": 0.0}, says(0, 1, 2, 3), {}, watched=says(1, 2, 3, 4))


def test_a_judge_that_loses_clips_is_caught() -> None:
    with pytest.raises(ValueError, match="for 4 clips"):
        Reward({"a": Part(says(1, 2))}).marks(CODES, PROMPTS)


def test_parts_that_no_weight_names_are_judged_only_when_everything_is_asked_for() -> None:
    reward = weighted({"human": 1.0}, says(0, 1, 2, 3), {"tempo": says(1, 1, 0, 0)})
    in_rounds, on_looks = reward.marks(CODES, PROMPTS), reward.marks(CODES, PROMPTS, everything=True)
    assert torch.isnan(in_rounds[:, 1]).all()
    assert on_looks[:, 1].tolist() == [1, 1, 0, 0]
    assert "reward_tempo" in reward.figures(on_looks)
    assert "reward_tempo" not in reward.figures(in_rounds)
    reward.measure(in_rounds, PROMPTS)
    reward.measure(on_looks, PROMPTS)
    reward.measure(on_looks + 100, PROMPTS)
    assert reward.scales == {"human": (1.5, pytest.approx(1.25**0.5)), "tempo": (0.5, 0.5)}


def test_a_spread_that_votes_did_not_support_is_not_blown_up_to_one() -> None:
    """A calibrated reward of shuffled votes differs by thousandths of a logit; beside another part it must not get a full say."""
    nearly_nothing, real = says(0.001, -0.001, 0.002, -0.002), says(1, 2, 3, 4)
    weights = {"human": 1.0, "tempo": 0.5}
    reward, marks = measured(weighted(weights, nearly_nothing, {"tempo": real}, least=0.25))
    human = reward.judge(marks, PROMPTS).parts["human"]
    assert float(human.abs().max()) < 0.01
    full, _ = measured(weighted(weights, nearly_nothing, {"tempo": real}))
    assert float(full.judge(marks, PROMPTS).parts["human"].abs().max()) > 1
    assert reward.worth(PROMPTS)["human"] == pytest.approx(1 / 0.25)
    enough, marks = measured(weighted(weights, real, {"tempo": real}, least=0.25))
    assert float(enough.judge(marks, PROMPTS).parts["human"].std(correction=0)) == pytest.approx(1)


def test_the_least_spread_of_a_total_is_a_lone_parts_own_or_half_of_what_the_parts_would_make() -> None:
    nothing = says(0, 0, 0, 0)
    assert weighted({"human": -2.0}, nothing, {}, least=0.25).least == 0.5
    assert weighted({"human": 0.6, "tempo": 0.8}, nothing, {"tempo": nothing}, least=0.25).least == pytest.approx(0.5)
    assert weighted({"tempo": 1.0}, None, {"tempo": nothing}).least == 0


def test_a_held_part_weighs_more_while_it_is_worse_than_the_bases_and_no_less_than_at_first_while_it_is_better() -> None:
    reward, marks = measured(Reward({"human": Part(says(0, 1, 2, 3)), "fit": Part(says(3, 1, 0, 1), 0.5, asked=True)}))
    reward.hold(["fit"], marks, PROMPTS)
    assert reward.now["fit"] == pytest.approx(0.5)  # the base itself is at its own level
    spread = reward.scales["fit"][1]
    reward.hold(["fit"], marks - spread, PROMPTS)
    assert reward.now == {"human": 1.0, "fit": pytest.approx(1.5)}
    assert reward.figures(marks)["reward_fit_weight"] == reward.now["fit"]
    assert reward.worth(PROMPTS)["fit"] == pytest.approx(1.5 / spread)
    for _ in range(100):
        reward.hold(["fit"], marks + spread, PROMPTS)
    assert reward.now["fit"] == 0.5  # and never less than it began with
    for _ in range(100):
        reward.hold(["fit"], torch.where(torch.tensor([False, True]), NAN, marks), PROMPTS)
    assert reward.now["fit"] == 0.5  # prompts that ask nothing move nothing


def test_with_slack_a_part_has_to_miss_its_level_by_so_many_standard_errors_before_its_weight_rises() -> None:
    reward, marks = measured(Reward({"human": Part(says(0, 1, 2, 3)), "fit": Part(says(3, 1, 0, 1), 0.5, asked=True)}))
    spread = reward.scales["fit"][1]
    for missed, weight in ((0.4, 0.5), (0.6, 0.5 + 0.3 * 0.1), (1.5, 0.5 + 0.3 * 1.0)):  # four clips: a standard error is half a spread
        reward.begin(["fit"])
        reward.hold(["fit"], marks - missed * spread, PROMPTS, rate=0.3, slack=1.0)
        assert reward.now["fit"] == pytest.approx(weight)
    reward.hold(["fit"], marks, PROMPTS, rate=0.3, slack=1.0)
    assert reward.now["fit"] == pytest.approx(0.5 + 0.3 * 0.5)  # at the base's level it falls again
    without = torch.where(torch.tensor([False, True]), torch.tensor([NAN, NAN, 0.0, 1.0])[:, None], marks)
    reward.begin(["fit"])
    reward.hold(["fit"], without, PROMPTS, rate=0.3, slack=1.0)  # two clips tell less than four
    missed = (float(marks[:, 1].mean()) - 0.5) / spread
    assert reward.now["fit"] == pytest.approx(max(0.5 + 0.3 * (missed - 1 / 2**0.5), 0.5))


def test_each_kind_of_prompt_is_held_by_its_own_clips_at_its_own_level() -> None:
    """A genre that is lost must not be made up for by another that is gained."""
    words = ["calm ambient", "dark ambient", "happy folk", "sad folk", "slow jazz", "music"]
    fit = says(-1.0, -3.0, -5.0, -7.0, -6.0, NAN)  # folk is harder to play
    reward = weighted({"human": 1.0, "genre": 0.5}, says(0, 1, 2, 3, 4, 5), {"genre": fit})
    codes = torch.zeros(6, 1, 2, dtype=torch.int64)
    marks = reward.marks(codes, words)
    reward.measure(marks, words)
    assert reward.scales["genre/ambient"][0] == -2
    assert reward.scales["genre/folk"][0] == -6
    spread = reward.scales["genre"][1]
    looked = words[:4]  # no jazz among the prompts of a look
    moved = marks[:4].clone()
    moved[:, 1] += torch.tensor([-1.0, -1, 1, 1]) * spread / 2
    reward.hold(["genre"], moved, looked)
    pooled = 0.5 + (float(marks[:5, 1].mean()) - float(moved[:, 1].mean())) / spread  # of these prompts, against all
    assert reward.held(["genre"]) == {"genre": pytest.approx(max(pooled, 0.5)), "genre/ambient": pytest.approx(1.0), "genre/folk": 0.5}
    told = reward.weight("genre", words)
    assert isinstance(told, Tensor)
    assert told.tolist() == pytest.approx([1.0, 1.0, 0.5, 0.5, reward.now["genre"], reward.now["genre"]])
    worth = reward.worth(words)["genre"]
    assert isinstance(worth, Tensor)
    assert torch.allclose(worth, told / spread)
    z = reward.judge(marks, words).parts
    by_hand = z["human"] + told * torch.where(torch.isnan(z["genre"]), 0.0, z["genre"])
    assert torch.allclose(reward.judge(marks, words).total, by_hand)
    assert reward.figures(marks)["reward_genre_ambient_weight"] == pytest.approx(1.0)
    again = weighted({"human": 1.0, "genre": 0.5}, says(0, 1, 2, 3, 4, 5), {"genre": fit})
    again.load_state_dict(reward.state_dict())
    assert torch.equal(again.judge(marks, words).total, reward.judge(marks, words).total)
    again.begin(["genre"])
    assert again.held(["genre"]) == {"genre": 0.5}
    again.begin(["genre"], reward.held(["genre"]))
    assert again.now == reward.now


def test_aspects_that_votes_hardly_support_are_not_blown_up_either() -> None:
    faint = says(0.001, 0.0, -0.001, 0.0)
    reward = weighted(
        {"human": 1.0, "musicality": 0.5, "tempo": 0.5}, faint, {"musicality": faint, "tempo": faint}, 0.25, voted=("musicality",)
    )
    reward, marks = measured(reward)
    z = reward.judge(marks, PROMPTS).parts
    assert float(z["musicality"].abs().max()) == float(z["human"].abs().max()) == pytest.approx(0.001 / 0.25)
    assert float(z["tempo"].abs().max()) > 1


def test_looks_are_judged_by_the_weights_of_the_start_and_held_ones_are_taken_up_again() -> None:
    parts = {"human": Part(says(0, 1, 2, 3)), "fit": Part(says(3, 1, 0, 1), 0.5, asked=True)}
    reward, marks = measured(Reward(parts))
    before = reward.judge(marks, PROMPTS).total
    reward.hold(["fit"], marks - 5, PROMPTS)
    assert torch.equal(reward.judge(marks, PROMPTS, stated=True).total, before)
    assert not torch.equal(reward.judge(marks, PROMPTS).total, before)
    again = Reward(parts)
    again.load_state_dict(reward.state_dict())
    assert torch.equal(again.judge(marks, PROMPTS).total, reward.judge(marks, PROMPTS).total)


@pytest.mark.parametrize("text", ["tempo", "similarity,tempo", "human,similarity"])
def test_holding_what_has_no_weight_or_all_there_is_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--hold"):
        held_parts(text, {"human": 1.0, "similarity": 0.3, "tempo": 0.0})
    assert held_parts(" similarity ", {"human": 1.0, "similarity": 0.3}) == ("similarity",)
    assert held_parts("", {"human": 1.0}) == ()


@pytest.mark.parametrize(
    ("rate", "slack", "said"), [(-0.5, 1.0, "--hold-rate -0.5"), (0.5, -1.0, "--hold-slack -1"), (NAN, 0.0, "--hold-rate nan")]
)
def test_held_weights_that_would_move_the_wrong_way_are_refused(rate: float, slack: float, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_hold("similarity", {"human": 1.0, "similarity": 0.3}, rate, slack)
    check_hold("similarity", {"human": 1.0, "similarity": 0.3}, 0.0, 0.0)
