from base_models.checkpoint import write_json
from rlhf.proof.builder import Builder
from rlhf.proof.cells import Cell, closure
from rlhf.proof.ledger import entry_of, merged, of_one_setting, remember
from rlhf.proof.plan import ROUNDS, SMALL, Arguments, Plan


def planned(experiment, taste="warm", seed=3, others=(), **arguments):
    plan, builder = Plan(), Builder(SMALL, Arguments(**arguments))
    if experiment == "main":
        builder.main_table(plan, [taste], [seed, *others], ["ppo", "dpo"])
    elif experiment == "curve":
        builder.curve(plan, taste, seed, ["ppo", "sft"], [20, 60])
    elif experiment == "over":
        builder.over_optimisation(plan, taste, seed)
    else:
        builder.controls(plan, ["shuffled", "constant"], taste, seed, ["ppo"])
    return plan


def finish(plan, root):
    for cell in closure(plan.cells()):
        write_json(cell.folder(root) / "done.json", {"seconds": 1})


def rows(found):
    return sorted((o.experiment, o.taste, o.seed, o.method, o.votes, o.draw) for o in found.plan.outcomes)


def test_calls_one_after_another_end_with_all_that_each_of_them_has_found(tmp_path):
    root, out, plans = tmp_path / "cells", tmp_path / "final", []
    for plan in (planned("main"), planned("curve"), planned("controls"), planned("over"), planned("main", "space", 4)):
        finish(plan, root)
        found = remember(plan, root, out)
        plans.append(plan)
    assert len(found.plan.outcomes) == sum(len(plan.outcomes) for plan in plans) == 2 + 4 + 3 + 2
    assert {trail.arm for trail in found.plan.trails} == {"free", "stopped", "braked"}
    assert len(found.plan.rewards) == len({(r.taste, r.seed, r.votes) for plan in plans for r in plan.rewards})
    assert {o.gold.name for o in found.plan.outcomes} == {o.gold.name for plan in plans for o in plan.outcomes}
    assert rows(remember(plans[0], root, out)) == rows(found)


def test_what_is_not_finished_or_was_deleted_is_not_told(tmp_path):
    plan = planned("main")
    assert remember(plan, tmp_path / "cells", tmp_path / "final").plan.outcomes == []
    finish(plan, tmp_path / "cells")
    assert len(remember(plan, tmp_path / "cells", tmp_path / "final").plan.outcomes) == 2
    (plan.outcomes[0].gold.folder(tmp_path / "cells") / "done.json").unlink()
    assert len(remember(Plan(), tmp_path / "cells", tmp_path / "final").plan.outcomes) == 1


def test_results_of_other_settings_are_never_under_the_newest_ones(tmp_path):
    root, out = tmp_path / "cells", tmp_path / "final"
    old, old_too, new = planned("main"), planned("main", seed=4), planned("main", ppo=("--steps", "9"))
    for plan in (old, old_too, new):
        finish(plan, root)
        found = remember(plan, root, out)
    assert {(o.method, o.seed) for o in found.plan.outcomes} == {("ppo", 3), ("dpo", 3), ("dpo", 4)}
    assert found.left_out == 2
    back = remember(old, root, out)
    assert {(o.method, o.seed) for o in back.plan.outcomes} == {("ppo", 3), ("ppo", 4), ("dpo", 3), ("dpo", 4)}


def test_a_result_that_is_found_again_is_told_once_with_its_newest_cells():
    one = {"experiment": "main", "method": "ppo", "seed": 3, "settings": "a", "gold": "gold/1"}
    again = {**one, "gold": "gold/2"}
    assert merged([one], [again]) == [again]
    other = {**one, "settings": "b"}
    assert of_one_setting(merged([one], [other])) == [other]


def unseen_of(found, seed=3, method="ppo"):
    """Labels of the cells that measured an outcome's copies of unseen clips."""
    cells = [cell.name for o in found.plan.outcomes if (o.seed, o.method) == (seed, method) for cell in o.unseen]
    return sorted(name.rpartition("/")[2].rpartition("-")[0] for name in cells)


def test_an_outcome_is_told_with_what_it_copies_of_unseen_clips_and_a_call_of_more_seeds_adds_to_it(tmp_path):
    root, out = tmp_path / "cells", tmp_path / "final"
    alone, both, three = planned("main"), planned("main", others=[4]), planned("main", others=[4, 5])
    for plan, measured in ((alone, []), (both, ["by-s4"]), (three, ["by-s4", "by-s5"])):
        finish(plan, root)
        found = remember(plan, root, out)
        assert unseen_of(found) == measured
        assert len({(o.seed, o.method) for o in found.plan.outcomes}) == len(found.plan.outcomes)  # each once
    assert unseen_of(found, 4, "dpo") == ["by-s3", "by-s5"]
    assert unseen_of(remember(alone, root, out)) == ["by-s4", "by-s5"]  # fewer seeds take nothing away
    known = {cell.name: cell for plan in (both, three) for o in plan.outcomes for cell in o.unseen}
    assert {cell.name for o in found.plan.outcomes for cell in o.unseen} == known.keys()


def test_measures_of_other_clips_do_not_stay_with_an_outcome():
    one = {"experiment": "main", "method": "ppo", "settings": "a", "play": "play/ppo-1", "base": "base-1", "unseen": ["unseen/by-s4-1"]}
    same, other = {**one, "unseen": ["unseen/by-s4-2", "unseen/by-s5-1"]}, {**one, "play": "play/ppo-2", "unseen": []}
    assert merged([one], [same]) == [same]  # the newest of each label
    assert merged([one], [{**one, "unseen": []}]) == [one]
    assert merged([one], [other]) == [other]


def test_an_outcome_is_told_before_its_copies_of_unseen_clips_are_measured(tmp_path):
    root, plan = tmp_path / "cells", planned("main", others=[4])
    for cell in closure([outcome.gold for outcome in plan.outcomes]):
        write_json(cell.folder(root) / "done.json", {"seconds": 1})
    found = remember(plan, root, tmp_path / "final")
    assert rows(found) == [("main", "warm", seed, method, 60, 0) for seed in (3, 4) for method in ("dpo", "ppo")]
    assert [cell.is_done(root) for o in found.plan.outcomes for cell in o.unseen] == [False] * 4


def test_a_ledger_of_before_is_read_and_its_outcomes_are_replaced(tmp_path):
    root, out, plan = tmp_path / "cells", tmp_path / "final", planned("main", others=[4])
    finish(plan, root)
    entries = [{name: value for name, value in entry_of(o).items() if name != "unseen"} for o in plan.outcomes]
    write_json(out / "ledger.json", {"outcomes": entries, "trails": [], "rewards": []})
    before = remember(Plan(), root, out)
    assert len(before.plan.outcomes) == 4
    assert {o.unseen for o in before.plan.outcomes} == {()}
    after = remember(plan, root, out)
    assert rows(after) == rows(before)
    assert unseen_of(after) == ["by-s4"]


def test_rewards_of_votes_in_two_rounds_stand_beside_those_at_once_and_each_is_kept_once(tmp_path):
    """Of ledgers of before too, whose rewards did not say how their votes came."""
    root, out = tmp_path / "cells", tmp_path / "final"
    both = Plan()
    Builder(SMALL, Arguments()).main_table(both, ["warm"], [3], ["ppo", "ppo_rounds", "dpo_rounds"])
    finish(both, root)
    before = {name: value for name, value in entry_of(both.rewards[0]).items() if name != "method"}
    write_json(out / "ledger.json", {"outcomes": [], "trails": [], "rewards": [before]})
    assert [reward.method for reward in remember(Plan(), root, out).plan.rewards] == [None]
    found = remember(both, root, out).plan
    assert sorted(reward.method or "" for reward in found.rewards) == ["", ROUNDS]
    assert len({reward.cell.name for reward in found.rewards}) == 2
    assert sorted(outcome.method for outcome in found.outcomes) == ["dpo_rounds", "ppo", "ppo_rounds"]


def test_settings_of_votes_in_two_rounds_name_what_trained_the_first_adapter():
    told = []
    for ppo in ((), ("--lr", "1e-4")):
        plan = Plan()
        Builder(SMALL, Arguments(ppo=ppo)).main_table(plan, ["warm"], [3], ["dpo", "dpo_rounds"])
        told.append({outcome.method: outcome.settings for outcome in plan.outcomes})
    assert told[0]["dpo"] == told[1]["dpo"]
    assert told[0]["dpo_rounds"] != told[1]["dpo_rounds"]


def test_settings_say_nothing_of_seeds_votes_and_places_of_cells():
    names = {o.settings for plan in (planned("main"), planned("main", "drive", 5)) for o in plan.outcomes if o.method == "ppo"}
    assert len(names) == 1
    assert names != {o.settings for o in planned("main", reward=("--members", "2")).outcomes if o.method == "ppo"}
    assert isinstance(planned("main").cells()[0], Cell)
