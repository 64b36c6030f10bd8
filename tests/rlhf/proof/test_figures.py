import dataclasses
import json

import numpy as np
import pytest

from base_models.checkpoint import write_json
from rlhf.proof import page, plots
from rlhf.proof.cells import Earlier
from rlhf.proof.figures import Pairs, copies, fit, lost_after_the_best, pooled, read_pairs, slope_within, tell, won
from rlhf.proof.plan import Outcome


def test_pairs_are_joined_by_clip_and_never_across_prompts(tmp_path):
    clips = [
        {"system": system, "file": f"{i:06d}_0.wav", "prompt_id": f"p{i}", "gold": i + (system == "ppo")}
        for system in ("ppo", "base")
        for i in (2, 0, 1)
    ]
    (tmp_path / "gold.json").write_text(json.dumps({"clips": clips}))
    pairs = read_pairs(tmp_path / "gold.json", "ppo")
    assert (pairs.gold - pairs.base).tolist() == [1, 1, 1]
    assert pairs.prompts == ["p0", "p1", "p2"]
    (tmp_path / "gold.json").write_text(json.dumps({"clips": clips[1:]}))
    with pytest.raises(ValueError, match="different prompts"):
        read_pairs(tmp_path / "gold.json", "ppo")


def test_a_system_that_plays_what_the_base_plays_wins_one_half_of_nothing():
    same = np.arange(6.0)
    told = won(Pairs(same, same, list("aabbcc")))
    assert (told["win_rate"], told["decided"], told["ties"]) == (0.5, 0, 6)


def test_ties_are_left_out_of_the_win_rate():
    base = np.zeros(8)
    told = won(Pairs(np.array([1, 1, 1, -1, 0, 0, 0, 0.0]), base, list("abcdefgh")))
    assert (told["win_rate"], told["decided"], told["ties"]) == (0.75, 4, 4)


def test_pooling_keeps_the_prompts_of_two_seeds_apart():
    one = Pairs(np.ones(4), np.zeros(4), list("aabb"))
    together = pooled([one, one])
    assert len(set(together.prompts)) == 4
    assert won(together)["pairs"] == 8


def test_prompt_fit_is_told_as_a_change_where_both_were_measured(tmp_path):
    for name, values in (("own", [1.0, None, 0.0, 1.0]), ("base", [0.0, 1.0, 0.0, 1.0])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "clips.json").write_text(json.dumps({"prompt_id": list("aabb"), "tempo": values}))
    told = fit(tmp_path / "own", tmp_path / "base")
    assert set(told) == {"tempo"}
    assert told["tempo"]["n"] == 3
    assert told["tempo"]["change"] == pytest.approx(1 / 3)


def test_copies_are_counted_beside_the_bases_clips_of_the_same_prompts(tmp_path):
    for name, values in (("own", [0.9, 0.1, 0.6, 0.5]), ("base", [0.9, 0.1, 0.1, 0.1])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "clips.json").write_text(json.dumps({"prompt_id": list("aabb"), "nearest_training": values}))
    told = copies(tmp_path / "own", tmp_path / "base")["nearest_training"]
    assert (told["value"], told["base"], told["change"]) == (0.5, 0.25, 0.25)
    assert told["ci"] == [0.0, 0.5]


def test_a_replication_is_told_with_those_of_its_unseen_cells_that_are_done(tmp_path):
    cells = {name: Earlier(name) for name in ("play", "base", "gold", "by-s4", "by-s5")}
    clips = [{"system": system, "file": f"{i}.wav", "prompt_id": f"p{i}", "gold": i % 2} for system in ("ppo", "base") for i in range(4)]
    near = {"prompt_id": [f"p{i}" for i in range(4)], "rated_seen": [1, 1, 1, 0], "rated_seen_base": [0, 0, 0, 0]}
    near |= {"rated_unseen": [1, 0, 0, 0], "rated_unseen_base": [0, 0, 0, 1]}
    for name, told in (("play", {"prompt_id": near["prompt_id"]}), ("base", {}), ("by-s4", near), ("gold", {})):
        write_json(tmp_path / name / "clips.json", told)
        write_json(tmp_path / name / "figures.json", {})
        write_json(tmp_path / name / "gold.json", {"clips": clips})
        write_json(tmp_path / name / "done.json", {"seconds": 1})
    given = {name: cells[name] for name in ("play", "base", "gold")}
    outcome = Outcome("main", "ppo", "warm", 3, 9, **given, settings="a", unseen=(cells["by-s4"], cells["by-s5"]))
    told = tell(outcome, tmp_path).row["beyond"]
    assert told == {"nearest_rated": {**told["nearest_rated"], "seen": 0.75, "unseen": 0.0, "change": 0.75, "n": 4, "sets": 1}}
    assert tell(dataclasses.replace(outcome, unseen=()), tmp_path).row["beyond"] == {}


def test_what_a_proxy_is_worth_in_gold_is_learnt_within_prompts_alone():
    rng = np.random.default_rng(0)
    prompts = [f"p{i // 2}" for i in range(400)]
    level = np.repeat(rng.normal(size=200), 2)  # which prompts are liked, whatever is played: it goes the other way
    proxy = rng.normal(size=400)
    gold = 0.7 * proxy + 0.1 * rng.normal(size=400) - 5 * level
    assert slope_within(gold, proxy + 3 * level, prompts) == pytest.approx(0.7, abs=0.03)
    gold[7] = proxy[9] = np.nan
    assert slope_within(gold, proxy + 3 * level, prompts) == pytest.approx(0.7, abs=0.03)
    assert slope_within(gold, 3 * level, prompts) is None


def test_over_optimisation_is_gold_lost_while_the_proxy_rose():
    rows = [
        {"step": str(i), "gold_gain": g, "proxy_gain": p, "kl": 10.0 * i, "win_rate": 0.5}
        for i, (g, p) in enumerate([(0, 0), (1, 1), (0.5, 2), (-1, 3)])
    ]
    told = lost_after_the_best(rows)
    assert (told["best_step"], told["lost"], told["lost_since_the_middle"], told["proxy_rose"]) == ("1", 2, 1.5, 2)


def rows():
    base = {
        "taste": "warm",
        "seed": 0,
        "win_rate": 0.8,
        "ci": [0.76, 0.84],
        "decided": 288,
        "kl": 20.0,
        "diversity_ratio": 0.95,
        "gold_gain": 0.6,
    }
    base |= {
        "gold_gain_ci": [0.5, 0.7],
        "proxy_gain": 1.0,
        "lowest": 0.78,
        "highest": 0.82,
        "seeds": 3,
        "fit": {},
        "copies": {"nearest_training": {"value": 0.05, "base": 0.07, "change": -0.02, "ci": [-0.05, 0.01], "n": 288}},
        "beyond": {"nearest_training": {"seen": -0.02, "unseen": -0.03, "change": 0.01, "ci": [-0.02, 0.04], "n": 288, "sets": 1}},
    }
    return [
        {**base, "method": method, "votes": votes, "similarity_change": 0.01, "similarity_half_ci": 0.02}
        for method in ("ppo", "dpo")
        for votes in (200, 2000)
    ]


def figures():
    trail = [{**row, "step": str(i), "kl": 5.0 * i} for i, row in enumerate(rows())]
    reward = {
        "taste": "warm",
        "seed": 0,
        "votes": 200,
        "rounds": 1,
        "accuracy": 0.66,
        "ci": [0.6, 0.7],
        "ceiling": 0.78,
        "of_ceiling": 0.57,
        "ece": 0.03,
    }
    each = [{**row, "experiment": "gold"} for row in rows()]
    control = {
        **rows()[0],
        "control": "gold",
        "runs": 1,
        "prompt_ci": [0.7, 0.9],
        "judged_by": "prompt",
        "must": "win",
        "held": False,
        "why": "",
    }
    other = [{**row, "taste": "space"} for row in rows()]
    arms = {"free": trail, "braked": trail}
    return {
        "results": 9, "asked": 4, "missing": 1, "left_out": 0, "main": rows(), "main_by_seed": each,
        "familiar": rows(), "familiar_by_seed": each, "curve": rows() + other,
        "curve_by_seed": each, "controls": [control, {**control, "ci": None, "held": None}], "controls_by_seed": {"gold": each},
        "rewards": [reward, {**reward, "rounds": 2, "accuracy": 0.71}], "trails": {"warm, seed 3": arms, "drive, seed 3": arms},
        "over_optimisation": {at: {arm: lost_after_the_best(trail) for arm in arms} for at in ("warm, seed 3", "drive, seed 3")},
    }  # fmt: skip


def test_the_page_shows_what_is_there_and_leaves_out_what_is_not(tmp_path):
    text = page.write_page(tmp_path, figures()).read_text()
    for name in ("main", "curve", "controls", "rewards", "trails-warm-seed-3", "trails-drive-seed-3"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert f"({name}.png)" in text
    assert "Control by run: gold" in text
    assert "Control by run: reversed" not in text
    assert "4, of which 1 are missing" in text
    assert "0.050 - 0.070 = -0.020" in text
    rewards = text.partition("## The reward against its ceiling")[2].partition("\n##")[0]
    told = [[cell.strip() for cell in line.split("|")[3:6]] for line in rewards.splitlines() if line.startswith("| warm")]
    assert told == [["200", "1", "0.660"], ["200", "2", "0.710"]]
    assert "-0.020 - -0.030 = +0.010 [-0.020, 0.040]" in text
    assert text.count("Music that is more alike comes nearer to any clip") == 3  # the main table, familiar, and the guards
    assert [line.split("|")[-3].strip() for line in text.splitlines() if line.startswith("| gold    | warm")][:2] == ["NO", "not judged"]
    empty = {key: [] for key in ("main", "main_by_seed", "familiar", "familiar_by_seed", "curve", "curve_by_seed", "controls", "rewards")}
    counts = {"results": 0, "asked": 4, "missing": 4, "left_out": 0}
    nothing = {**empty, **counts, "controls_by_seed": {}, "trails": {}, "over_optimisation": {}}
    assert "##" not in page.write_page(tmp_path / "empty", nothing).read_text()


def test_the_table_says_which_of_rate_interval_diversity_fit_and_copies_was_missed():
    changes = [{}, {"win_rate": 0.79}, {"ci": [0.74, 0.86]}, {"diversity_ratio": 0.89}, {"tempo_change": -0.05, "tempo_half_ci": 0.04}]
    changes += [{"nearest_training_change": 0.05, "nearest_training_half_ci": half} for half in (0.04, 0.06)]
    told = [page.missed({**rows()[0], **more}) for more in changes]
    assert told == ["", "win rate", "interval", "diversity", "tempo", "copies training", ""]


@pytest.mark.parametrize("name", ["rated", "training"])
def test_copies_are_missed_where_they_exceed_the_bases_and_where_it_is_measured_those_of_unseen_clips(name):
    def told(base, beyond):
        row = {f"nearest_{name}_change": base, f"nearest_{name}_half_ci": 0.03}
        row |= {} if beyond is None else {f"nearest_{name}_beyond_change": beyond, f"nearest_{name}_beyond_half_ci": 0.03}
        return page.missed({**rows()[0], **row})

    cases = [(0.05, None), (0.05, 0.04), (0.05, 0.02), (0.02, 0.04), (0.02, None), (0.05, -0.04)]
    assert [told(*case) for case in cases] == [f"copies {name}", f"copies {name}", "", "", "", ""]


@pytest.mark.parametrize("low", [0.01, -0.01])
def test_the_guards_name_copies_of_a_replication_by_the_same_rule(low):
    gain = {"value": 0.1, "base": 0.02, "change": 0.08, "ci": [0.04, 0.12], "n": 288}
    more = {"seen": 0.08, "unseen": 0.05, "change": 0.03, "ci": [low, 0.07], "n": 288, "sets": 2}
    row = {**rows()[0], "experiment": "main", "copies": {"nearest_rated": gain}, "beyond": {"nearest_rated": more}}
    cells = [cell.strip() for cell in page.guard_table([row]).splitlines()[-1].split("|")[1:-1]]
    assert cells[6:8] == ["0.100 - 0.020 = +0.080 [0.040, 0.120]", f"+0.080 - +0.050 = +0.030 [{low:.3f}, 0.070]"]
    assert cells[8:] == ["-", "-", "copies rated" if low > 0 else "nothing"]


def test_the_plot_of_rewards_shows_votes_where_they_are_whatever_the_seeds_are_called(tmp_path, monkeypatch):
    """A seed's own number had moved its points: 2,000 votes of seed 43 stood at 4,687."""
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure.axes[0]) or path)
    given = [{**figures()["rewards"][0], "seed": seed, "votes": votes} for seed in (43, 44, 45) for votes in (200, 2000)]
    plots.plot_rewards(given, tmp_path / "rewards.png")
    points = drawn[0].lines[0].get_xdata()
    assert len(set(points)) == 6
    assert all(min(abs(x / votes - 1) for votes in (200, 2000)) < 0.03 for x in points)
    assert [tick.get_text() for tick in drawn[0].get_xticklabels()] == ["200", "2000"]
