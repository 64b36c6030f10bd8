import re
import sys

import pytest

from base_models.checkpoint import read_jsonl
from base_models.corpus.captions import demo_prompts
from base_models.errors import UserError
from base_models.settings import parse
from benchmarks import rlhf_proof
from rlhf import train_dpo, train_ppo
from rlhf.proof import prompts
from rlhf.proof.builder import TUNED_ON, Builder
from rlhf.proof.cells import CODE, TOP, closure, place
from rlhf.proof.plan import CONTROLLED, METHODS, ROUNDS, SCRIPTS, SECONDS, SMALL, Arguments, Plan, Sizes, trainer_of
from rlhf.proof.plots import COLOURS, NAMES
from rlhf.sample_pairs import read_prompts


def main_plan(methods=("ppo", "dpo"), **changes):
    plan, builder = Plan(), Builder(Sizes(), Arguments(), **changes)
    builder.main_table(plan, ["warm", "drive", "space"], [0, 1, 2], methods)
    return plan


def warm_table(methods, arguments=None):
    """The main table of one taste and seed, and its cells by their labels."""
    plan = Plan()
    Builder(Sizes(), arguments or Arguments()).main_table(plan, ["warm"], [0], methods)
    return plan, {cell.label: cell for cell in closure(plan.cells())}


def labels(plan):
    return [cell.label for cell in closure(plan.cells())]


def test_the_main_table_has_a_row_for_each_taste_seed_and_method():
    plan = main_plan()
    rows = {(o.taste, o.seed, o.method) for o in plan.outcomes}
    assert len(rows) == len(plan.outcomes) == 18
    assert all(o.votes <= 2000 for o in plan.outcomes)


@pytest.mark.parametrize(
    ("script", "flags", "named"),
    [
        (train_ppo, rlhf_proof.PPO, ["--preset", "votes"]),
        (train_dpo, rlhf_proof.DPO, ["--preset", "rounds"]),
    ],
    ids=["ppo", "dpo"],
)
def test_what_the_main_table_is_trained_with_is_a_preset_that_anybody_can_name(script, flags, named):
    assert parse(script.Config, script.PRESETS, [*flags]) == parse(script.Config, script.PRESETS, named)


def test_ppo_by_score_is_the_tables_ppo_but_for_its_credit_and_its_larger_rounds():
    by_codes, by_score = (parse(train_ppo.Config, train_ppo.PRESETS, [*own]) for own in (rlhf_proof.PPO, rlhf_proof.PPO_SCORE))
    other = {name: value for name, value in vars(by_score).items() if value != getattr(by_codes, name)}
    rounds = {"batch_size": 128, "samples_per_prompt": 4, "baseline": "loo", "lr": 7e-4}
    assert other == {"credit": "score", **rounds, "kl_horizon": 480}
    assert by_score.batch_size / by_score.kl_horizon == by_codes.batch_size / by_codes.kl_horizon  # how far a round moves the price
    train_ppo.check(by_score, 1)


def test_dpo_on_rated_pairs_is_what_the_script_does_with_a_snapshot_alone():
    assert parse(train_dpo.Config, train_dpo.PRESETS, [*rlhf_proof.DPO_RATED]) == train_dpo.Config()


def test_every_method_has_a_row_to_stand_in():
    assert set(METHODS) <= NAMES.keys() & COLOURS.keys()
    assert len({NAMES[method] for method in METHODS}) == len({COLOURS[method] for method in METHODS}) == len(METHODS)


@pytest.mark.parametrize("arguments", [Arguments(), rlhf_proof.FULL_ARGUMENTS, rlhf_proof.SMALL_ARGUMENTS], ids=["none", "full", "small"])
def test_every_run_has_a_script_settings_a_time_and_something_to_learn_from(arguments):
    runs = {trainer_of(method) for method in METHODS} - {"best_of_n"}
    assert runs == SCRIPTS.keys() == SECONDS.keys() == arguments.trained_on.keys()
    assert all((TOP / "rlhf" / f"train_{script}.py").is_file() for script in SCRIPTS.values())
    _, cells = warm_table(METHODS, arguments)
    for run in runs:
        argv, own = cells[f"{run}/warm/s0/n2000"].argv, getattr(arguments, run)
        assert argv[1] == f"rlhf/train_{SCRIPTS[run]}.py"
        assert argv[len(argv) - len(own) :] == own


def test_a_method_more_is_a_run_more_and_leaves_the_others_alone():
    others = [method for method in METHODS if method not in ("ppo_score", "dpo_rated")]
    before, after = ({cell.name for cell in warm_table(methods)[1].values()} for methods in (others, METHODS))
    assert before < after
    more = {re.sub("-[0-9a-f]{8}$", "", name) for name in after - before}
    assert more == {f"{step}{run}/warm/s0/n2000" for step in ("", "play/", "gold/") for run in ("ppo_score", "dpo_rated")}


def test_dpo_on_rated_pairs_has_the_votes_and_no_reward_or_prompts_to_play():
    plan, cells = warm_table(["dpo_rated"], rlhf_proof.FULL_ARGUMENTS)
    run = cells["dpo_rated/warm/s0/n2000"]
    assert [need.label for need in run.needs] == ["snapshot/warm/s0/n2000"]
    assert run.argv[run.argv.index("--snapshot") + 1] == place(cells["snapshot/warm/s0/n2000"], "snapshot")
    assert not {"--reward", "--prompts", "--n-frames", "--weights"} & set(run.argv)
    assert run.resume == ("--resume",)
    played = cells["play/dpo_rated/warm/s0/n2000"].argv
    assert played[played.index("--adapter") + 1] == place(run, "run", "adapter")
    assert played[played.index("--system") + 1] == "dpo_rated"
    assert [(outcome.method, outcome.gold.label) for outcome in plan.outcomes] == [("dpo_rated", "gold/dpo_rated/warm/s0/n2000")]


def test_ppo_by_score_has_what_ppo_has_and_is_told_to_go_by_score():
    _, cells = warm_table(["ppo", "ppo_score"], rlhf_proof.FULL_ARGUMENTS)
    by_codes, by_score = cells["ppo/warm/s0/n2000"], cells["ppo_score/warm/s0/n2000"]
    assert by_score.needs == by_codes.needs
    assert by_score.argv[: len(by_codes.argv)] == by_codes.argv
    more = by_score.argv[len(by_codes.argv) :]
    assert more[more.index("--credit") + 1] == "score"
    assert "--credit" not in by_codes.argv


def test_tastes_share_the_clips_of_a_seed_and_seeds_share_nothing():
    named = labels(main_plan())
    assert sum(label.startswith("samples/") for label in named) == 3
    assert sum(label.startswith("votes/") for label in named) == 9
    assert sum(label.startswith("base/") for label in named) == 3


def test_listeners_are_asked_about_the_pairs_of_a_seed_that_sound_least_alike():
    cells = closure(main_plan().cells())
    pairs = {cell.label: cell for cell in cells if cell.label.startswith("pairs/")}
    assert pairs.keys() == {"pairs/s0", "pairs/s1", "pairs/s2"}
    for seed in range(3):
        chosen = pairs[f"pairs/s{seed}"]
        assert chosen.argv[-2:] == ("--pairs-per-prompt", str(Sizes().pairs))
        assert [need.label for need in chosen.needs] == [f"samples/s{seed}"]  # no vote is among what they are chosen by
    for cell in cells:
        if cell.label.startswith("votes/"):
            assert cell.argv[cell.argv.index("--pairs") + 1] == place(pairs[f"pairs/{cell.label.split('/')[-1]}"], "pairs.jsonl")
    assert Sizes().pairs < Sizes().clips * (Sizes().clips - 1) // 2


def test_what_trains_never_hears_of_held_out_prompts_and_what_plays_them_does_not_train():
    for cell in closure(main_plan(["ppo", "ppo_score", "dpo", "dpo_rated", "sft"]).cells()):
        texts = " ".join(cell.argv)
        if cell.label.split("/")[0] in (*SCRIPTS, "reward"):
            needs = {need.label for need in closure([cell])}
            assert not any("heldout" in label for label in needs)
            assert "simulation" not in texts
        if "rlhf.proof.play" in texts and "--prompts" in texts:
            assert "prompts/heldout" in texts


def test_no_argument_hangs_on_where_the_code_or_the_interpreter_lies():
    plan, builder = Plan(), Builder(SMALL, Arguments(), tokens=TOP / "corpus" / "codes")
    builder.main_table(plan, ("warm",), (0, 1), METHODS)
    builder.curve(plan, "warm", 0, METHODS, (20, 40))
    builder.familiar(plan, ("warm",), (0,), METHODS)
    builder.over_optimisation(plan, "warm", 0)
    builder.controls(plan, tuple(CONTROLLED), "warm", 0, METHODS)
    cells = closure(plan.cells())
    assert any(f"{CODE}/corpus/codes" in cell.argv for cell in cells)
    assert any("rlhf.proof.unseen" in cell.argv for cell in cells)
    assert any("rlhf.simulation.serve" in argument for cell in cells for argument in cell.argv)
    assert not [a for cell in cells for a in (*cell.argv, *cell.resume) if str(TOP) in a or sys.executable in a]


def test_tuning_uses_other_seeds_for_everything():
    seeds = {}
    for tuning in (False, True):
        cells = [cell for cell in closure(main_plan(tuning=tuning).cells()) if cell.label.startswith("prompts/")]
        seeds[tuning] = {int(cell.argv[cell.argv.index("--seed") + 1]) for cell in cells}
    assert not seeds[False] & seeds[True]
    assert {9000, 9001, 9002} <= seeds[False]
    assert {8000, 8001, 8002} <= seeds[True] & set(TUNED_ON) == {8000, 8001, 8002}


def test_no_held_out_prompt_is_one_on_which_settings_were_chosen(tmp_path):
    out = tmp_path / "p.jsonl"
    prompts.main(["--n", "144", "--split", "heldout", "--seed", "9000", "--name", "h", "--out", str(out), "--avoid", "0", "1", "8000"])
    own = {prompt.prompt for prompt in read_prompts(out)}
    tuned = {row["prompt"] for seed in (0, 1, 8000) for row in demo_prompts(144, "heldout", seed=seed)}
    assert len(own) == 144
    assert not own & tuned


def test_familiar_prompts_ask_for_what_training_asked_for_in_other_words(tmp_path):
    builder = Builder(Sizes(), Arguments())
    cells = {kind: builder.prompts(kind, 4) for kind in ("train", "play", "watch", "familiar")}
    files = {}
    for kind, cell in cells.items():  # the programs as the plan gives them, with the folders of their cells put in
        files[kind] = tmp_path / kind / "prompts.jsonl"
        files[kind].parent.mkdir()
        argv = [re.sub(r"\{here\}", str(files[kind].parent), argument) for argument in cell.argv[3:]]
        for need in cell.needs:
            argv = [argument.replace(place(need), str(tmp_path / need.label.split("/")[1])) for argument in argv]
        assert prompts.main(argv) == 0
    said = {kind: read_jsonl(path) for kind, path in files.items()}
    trained_on = {row["prompt"] for kind in ("train", "play", "watch") for row in said[kind]}
    assert len(said["familiar"]) == Sizes().heldout_prompts
    assert not {row["prompt"] for row in said["familiar"]} & trained_on
    assert {row["prompt"] for row in demo_prompts(144, "train", seed=404)} & trained_on  # or nothing had to be left out
    pairs = [{(row["genre"], row["mood"]) for row in rows} for rows in (said["familiar"], demo_prompts(400, "train", seed=0))]
    assert pairs[0] <= pairs[1]
    assert not pairs[0] & {(row["genre"], row["mood"]) for row in demo_prompts(400, "heldout", seed=0)}


def test_familiar_prompts_are_played_by_the_adapters_of_the_main_table():
    main, plan, builder = warm_table(METHODS)[0], Plan(), Builder(Sizes(), Arguments())
    builder.familiar(plan, ["warm"], [0], ["ppo", "ppo_best", "ppo_score", "dpo", "dpo_rated", "best_of_n"])
    assert [o.method for o in plan.outcomes] == ["ppo", "ppo_best", "ppo_score", "dpo", "dpo_rated"]
    trained = {cell.name for cell in closure(main.cells()) if cell.label.startswith(("ppo", "dpo"))}
    runs = [cell.name for cell in closure(plan.cells()) if cell.label.startswith(("ppo", "dpo"))]
    assert runs
    assert set(runs) <= trained
    for outcome in plan.outcomes:
        assert outcome.base.label == "base/familiar/s0"
        assert outcome.gold.label.startswith("gold/familiar/")
        assert not any("heldout" in cell.label for cell in closure([outcome.gold]))


def test_votes_in_two_rounds_are_as_many_and_half_of_them_about_clips_of_an_adapter_of_the_first_half():
    plan, cells = warm_table(["ppo", "ppo_rounds", "dpo_rounds"])
    assert [(o.method, o.votes) for o in plan.outcomes] == [("ppo", 2000), ("ppo_rounds", 2000), ("dpo_rounds", 2000)]
    both = cells["snapshot/warm/s0/n2000_rounds"]
    first, again = both.needs
    assert [cell.argv[cell.argv.index("--votes") + 1] for cell in both.needs] == ["1000", "1000"]
    assert [cell.label for cell in again.needs] == ["votes/warm/s0/after-n1000"]
    clips = cells["samples/warm/s0/after-n1000"]
    scout = cells["ppo/warm/s0/n1000"]
    assert clips in again.needs[0].needs
    assert clips.argv[clips.argv.index("--adapter") + 1] == place(scout, "run", "adapter")
    assert first in closure([scout])  # what the scout learns from
    assert both not in closure([scout])
    for name in ("ppo", "dpo"):  # each learns from all of them, and from nothing else than the one that had all votes at once
        run, at_once = cells[f"{name}/warm/s0/n2000_rounds"], cells.get(f"{name}/warm/s0/n2000")
        assert [need for need in run.needs if need.label.startswith("reward/")] == [cells["reward/warm/s0/n2000_rounds"]]
        if at_once:
            assert [part for part in run.argv if "reward" not in part] == [part for part in at_once.argv if "reward" not in part]
    assert [(r.method, r.cell.label) for r in plan.rewards] == [
        (None, "reward/warm/s0/n2000"),
        (ROUNDS, "reward/warm/s0/n2000_rounds"),
    ]


def test_clips_of_the_second_round_are_other_clips_of_the_same_prompts():
    _, cells = warm_table(["ppo_rounds"])
    flags = [dict(zip(argv[4::2], argv[5::2])) for argv in (cells[f"samples/{of}"].argv for of in ("s0", "warm/s0/after-n1000"))]
    assert flags[0]["--prompts"] == flags[1]["--prompts"]
    assert flags[0]["--seed"] != flags[1]["--seed"]
    assert (flags[0]["--system"], "--adapter" in flags[0]) == ("base", False)


def unseen_cells(seeds, tokens=None, methods=("ppo", "best_of_n"), experiment="main_table"):
    """Label -> cell of what compares near copies with unseen clips, and its plan."""
    plan, builder = Plan(), Builder(Sizes(), Arguments(), tokens=tokens)
    getattr(builder, experiment)(plan, ["space"], seeds, methods)
    return {cell.label: cell for outcome in plan.outcomes for cell in outcome.unseen}, plan


def test_an_adapters_copies_are_compared_with_the_rated_clips_of_each_other_seed_of_the_call():
    cells, plan = unseen_cells([43, 44, 45])
    assert set(cells) == {f"unseen/ppo/space/s{own}/n2000/by-s{other}" for own in (43, 44, 45) for other in {43, 44, 45} - {own}}
    assert [len(outcome.unseen) for outcome in plan.outcomes] == [2, 0] * 3  # the best of n of the base has no adapter
    cell, builder = cells["unseen/ppo/space/s43/n2000/by-s44"], Builder(Sizes(), Arguments())
    outcome = next(outcome for outcome in plan.outcomes if (outcome.seed, outcome.method) == (43, "ppo"))
    given = dict(zip(cell.argv[cell.argv.index("--played") :: 2], cell.argv[cell.argv.index("--played") + 1 :: 2]))
    named = {"--played": outcome.play, "--base": outcome.base, "--own": builder.samples(43), "--unseen": builder.samples(44)}
    assert given == {flag: place(need, "samples", "manifest.jsonl") for flag, need in named.items()}
    assert [need.name for need in cell.needs] == [need.name for need in named.values()]
    assert set(cells.values()) <= set(plan.cells())
    assert not set(cells.values()) & set(plan.results())


def test_names_of_unseen_cells_do_not_hang_on_which_other_seeds_a_call_has():
    two, four = (unseen_cells(seeds, TOP / "codes")[0] for seeds in ([43, 44], [45, 44, 43, 46]))
    assert two.keys() < four.keys()
    assert {cell.name for cell in two.values()} < {cell.name for cell in four.values()}


def test_a_single_seed_has_no_other_to_compare_with_and_the_corpus_is_compared_where_it_is_given():
    assert unseen_cells([43])[0] == {}
    corpus = unseen_cells([43], TOP / "codes")[0]
    assert set(corpus) == {"unseen/ppo/space/s43/n2000/corpus"}
    argv = corpus["unseen/ppo/space/s43/n2000/corpus"].argv
    assert argv[argv.index("--tokens") + 1] == f"{CODE}/codes"
    assert "--own" not in argv


def test_what_is_compared_with_unseen_clips_changes_the_name_of_nothing_else():
    """A call of one seed has no such cell; those of more seeds have the same cells and these."""
    names = {cell.name for seed in (43, 44) for cell in closure(unseen_cells([seed])[1].cells())}
    both = {cell.name for cell in closure(unseen_cells([43, 44])[1].cells())}
    assert both - names == {cell.name for cell in unseen_cells([43, 44])[0].values()}
    assert names < both


def test_familiar_prompts_are_compared_likewise_and_no_other_experiment_is():
    assert set(unseen_cells([43, 44], experiment="familiar")[0]) == {
        "unseen/familiar/ppo/space/s43/n2000/by-s44",
        "unseen/familiar/ppo/space/s44/n2000/by-s43",
    }
    plan, builder = Plan(), Builder(SMALL, Arguments(), tokens=TOP / "codes")
    builder.curve(plan, "warm", 0, METHODS, (20, 40))
    builder.controls(plan, tuple(CONTROLLED), "warm", 0, METHODS)
    assert {outcome.unseen for outcome in plan.outcomes} == {()}


def test_the_small_graph_has_cells_of_unseen_clips_after_all_results(tmp_path, capsys):
    given = ["--small", "--list", "--out", str(tmp_path), "--tastes", "warm", "--seeds", "1,2", "--experiments", "main,familiar"]
    assert rlhf_proof.main(given) == 0
    listed = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[:-1]]
    unseen = [name for name in listed if name.startswith("unseen/")]
    assert len(unseen) == 2 * 2 * 2  # experiments, methods, seeds
    assert listed[-len(unseen) :] == unseen


def test_the_curve_and_the_main_table_share_what_is_the_same():
    plan, builder = main_plan(), Builder(Sizes(), Arguments())
    before = set(labels(plan))
    builder.curve(plan, "warm", 0, ["ppo", "dpo"], [200, 2000])
    new = set(labels(plan)) - before
    assert not any("n2000" in label for label in new)
    assert any("n200" in label for label in new)


def test_other_settings_of_ppo_leave_all_else_alone():
    names = []
    for steps in ("60", "80"):
        plan = Plan()
        Builder(Sizes(), Arguments(ppo=("--steps", steps))).main_table(plan, ["warm"], [0], ["ppo", "dpo"])
        names.append({cell.name for cell in closure(plan.cells())})
    changed = {re.sub("-[0-9a-f]{8}$", "", name) for name in names[0] ^ names[1]}
    assert changed == {"ppo/warm/s0/n2000", "play/ppo/warm/s0/n2000", "gold/ppo/warm/s0/n2000"}


def test_the_best_of_several_of_an_adapter_takes_the_run_that_is_there_and_the_reward_it_was_trained_on():
    plan, cells = warm_table(["ppo", "ppo_best", "dpo_best"])
    assert sum(label.startswith("ppo/") for label in cells) == 1
    for trainer in ("ppo", "dpo"):
        played = cells[f"play/{trainer}_best/warm/s0/n2000"]
        told = " ".join(played.argv)
        assert place(cells[f"{trainer}/warm/s0/n2000"], "run", "adapter") in told
        assert f"--best-of 4 --reward {place(cells['reward/warm/s0/n2000'], 'reward')}" in told
        assert f"gold/{trainer}_best/warm/s0/n2000" in cells
    assert "--best-of" not in " ".join(cells["play/ppo/warm/s0/n2000"].argv)
    assert [(outcome.method, outcome.votes) for outcome in plan.outcomes] == [("ppo", 2000), ("ppo_best", 2000), ("dpo_best", 2000)]


def test_a_stronger_adapter_is_the_run_that_is_there_at_another_weight():
    _, cells = warm_table(["ppo", "ppo_strong", "dpo_strong"])
    assert sum(label.startswith("ppo/") for label in cells) == 1
    for trainer in ("ppo", "dpo"):
        told = cells[f"play/{trainer}_strong/warm/s0/n2000"].argv
        assert place(cells[f"{trainer}/warm/s0/n2000"], "run", "adapter") in told
        assert told[told.index("--weight") + 1] == "1.2"
        assert f"gold/{trainer}_strong/warm/s0/n2000" in cells
    assert "--weight" not in cells["play/ppo/warm/s0/n2000"].argv


def test_controls_train_on_what_they_should():
    plan, builder = Plan(), Builder(SMALL, Arguments(ppo=("--weights", "human=1,tempo=1"), dpo=("--hold", "tempo")))
    builder.controls(plan, ["shuffled", "listeners", "reversed", "constant", "gold"], "drive", 0, ["ppo", "dpo", "best_of_n"])
    texts = {cell.label: " ".join(cell.argv) for cell in closure(plan.cells())}
    assert sum(outcome.experiment == "shuffled" for outcome in plan.outcomes) == 2 * SMALL.shuffles
    assert sum(outcome.experiment == "listeners" for outcome in plan.outcomes) == 2 * SMALL.shuffles
    for method in ("ppo", "dpo"):
        assert texts[f"listeners-{method}/drive/s0/n60-half1"].endswith("--weights human=1 --hold ")  # the last word counts
        assert "--weights human=1 --hold " not in texts[f"{method}/drive/s0/n60-half1"]
    assert "--turn all" in texts["snapshot/drive/s0/n60-all0"]
    assert "--constant 0" in texts["outside-constant/drive/s0"]
    assert "--taste drive" in texts["outside-gold/drive/s0"]
    assert "--score-command" in texts["play/gold-best_of_n/drive/s0"]
    assert [outcome.method for outcome in plan.outcomes if outcome.experiment == "gold"] == ["ppo", "best_of_n"]
    assert "--reward" not in texts["outside-gold/drive/s0"]
    watched = {label.split("/")[0] for label, text in texts.items() if "--heldout-prompts" in text}
    assert watched == {
        "ppo",
        "listeners-ppo",
        "outside-gold",
    }  # what is held is compared with the base at looks; under a constant nothing is


def test_controls_of_a_method_are_runs_by_its_own_settings():
    plan, builder = Plan(), Builder(SMALL, Arguments(ppo=("--steps", "3"), ppo_score=("--steps", "5"), dpo_rated=("--beta", "0.2")))
    builder.controls(plan, tuple(CONTROLLED), "drive", 0, ["ppo", "ppo_score", "dpo_rated"])
    texts = {cell.label: " ".join(cell.argv) for cell in closure(plan.cells())}
    had = {(outcome.experiment, outcome.method) for outcome in plan.outcomes}
    assert had == {(name, method) for name in CONTROLLED for method in ("ppo", "ppo_score")} | {
        (name, "dpo_rated") for name in ("shuffled", "reversed")
    }
    for turned in ("half1", "half2", "all0"):
        assert texts[f"ppo_score/drive/s0/n60-{turned}"].endswith("--steps 5")
        assert texts[f"dpo_rated/drive/s0/n60-{turned}"].endswith("--beta 0.2")
    assert texts["listeners-ppo_score/drive/s0/n60-half1"].endswith("--steps 5 --weights human=1 --hold ")
    assert texts["outside-constant-ppo_score/drive/s0"].endswith("--steps 5 --weights human=1 --hold  --credit score")
    assert texts["outside-gold-ppo_score/drive/s0"].endswith("--steps 5 --credit score")
    assert texts["outside-gold/drive/s0"].endswith("--steps 3 --credit score")
    assert "--system ppo_score" in texts["play/outside-gold-ppo_score/drive/s0"]


@pytest.mark.parametrize(
    ("controls", "methods"), [(["constant", "gold"], ["dpo_rated", "dpo"]), (["listeners"], ["dpo_rated"]), ([*CONTROLLED], ["sft"])]
)
def test_controls_that_none_of_the_methods_has_are_refused(controls, methods):
    plan = Plan()
    with pytest.raises(UserError, match=f"--controls {','.join(controls)} with --methods {','.join(methods)}"):
        Builder(SMALL, Arguments()).controls(plan, controls, "warm", 0, methods)
    assert plan.outcomes == []


def test_the_weak_reward_is_weak_and_both_arms_keep_their_checkpoints():
    plan = Plan()
    builder = Builder(
        Sizes(),
        Arguments(
            weak_reward=("--members", "1"),
            free=("--kl-coef", "0"),
            stopped=("--kl-coef", "0", "--brake", "rewind"),
            braked=("--brake", "rewind"),
        ),
    )
    builder.over_optimisation(plan, "warm", 0)
    texts = {cell.label: " ".join(cell.argv) for cell in closure(plan.cells())}
    assert "--members 1" in texts["weak/warm/s0/n50"]
    assert "--kl-coef 0" in texts["trail-free/warm/s0/n50"]
    assert "--brake rewind" in texts["trail-braked/warm/s0/n50"]
    assert all("rlhf.proof.keep" in texts[f"trail-{arm}/warm/s0/n50"] for arm in ("free", "stopped", "braked"))


def test_every_play_asks_both_judges_of_genre_and_the_second_has_heard_no_clip_of_the_base():
    cells = closure(main_plan().cells())
    known = [cell for cell in cells if cell.label == "known"]
    assert len(known) == 1
    assert known[0].needs == ()
    plays = [cell for cell in cells if cell.label.split("/")[0] in ("play", "base")]
    assert all({"--probe", "--real-probe"} <= set(cell.argv) and known[0] in cell.needs for cell in plays)
