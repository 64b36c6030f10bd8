"""Online rounds: real clips, real app, votes over HTTP, a verdict by a stated rule, and no moment at which a kill does harm."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import urllib.request
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from adapters.library import read_adapter, save_mix
from base_models.checkpoint import read_json, read_jsonl, write_json
from base_models.errors import UserError
from base_models.policy import load_policy
from db.export import is_recorded
from db.schema import utc_now
from db.store import open_store
from rlhf import cli, stages, verdict
from rlhf.collecting import Collecting, admit, collect, counted, freeze
from rlhf.loop import METHODS, Loop, Round, settings
from rlhf.loop_report import status
from rlhf.metrics import crossed_bootstrap
from rlhf.sample_pairs import Prompt, Settings, sample
from rlhf.snapshot import NothingToLearnError
from rlhf.stages import ROOT, RatingApp, Stage, only_one, stamp
from rlhf.verdict import Outcome, comparisons, decide, read_outcomes
from tests.rlhf.vote_toys import write_snapshot

RATER = """
import hashlib, json, sys, urllib.request, uuid
url, campaign, accounts = sys.argv[1:4]
def ask(path, token=None, body=None, **headers):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {}), **headers}
    with urllib.request.urlopen(urllib.request.Request(url + path, data, headers)) as answer:
        return answer.status, answer.read()
given = 0
for account in json.load(open(accounts)):
    token = json.loads(ask("/api/v1/login", body=account)[1])["session"]
    while given < int(sys.argv[4]):
        code, found = ask(f"/api/v1/pairs/next?campaign={campaign}", token)
        if code == 204:
            break
        pair = json.loads(found)
        heard = {side: hashlib.sha256(ask(pair["audio"][side], token)[1]).hexdigest() for side in "ab"}
        vote = {"assignment_id": pair["assignment_id"], "choice": min(heard, key=heard.get), "listen_ms": {"a": 0, "b": 0}}
        ask("/api/v1/votes", token, vote, **{"Idempotency-Key": str(uuid.uuid4())})
        given += 1
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "train.txt").write_text("sad piano\ncalm folk\ndark rock\nhappy jazz\n")
    (folder / "heldout.txt").write_text("slow ambient\nfast house\n")
    (folder / "rater.py").write_text(RATER)
    return folder


def arguments(files: Path, policy: Path, out: Path, n_votes: int = 1000) -> list[str]:
    sizes = [
        "--duration",
        "0.6",
        "--target-votes",
        "1",
        "--ab-votes",
        "1",
        "--min-listen-ms",
        "0",
        "--min-decided",
        "2",
        "--min-prompts",
        "2",
    ]
    learns = ["--method", "sft", "--train", "--steps 2 --kl-clips 0 --held-out 0 --lr 0.05 --r 4 --one-rater"]
    names = ["--prompts", files / "train.txt", "--heldout", files / "heldout.txt", "--policy", policy, "--out", out, "--rounds", "1"]
    rater = f"python {files / 'rater.py'} {{url}} {{campaign}} {{accounts}} {n_votes}"
    return [*map(str, ["loop", *names]), *sizes, *learns, "--raters", rater, "--accounts", "3"]


@pytest.fixture(scope="module")
def played(files, policy_dir, tmp_path_factory) -> Path:
    """One whole round, cut short once because the raters' command gave too few votes."""
    out = tmp_path_factory.mktemp("loop") / "run"
    assert cli.main(arguments(files, policy_dir, out, n_votes=2)) == 2
    assert (counted(f"sqlite:///{out / 'encore.db'}", "loop")) == (2, 4)
    assert "2 of 4 votes are there" in "\n".join(status(out))
    assert cli.main(arguments(files, policy_dir, out)) == 0
    return out


def test_a_round_goes_from_clips_to_a_verdict(played):
    told = read_json(played / "rounds" / "01" / "stages" / "verdict.json")
    champion = read_json(played / "champion.json")
    assert told["n_votes"] == told["decided"] + told["ties"] == told["first"] + told["second"] == 2
    assert told["promoted"] == (told["ci"][0] > 0.5)
    assert champion["round"] == int(told["promoted"])
    if told["promoted"]:
        assert champion["adapter_sha256"] == read_adapter(played / champion["adapter"]).manifest.adapter_sha256
    assert read_adapter(played / "rounds" / "01" / "train" / "adapter").manifest.snapshot_sha256
    lines = "\n".join(status(played))
    assert told["why"] in lines
    assert "Champion: " in lines
    assert (played / "report.md").read_text() == lines + "\n"


def test_a_round_of_ppo_learns_from_a_reward_and_is_watched_on_rated_prompts_that_it_does_not_play(files, policy_dir, tmp_path):
    """The default method from votes to verdict, by the programs that it starts: the preset, which holds what prompts ask for."""
    (tmp_path / "train.txt").write_text(
        "".join(f"{mood} {genre}\n" for mood in ("sad", "calm", "dark") for genre in ("folk", "rock", "jazz"))
    )
    argv = arguments(files, policy_dir, tmp_path / "run")
    argv[argv.index("--prompts") + 1] = str(tmp_path / "train.txt")
    argv[argv.index("--method") + 1] = "ppo"
    argv[argv.index("--train") + 1] = "--steps 1 --batch-size 4 --microbatch 4 --base-looks 1 --listen 0 --r 4"
    assert cli.main([*argv, "--reward=--one-rater"]) == 0
    folder = tmp_path / "run" / "rounds" / "01"
    plays, watch = ({row["prompt"] for row in read_jsonl(folder / f"{name}.jsonl")} for name in ("play", "watch"))
    assert len(watch) == 2
    assert not plays & watch
    assert plays | watch == set((tmp_path / "train.txt").read_text().splitlines())
    told = read_json(folder / "train" / "config.json")
    assert (told["hold"], told["heldout_prompts"]) == ("similarity,tempo,genre,diversity", str(folder / "watch.jsonl"))
    manifest = read_adapter(folder / "train" / "adapter").manifest
    assert manifest.reward_sha256
    assert {"human", "similarity"} <= manifest.objective["weights"].keys()
    assert read_json(folder / "stages" / "verdict.json")["why"]


def test_a_reward_that_its_gates_refuse_ends_the_round_and_the_next_one_collects_more_votes(files, policy_dir, tmp_path, capfd):
    """--strict: the first call says so, by its exit code too; the next one asks about new clips, unless the owner takes the reward."""
    (tmp_path / "train.txt").write_text("".join(f"{mood} {genre}\n" for mood in ("sad", "calm") for genre in ("folk", "rock", "jazz")))
    out = tmp_path / "run"
    argv = arguments(files, policy_dir, out)
    argv[argv.index("--prompts") + 1] = str(tmp_path / "train.txt")
    argv[argv.index("--method") + 1] = "ppo"
    argv[argv.index("--train") + 1] = "--steps 0"
    first = out / "rounds" / "01"
    assert cli.main([*argv, "--reward-args=--one-rater --strict"]) == 1
    said = capfd.readouterr().err.splitlines()[-1]
    assert "error: got round 1's reward model, by 6 votes: accuracy, lower end of its interval" in said
    assert "--rounds 2 or more" in said
    assert "--reward-args without --strict" in said
    told = "\n".join(status(out))
    assert "Its reward model did not pass its gates: accuracy, lower end of its interval" in told
    assert "--rounds 2 or more" in told
    mine = read_json(out / "loop.json")
    write_json(out / "loop.json", mine | {"reward": "--one-rater  --strict"})  # the same words
    assert "\n".join(status(out)) == told
    write_json(out / "loop.json", mine | {"reward": "--one-rater --strict --trunk auto"})  # of a call that was killed while it trained
    other = "\n".join(status(out))
    assert "now: training the reward model" in other
    assert "--rounds 2 or more" not in other
    assert "by --reward-args='--one-rater --strict' its reward model did not pass its gates: accuracy, lower end of its interval" in other
    assert "Giving these again ends the round" in other
    write_json(out / "loop.json", mine)
    kept = {path: path.read_bytes() for name in ("snapshot", "reward", "samples") for path in (first / name).glob("*.json*")}

    raters = argv[argv.index("--raters") :]
    assert cli.main(["loop", "--out", str(out), "--rounds", "2", *raters]) == 1  # round 1 is over, and round 2 has its own reward refused
    verdict = stamp(first, "verdict")
    assert (verdict["promoted"], verdict["decided"]) == (False, 0)
    assert verdict["why"].startswith("the reward model did not pass its gates: accuracy, lower end")
    assert Loop(settings({"out": out}), Collecting()).champion()["round"] == 0
    assert {path: path.read_bytes() for path in kept} == kept
    before, after = (
        {row["vote_id"] for row in read_jsonl(out / "rounds" / number / "snapshot" / "votes.jsonl")} for number in ("01", "02")
    )
    assert before < after
    assert len(after) == 2 * len(before) == 12

    # The owner's word: without --strict the same snapshot's reward is trained, told, and learnt from.
    mine = Loop(settings({"out": out, "reward": "--one-rater"}), Collecting()).round(2)
    assert [stage.name for stage in mine.stages()][3:5] == ["reward", "train"]
    write_json(mine.folder / "stages" / "reward.json", {"seconds": 0.0, **mine.reward()})
    assert not all(gate["passed"] for gate in stamp(mine.folder, "reward")["gates"])
    strict = Loop(settings({"out": out}), Collecting()).round(2)
    assert "train" in [stage.name for stage in strict.stages()]  # what was taken stays taken
    told = "\n".join(status(out))
    assert "Round 1: the champion stays: the reward model did not pass its gates" in told
    assert "Its reward model" not in told


def test_votes_that_teach_nothing_end_the_round_and_the_next_one_collects_more(files, policy_dir, tmp_path, capfd):
    """Of one rater, say: they are frozen, so that the same training would be refused for ever. Another one's come with the next round."""
    out = tmp_path / "run"
    argv = arguments(files, policy_dir, out)
    argv[argv.index("--train") + 1] = argv[argv.index("--train") + 1].replace(" --one-rater", "")
    folder = out / "rounds" / "01"
    assert cli.main(argv) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert "error: got round 1's votes: votes of one rater alone" in said
    assert "expected at least two raters" in said
    assert "call again with --rounds 2 or more" in said
    assert "other --train-args are tried on the same votes" in said
    told = "\n".join(status(out))
    assert "Nothing can be learnt from its votes: votes of one rater alone" in told
    assert "To go on, call again with --rounds 2 or more" in told
    mine = Loop(settings({"out": out, "train": read_json(out / "loop.json")["train"] + " --one-rater"}), Collecting()).round(1)
    assert [stage.name for stage in mine.stages()][3:] == ["train", "ab_samples", "ab_votes", "verdict"]
    kept = {path: path.read_bytes() for name in ("snapshot", "samples") for path in (folder / name).glob("*.json*")}

    (tmp_path / "other.py").write_text(RATER.replace("json.load(open(accounts))", "json.load(open(accounts))[::-1]"))
    raters = f"python {tmp_path / 'other.py'} {{url}} {{campaign}} {{accounts}} 1000"
    assert cli.main(["loop", "--out", str(out), "--rounds", "2", "--raters", raters, "--accounts", "3"]) == 0
    assert stamp(folder, "verdict")["why"].startswith("nothing can be learnt from the votes: votes of one rater alone")
    assert not stamp(folder, "verdict")["promoted"]
    assert {path: path.read_bytes() for path in kept} == kept
    assert stamp(out / "rounds" / "02", "snapshot")["n_raters"] == 2
    assert stamp(out / "rounds" / "02", "snapshot")["n_votes"] == 8
    assert stamp(out / "rounds" / "02", "verdict")["why"]
    assert "Round 1: the champion stays: nothing can be learnt from the votes" in "\n".join(status(out))


TIES = [(pair, rater, "tie", {}) for pair in range(8) for rater in ("ada", "bo")]
FOUR = [(pair, rater, "x", {}) for pair in range(8) for rater in ("ada", "bo")]


@pytest.mark.parametrize(
    ("method", "votes", "said"),
    [
        ("sft", TIES, "8 pairs, all of them ties; expected votes for a side"),
        ("dpo", [(*row[:2], "both_bad", {}) for row in TIES], "with 16 votes but no pair that is ordered by them"),
        ("ppo", TIES, "16 votes that order, all of them ties"),
        ("ppo", FOUR, "votes on 4 prompts, those that share an artist or a clip taken as one; expected at least 5"),
        ("ppo", [(*row[:3], {"gold": "x"}) for row in FOUR], r"without a usable vote \(16 on gold questions"),
    ],
)
def test_a_frozen_snapshot_that_teaches_nothing_holds_no_round_up(method, votes, said, files, policy_dir, tmp_path):
    names = {"prompts": files / "train.txt", "heldout": files / "heldout.txt"}
    cfg = settings({**names, "policy": policy_dir, "out": tmp_path / "run", "method": method})
    made = Loop(cfg, Collecting()).round(1)
    write_snapshot(made.folder / "snapshot", votes, 8, base=made.loop.policy.sha256, card=made.loop.policy.codec.card, n_q=4)
    for name in ("samples", "votes", "snapshot"):
        write_json(made.folder / "stages" / f"{name}.json", {"seconds": 0.0, "n_votes": len(votes)})
    with pytest.raises(NothingToLearnError, match=rf"got round 1's votes: .*{said}.*remedy: call again with --rounds 2 or more"):
        made.reward() if made.method.by_reward else made.train()
    assert [stage.name for stage in made.stages()] == ["samples", "votes", "snapshot", "verdict"]
    write_json(made.loop.out / "champion.json", made.loop._first_champion())
    assert made.verdict()["why"].startswith("nothing can be learnt from the votes: ")


def test_a_round_of_which_no_vote_counts_ends_unless_some_count_by_the_next_call(played, tmp_path):
    out = tmp_path / "loop"
    shutil.copytree(played, out)
    folder = out / "rounds" / "01"
    for name in ("snapshot", "train", "ab_samples", "ab_votes", "verdict"):
        (folder / "stages" / f"{name}.json").unlink()
    shutil.rmtree(folder / "snapshot")
    write_json(out / "champion.json", read_json(out / "champion.json").get("before") or read_json(out / "champion.json"))
    loop = Loop(settings({"out": out}), Collecting())

    def let(status: str) -> None:
        with sqlite3.connect(out / "encore.db") as connection:
            connection.execute("update rater set status = ?", (status,))
        connection.close()

    let("blocked")
    with pytest.raises(NothingToLearnError, match=r"got round 1's votes: campaign 'loop' with 4 votes, 4 of them excluded .*--rounds 2"):
        loop.run(1)
    assert "Nothing can be learnt from its votes: campaign 'loop' with 4 votes" in "\n".join(status(out))
    let("active")
    made = loop.round(1)
    made.look_again()
    assert [stage.name for stage in made.stages()][2:4] == ["snapshot", "train"]
    assert made.snapshot()["n_votes"] == 4
    shutil.rmtree(folder / "snapshot")
    let("blocked")
    with pytest.raises(NothingToLearnError, match="round 1 goes on with them"):
        loop.run(1)
    loop.run(1)
    assert stamp(folder, "verdict")["why"].startswith("nothing can be learnt from the votes: campaign 'loop' with 4 votes")


def test_what_an_earlier_version_noted_of_a_refused_reward_is_read(played, tmp_path):
    shutil.copytree(played, tmp_path / "loop")
    made = Loop(settings({"out": tmp_path / "loop"}), Collecting()).round(2)
    write_json(made.folder / "refused.json", {"reward_args": "", "missed": "accuracy 0.4", "gates": []})
    assert made.refused_again
    assert "--rounds 3 or more" in made.after_refusal
    assert "--reward-args without --strict" in made.after_refusal


def test_a_reward_training_that_breaks_is_not_taken_for_one_that_its_gates_refused(files, policy_dir, tmp_path, capfd):
    out = tmp_path / "run"
    argv = arguments(files, policy_dir, out)
    argv[argv.index("--method") + 1] = "ppo"
    figures = out / "rounds" / "01" / "reward" / "figures.json"
    write_json(figures, {"gates": [{"name": "accuracy", "value": 0.4, "asked": "above .5", "passed": False}]})  # of a start before
    write_json(figures.parent / "config.json", {"strict": True})
    assert cli.main([*argv, "--reward-args=--one-rater --strict --folds 2"]) == 2
    assert "exit code 2 of" in capfd.readouterr().err
    assert "reward" in [stage.name for stage in Loop(settings({"out": out}), Collecting()).round(1).stages()]


def test_ppo_needs_prompts_to_watch_and_others_to_play(files, policy_dir, tmp_path):
    few = tmp_path / "few.txt"
    given = {"prompts": few, "heldout": files / "heldout.txt", "policy": policy_dir, "out": tmp_path / "run"}
    for n, text in enumerate(("sad piano\n", "sad piano\ncalm folk\n"), start=1):
        few.write_text(text)
        with pytest.raises(UserError, match=rf"got {n} prompt\(s\) in"):
            Loop(settings(given), Collecting())
        Loop(settings(given | {"train": "--heldout-prompts=watch.txt"}), Collecting())
    few.write_text("sad piano\ncalm folk\ndark rock\n")
    for watched, match in (("Fast House", "1 held-out prompts that PPO watches"), ("Calm folk", "1 prompts that are played, in the file")):
        (tmp_path / "watch.txt").write_text(f"slow waltz\n{watched}\n")
        with pytest.raises(UserError, match=match):
            Loop(
                settings(given | {"min_decided": 4, "min_prompts": 2, "train": f"--heldout-prompts {tmp_path / 'watch.txt'}"}), Collecting()
            ).run(0)
    plays, flags = Loop(settings(given), Collecting()).round(1).prompts_to_learn_from()
    assert plays is not None
    played, watched = ({row["prompt"] for row in read_jsonl(file)} for file in (plays, flags[1]))
    assert (len(played), len(watched), played & watched) == (1, 2, set())


def test_held_out_votes_are_never_trained_on(played):
    folder = played / "rounds" / "01"
    trained = {json.loads(line)["prompt"] for line in (folder / "snapshot" / "votes.jsonl").read_text().splitlines()}
    compared = {json.loads(line)["prompt"] for line in (folder / "ab_snapshot" / "votes.jsonl").read_text().splitlines()}
    assert trained == {"sad piano", "calm folk", "dark rock", "happy jazz"}
    assert compared == {"slow ambient", "fast house"}


def test_a_prompt_that_was_rated_or_is_only_written_otherwise_cannot_be_held_out(played, tmp_path):
    """Files may change between rounds, and a snapshot holds the votes of all of them; "Calm  Folk" is "calm folk" to the text encoder."""
    shutil.copytree(played, tmp_path / "loop")
    (tmp_path / "train.txt").write_text("slow waltz\ndark rock\n")
    (tmp_path / "heldout.txt").write_text("fast house\nCalm  Folk\n")
    files = {name: str(tmp_path / f"{kind}.txt") for name, kind in (("prompts", "train"), ("heldout", "heldout"))}
    write_json(tmp_path / "loop" / "loop.json", read_json(played / "loop.json") | files)
    loop = Loop(settings({"out": tmp_path / "loop"}), Collecting())
    with pytest.raises(UserError, match=r"got 1 held-out prompts that were rated in a round, .*'Calm  Folk'"):
        loop.run(2)
    (tmp_path / "train.txt").write_text("calm folk\n")
    with pytest.raises(UserError, match="got 1 held-out prompts that are trained on"):
        Loop(settings({"out": tmp_path / "loop"}), Collecting())


def test_a_second_call_changes_nothing_and_needs_no_settings(played, capsys):
    before = {p: p.read_bytes() for p in sorted(played.rglob("*.json"))}
    assert cli.main(["loop", "--out", str(played), "--rounds", "1"]) == 0
    assert {p: p.read_bytes() for p in sorted(played.rglob("*.json"))} == before
    assert cli.main(["loop", "status", "--out", str(played)]) == 0
    assert "Round 1: " in capsys.readouterr().out


def test_a_verdict_goes_by_the_names_of_the_comparison(tmp_path):
    """The base's clip may be known to the database under the name of an earlier round."""
    clips = [{"prompt_id": "p", "sha256": sha, "system": "round-01"} for sha in ("a", "b")]
    vote = {"vote_id": 1, "prompt_id": "p", "rater": "r", "choice": "y", "clip_x": "a", "clip_y": "b", "shown_first": "x"}
    for name, rows in (("clips", clips), ("votes", [vote | {"system_x": "champion-01", "system_y": "challenger-01"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [outcome.won for outcome in read_outcomes(tmp_path, "challenger-01")] == [1.0]


def test_a_verdict_goes_by_the_rounds_own_clips_whatever_the_database_calls_them(tmp_path):
    """A loop that begins with the challenger of an earlier one has it as champion, and a database may know its clips by that name."""
    clips = [{"prompt_id": prompt, "sha256": sha, "system": "challenger-01"} for prompt in "pq" for sha in "ab"]
    vote = {"rater": "r", "clip_x": "a", "clip_y": "b", "shown_first": "x", "system_x": "challenger-01", "system_y": "challenger-01"}
    votes = [vote | {"vote_id": i, "prompt_id": prompt, "choice": "y"} for i, prompt in enumerate("pq")]
    for name, rows in (("clips", clips), ("votes", votes)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ours = {("p", "b"), ("q", "a")}  # what it plays for one prompt the champion may play for another
    assert [outcome.won for outcome in read_outcomes(tmp_path, "challenger-01", ours)] == [1.0, 0.0]
    for wrong in (set(), {("p", "a"), ("p", "b")}):
        with pytest.raises(UserError, match="vote 0 on clips a and b; expected one of them of 'challenger-01'"):
            read_outcomes(tmp_path, "challenger-01", wrong)
    with pytest.raises(UserError, match="vote 0 on clips of 'challenger-01' and 'challenger-01'"):  # by names alone nobody could tell
        read_outcomes(tmp_path, "challenger-01")


def promoted_round(played: Path, tmp_path: Path, won: int, lost: int, known: str = "{}-01") -> Round:
    """The played round before its verdict, with so many votes for the challenger and against; `known`: what the snapshot calls them."""
    out = tmp_path / "loop"
    shutil.copytree(played, out)
    folder = out / "rounds" / "01"
    (folder / "stages" / "verdict.json").unlink()
    write_json(out / "champion.json", {"round": 0, "adapter": None, "adapter_sha256": None, "policy_sha256": "p", "votes": None})
    write_json(folder / "stages" / "ab_votes.json", {"seconds": 0, "votes": won + lost, "wanted": won + lost})
    clips = [{"prompt_id": f"p{i}", "sha256": name, "system": known.format(name)} for i in range(10) for name in ("champion", "challenger")]
    (folder / "heldout" / "challenger-01" / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in clips[1::2]))
    votes = [
        {"vote_id": i, "prompt_id": f"p{i % 10}", "rater": f"r{i % 3}", "choice": "x" if i < won else "y", "clip_x": "challenger"}
        | {"clip_y": "champion", "excluded_reason": None, "shown_first": "xy"[i % 2]}
        for i in range(won + lost)
    ]
    for name, rows in (("clips", clips), ("votes", votes)):
        (folder / "ab_snapshot" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = settings({"out": out})
    return Round(Loop(cfg, Collecting()), 1, folder)


def test_a_clear_winner_is_promoted_with_its_lineage_and_a_narrow_one_is_not(played, tmp_path):
    made = promoted_round(played, tmp_path / "clear", won=36, lost=4)
    told = made.verdict()
    champion = made.loop.champion()
    assert told["promoted"]
    assert champion["round"] == 1
    assert champion["adapter_sha256"] == read_adapter(made.challenger).manifest.adapter_sha256
    assert champion["parents"]["snapshot_sha256"] == read_json(made.folder / "snapshot" / "snapshot.json")["sha256"]
    assert champion["votes"]["win_rate"] == pytest.approx(0.9)
    assert champion["before"]["round"] == 0
    # Killed between the champion's file and the stage's stamp: the next call finds it done.
    assert made.verdict() == told
    assert made.loop.champion() == champion
    # An older snapshot of a loop that began with another's challenger, whose name its own bears too.
    again = promoted_round(played, tmp_path / "again", won=36, lost=4, known="challenger-01")
    assert again.verdict()["win_rate"] == told["win_rate"]
    # The next round plays the new champion, and refuses it on another base.
    narrow = promoted_round(played, tmp_path / "narrow", won=22, lost=18)
    assert not narrow.verdict()["promoted"]
    assert narrow.loop.champion()["round"] == 0


def test_a_verdict_without_the_challengers_manifest_says_how_to_have_it_again(played, tmp_path):
    out = tmp_path / "loop"
    shutil.copytree(played, out)
    folder = out / "rounds" / "01"
    manifest, before = folder / "heldout" / "challenger-01" / "manifest.jsonl", stamp(folder, "verdict")
    (folder / "stages" / "verdict.json").unlink()
    write_json(out / "champion.json", read_json(out / "champion.json").get("before") or read_json(out / "champion.json"))
    clips = manifest.read_bytes()
    manifest.unlink()
    loop = Loop(settings({"out": out}), Collecting())
    with pytest.raises(UserError, match=rf"got no {manifest}; expected the clips .*; remedy: restore it, or remove \S+/ab_samples.json"):
        loop.run(1)
    (folder / "stages" / "ab_samples.json").unlink()
    loop.run(1)
    assert manifest.read_bytes() == clips
    changed = ("at", "seconds")
    assert {k: v for k, v in stamp(folder, "verdict").items() if k not in changed} == {k: v for k, v in before.items() if k not in changed}


def test_a_round_plays_the_champion_and_trains_from_the_base(played, tmp_path):
    """What is rated in round 2 is the champion's; what is trained on it begins as the base: without a step of learning it is the base."""
    made = promoted_round(played, tmp_path, won=36, lost=4)
    made.verdict()
    champion = made.loop.champion()
    loop = Loop(settings({"out": made.loop.out, "train": "--one-rater --steps 1 --lr 0 --kl-clips 0 --held-out 0 --r 4"}), Collecting())
    second = loop.round(2)
    assert second.samples() == {"adapter_sha256": champion["adapter_sha256"]}
    clips = [json.loads(line) for line in (second.folder / "samples" / "manifest.jsonl").read_text().splitlines()]
    assert {tuple(clip["adapters"]) for clip in clips} == {(champion["adapter_sha256"],)}
    shutil.copytree(made.folder / "snapshot", second.folder / "snapshot")
    second.train()
    theirs, ours = (read_adapter(path).lora.tensors for path in (made.challenger, second.challenger))
    assert any(tensor.any() for name, tensor in theirs.items() if "lora_B" in name)
    assert not any(tensor.any() for name, tensor in ours.items() if "lora_B" in name)
    assert sum("lora_B" in name for name in ours) == sum("lora_B" in name for name in theirs) > 0


def test_a_champion_or_challenger_that_was_exchanged_on_disk_is_refused(played, tmp_path):
    """A champion may lie anywhere, where somebody trains into its folder: its name would stand beside what another one plays."""
    made = promoted_round(played, tmp_path, won=36, lost=4)
    before = made.loop.champion()
    other = save_mix(tmp_path / "other", [made.challenger], [0.5]).adapter_sha256
    shutil.copytree(made.challenger, tmp_path / "kept")
    shutil.rmtree(made.challenger)
    shutil.copytree(tmp_path / "other", made.challenger)
    trained = stamp(made.folder, "train")["adapter_sha256"]
    with pytest.raises(UserError, match=f"with adapter {other[:12]}; expected adapter {trained[:12]}"):
        made.verdict()
    with pytest.raises(UserError, match="as the loop met it"):
        made.ab_samples()
    assert made.loop.champion() == before
    shutil.rmtree(made.challenger)
    shutil.copytree(tmp_path / "kept", made.challenger)
    assert made.verdict()["promoted"]
    shutil.rmtree(made.challenger)
    shutil.copytree(tmp_path / "other", made.challenger)
    with pytest.raises(UserError, match="as the loop met it"):
        made.loop.round(2).samples()


@pytest.mark.parametrize("record", ["relative to the loop", "an old one, of the place where it was promoted"])
def test_a_promoted_champion_moves_with_the_folder_of_its_loop(record, played, tmp_path):
    made = promoted_round(played, tmp_path, won=36, lost=4)
    made.verdict()
    champion = made.loop.champion()
    assert champion["adapter"] == "rounds/01/train/adapter"
    if record != "relative to the loop":
        write_json(made.loop.out / "champion.json", champion | {"adapter": made.challenger})
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    made.loop.out.rename(moved)
    standing = Loop(settings({"out": moved}), Collecting()).standing()
    assert standing["adapter"] == str(moved / "rounds" / "01" / "train" / "adapter")
    assert f"Champion: {standing['adapter']}, since round 1" in "\n".join(status(moved))


def test_a_moved_loop_says_where_its_clips_are_known_and_goes_on_behind_a_link(files, policy_dir, tmp_path, capfd):
    """The database and frozen snapshots name clips by their place; listeners would be asked about clips that cannot be played."""
    old, new = tmp_path / "old", tmp_path / "shelf" / "new"
    assert cli.main(arguments(files, policy_dir, old, n_votes=2)) == 2
    new.parent.mkdir()
    old.rename(new)
    raters = arguments(files, policy_dir, new)[-4:]
    capfd.readouterr()
    assert cli.main(["loop", "--out", str(new), "--rounds", "1", *raters]) == 2
    said = capfd.readouterr().err
    assert f"error: got {new}, whose clips are known at {old}; expected" in said
    assert f"ln -s {new} {old}" in said
    assert "2 of 4 votes are there" in "\n".join(status(new))
    old.symlink_to(new)
    assert cli.main(["loop", "--out", str(new), "--rounds", "1", *raters]) == 0
    assert stamp(new / "rounds" / "01", "verdict")["n_votes"] == 2


def begun(out: Path, files: Path, **more) -> dict[str, Path | int]:
    """The settings of a loop that was begun in `out`, with nothing played yet."""
    given = {"prompts": files / "train.txt", "heldout": files / "heldout.txt", "min_decided": 4, "min_prompts": 2, "out": out, **more}
    Loop(settings(given), Collecting()).run(0)
    return given


def test_what_a_loop_has_in_its_folder_moves_with_it(files, policy_dir, played, tmp_path, monkeypatch):
    """Prompts, base and first champion, however they were named; those of loops that an earlier version began as well."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("train.txt", "heldout.txt"):
        shutil.copy(files / name, old / name)
    shutil.copytree(policy_dir, old / "policy")
    shutil.copytree(played / "rounds" / "01" / "train" / "adapter", old / "first")
    begun(Path("old"), old, policy=Path("old/policy"), champion=old / "first")
    assert read_json(old / "loop.json")["prompts"] == "old/train.txt"
    write_json(old / "loop.json", read_json(old / "loop.json") | {"prompts": str(old / "train.txt")})  # as it was kept before
    old.rename(new)
    for out in (Path("new"), new):
        loop = Loop(settings({"out": out}), Collecting())
        assert [loop.cfg.prompts, loop.cfg.heldout] == [out / "train.txt", out / "heldout.txt"]
        assert [loop.cfg.policy, loop.cfg.champion] == [out / "policy", out / "first"]
        assert f"Champion: {out / 'first'}" in "\n".join(status(out))
        loop.run(0)
    monkeypatch.chdir("/")
    assert Loop(settings({"out": new, "heldout": new / "heldout.txt"}), Collecting()).round(1).samples()["adapter_sha256"]


def test_what_a_loop_has_elsewhere_may_be_given_anew_with_the_same_content_alone(files, policy_dir, other_policy_dir, played, tmp_path):
    far, near = tmp_path / "far", tmp_path / "near"
    adapter = played / "rounds" / "01" / "train" / "adapter"
    for place in (far, tmp_path / "other"):
        place.mkdir()
        for name in ("train.txt", "heldout.txt"):
            shutil.copy(files / name, place / name)
    shutil.copytree(policy_dir, far / "policy")
    shutil.copytree(adapter, far / "first")
    out = tmp_path / "run"
    begun(out, far, policy=far / "policy", champion=far / "first")
    far.rename(near)
    kept = (out / "loop.json").read_bytes()
    with pytest.raises(UserError, match=rf"got no {far / 'train.txt'}; expected the prompts .*remedy: put .*--prompts PLACE"):
        Loop(settings({"out": out}), Collecting())
    with pytest.raises(UserError, match=rf"got no {far / 'train.txt'}"):
        status(out)
    (tmp_path / "other" / "train.txt").write_text("slow waltz\n")
    (tmp_path / "other" / "heldout.txt").write_text("calm waltz\n")
    save_mix(tmp_path / "other" / "first", [adapter], [0.5])
    others = {"prompts": tmp_path / "other" / "train.txt", "heldout": tmp_path / "other" / "heldout.txt"}
    others |= {"policy": other_policy_dir, "champion": tmp_path / "other" / "first"}
    for name, place in others.items():
        with pytest.raises(UserError, match=rf"got --{name} {place} of sha256 \w{{12}}; expected \w{{12}}, as of what the loop"):
            settings({"out": out, name: place})
        with pytest.raises(UserError, match=rf"no (file )?{near / 'none'}|{near / 'none'} without"):
            settings({"out": out, name: near / "none"})
    assert (out / "loop.json").read_bytes() == kept
    texts = {"prompts": near / "train.txt", "heldout": near / "heldout.txt"}
    for name, left in (("policy", {"champion": near / "first"}), ("champion", {"policy": near / "policy"})):
        with pytest.raises(UserError, match=rf"got no {far / ('policy' if name == 'policy' else 'first')}.*--{name} PLACE"):
            Loop(settings({"out": out, **texts, **left}), Collecting()).run(1)
        (out / "loop.json").write_bytes(kept)
    again = {**texts, "policy": near / "policy", "champion": near / "first"}
    Loop(settings({"out": out, **again}), Collecting()).run(0)
    assert {name: Path(read_json(out / "loop.json")[name]) for name in again} == again
    assert Loop(settings({"out": out}), Collecting()).round(1).samples()["adapter_sha256"] == read_adapter(adapter).manifest.adapter_sha256
    (near / "train.txt").write_text("sad piano\ncalm folk\nslow waltz\n")  # in its place it may change from round to round
    Loop(settings({"out": out}), Collecting()).run(0)
    with pytest.raises(UserError, match="of sha256"):
        settings({"out": out, "prompts": files / "train.txt"})


def test_prompts_of_a_loop_that_noted_no_content_are_known_by_the_file_alone(files, policy_dir, tmp_path):
    """Of an earlier version. Where they are gone nobody knows whether others are the same."""
    shutil.copytree(files, tmp_path / "far")
    out = tmp_path / "run"
    begun(out, tmp_path / "far", policy=policy_dir)
    (out / "contents.json").unlink()
    assert settings({"out": out, "prompts": files / "train.txt"}).prompts == files / "train.txt"
    (tmp_path / "far" / "train.txt").unlink()
    with pytest.raises(UserError, match=rf"nothing that tells .* put the prompts back at {tmp_path / 'far' / 'train.txt'}"):
        settings({"out": out, "prompts": files / "train.txt"})


def test_a_moved_loop_makes_no_second_database_at_its_old_place(files, policy_dir, tmp_path, capfd):
    """An empty one would be taken for the loop's, and the next snapshot would lack all earlier votes."""
    old, new = tmp_path / "old", tmp_path / "new"
    db = f"sqlite:///{old / 'encore.db'}"
    assert cli.main([*arguments(files, policy_dir, old, n_votes=2), "--db", db]) == 2
    old.rename(new)
    again = ["loop", "--out", str(new), "--rounds", "1", *arguments(files, policy_dir, new)[-4:]]
    for call in (again, ["loop", "status", "--out", str(new)]):
        capfd.readouterr()
        assert cli.main(call) == 2
        said = capfd.readouterr().err
        assert f"error: got no database at {old / 'encore.db'}; expected" in said
        assert f"ln -s {new} {old}" in said
        assert not old.exists()
    open_store(db).close()  # as an earlier version did
    assert cli.main(again) == 2
    said = capfd.readouterr().err
    assert f"error: got {db}, which does not know the clips of round 1; expected" in said
    assert stamp(new / "rounds" / "01", "samples")
    shutil.rmtree(old)
    old.symlink_to(new)
    assert cli.main(again) == 0
    assert stamp(new / "rounds" / "01", "verdict")["n_votes"] == 2


def test_a_database_that_is_sought_from_another_folder_is_not_made_there(played, tmp_path, monkeypatch):
    shutil.copytree(played, tmp_path / "run")
    write_json(tmp_path / "run" / "loop.json", read_json(played / "loop.json") | {"db": "sqlite:///run/encore.db"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loop = Loop(settings({"out": tmp_path / "run"}), Collecting())
    with pytest.raises(UserError, match=r"no database at run/encore.db.*call from the folder"):
        loop.run(2)
    assert not list(Path().iterdir())
    monkeypatch.chdir(tmp_path)
    loop.check_database()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("/x.wav", r"whose clips are known at /x\.wav; .* bring the clips back there, or put them up again"),
        ("/pub/some/of/our/clips/x.wav", r"known at /pub/some/of/our/clips/x\.wav; .* bring the clips back there, or put them up again"),
        ("memory://clips/x.wav", r"known at memory://clips/x\.wav; .* bring the clips back there, or put them up again"),
        ("file:///old%20place/loop/{tail}", r"known at /old place/loop; .*ln -s \S+/loop '/old place/loop'"),
        ("/old/loop/{tail}", r"known at /old/loop; .*ln -s \S+/loop /old/loop"),
    ],
)
def test_a_link_is_advised_only_where_it_would_help(address, said, played, tmp_path):
    """Clips may have been put up from another place than the loop's folder since."""
    shutil.copytree(played, tmp_path / "loop")
    first = read_jsonl(tmp_path / "loop" / "rounds" / "01" / "samples" / "manifest.jsonl")[0]
    with sqlite3.connect(tmp_path / "loop" / "encore.db") as connection:
        uri = address.format(tail=f"rounds/01/samples/{first['file']}")
        connection.execute("update clip set uri = ? where sha256 = ?", (uri, first["sha256"]))
    connection.close()
    with pytest.raises(UserError, match=said):
        Loop(settings({"out": tmp_path / "loop"}), Collecting()).run(2)


def test_the_rule_promotes_half_of_equal_rivals_in_few_of_a_hundred_campaigns():
    rng = np.random.default_rng(0)
    promoted = 0
    for trial in range(100):
        taste = rng.normal(0, 0.8, 20)  # prompts favour one or the other, raters have leanings
        lean = rng.normal(0, 0.4, 8)
        votes = [
            Outcome(float(rng.random() < 1 / (1 + np.exp(-taste[p] - lean[r]))), f"p{p}", f"r{r}") for p in range(20) for r in range(8)
        ]
        promoted += decide(votes, 20, trial)[0]
    assert promoted <= 6


@pytest.mark.parametrize("n_prompts", [1, 3, 6])
def test_equal_rivals_are_seldom_promoted_on_few_prompts_either(n_prompts):
    rng = np.random.default_rng(0)
    promoted = 0
    for trial in range(100):
        taste = rng.normal(0, 0.8, n_prompts)
        votes = [Outcome(float(rng.random() < 1 / (1 + np.exp(-taste[i % n_prompts]))), f"p{i % n_prompts}", "ada") for i in range(24)]
        promoted += decide(votes, 20, trial, min_prompts=2)[0]
    assert promoted <= 6  # by the bootstrap alone .47 of one prompt, .07 of three
    wins = [Outcome(1.0, f"p{i % n_prompts}", "ada") for i in range(24)]
    told = decide(wins, 20)
    assert told[0] == (n_prompts >= 6)
    assert told[1]["win_rate"] == 1
    assert f"on {n_prompts} prompt(s)" in told[1]["why"] or told[0]


def test_raters_who_always_take_one_side_promote_nobody():
    rng = np.random.default_rng(0)
    promoted = 0
    for trial in range(100):
        shown = [(p, r, bool(rng.random() < 0.5)) for p in range(40) for r in range(2)]  # as the app draws sides
        promoted += decide([Outcome(float(first), f"p{p}", f"r{r}", first) for p, r, first in shown], 20, trial)[0]
    assert promoted <= 5
    told = decide([Outcome(1.0, f"p{i}", "r", True) for i in range(30)] + [Outcome(0.0, f"p{i}", "r", False) for i in range(20)], 20)[1]
    assert (told["first"], told["win_rate_first"]) == (30, 1.0)
    assert (told["second"], told["win_rate_second"]) == (20, 0.0)


@pytest.mark.parametrize(("low", "told"), [(0.50004, "[0.50004, 0.700]"), (0.49996, "[0.49996, 0.700]"), (0.5, "[0.500, 0.700]")])
def test_a_verdict_tells_an_end_of_its_interval_that_is_not_one_half(low, told, monkeypatch):
    monkeypatch.setattr(verdict, "widened", lambda rate: (low, 0.7))
    promoted, figures = decide([Outcome(float(i % 3 > 0), f"p{i}", f"r{i % 2}") for i in range(30)], 20)
    assert told in figures["why"]
    assert promoted == (low > 0.5)


def test_what_both_play_is_not_put_to_ears_and_clips_of_one_seed_meet():
    def rows(*shas: str) -> list[dict[str, str]]:
        return [{"prompt_id": f"p{i // 3}", "sha256": sha} for i, sha in enumerate(shas)]

    champion, challenger = rows("a", "b", "c", "same", "e", "f"), rows("A", "B", "C", "D", "same", "F")
    assert comparisons(champion, challenger, 1) == [{"a": "a", "b": "A"}]
    assert comparisons(champion, challenger, 3) == [*({"a": x, "b": x.upper()} for x in "abc"), {"a": "f", "b": "F"}]
    assert comparisons(champion, champion, 3) == []
    crossed = [rows("a", "b", "c"), rows("b", "d", "a")]  # the same clip by another seed
    for theirs, ours in ([champion, challenger], crossed):
        both = [{row["sha256"] for row in side} for side in (theirs, ours)]
        for pair in comparisons(theirs, ours, 3):
            assert [(pair["a"] in side, pair["b"] in side) for side in both] == [(True, False), (False, True)]
    assert comparisons(*crossed, 3) == []


def test_few_decided_votes_or_ties_alone_promote_nobody():
    wins = [Outcome(1.0, f"p{i}", f"r{i % 3}") for i in range(19)]
    assert not decide(wins, 20)[0]
    assert decide([*wins, wins[0]], 20)[0]
    told = decide([Outcome(0.5, "p", "r")] * 50, 1)
    assert not told[0]
    assert told[1]["ties"] == 50


def test_the_crossed_interval_is_wider_than_one_kind_of_cluster_alone():
    rng = np.random.default_rng(1)
    rater = rng.normal(0, 1, 5)
    values = [rater[r] + rng.normal(0, 0.1) for p in range(30) for r in range(5)]
    prompts, raters = [p for p in range(30) for _ in range(5)], list(range(5)) * 30
    crossed = crossed_bootstrap(values, prompts, raters)
    alone = crossed_bootstrap(values, prompts, ["one"] * 150)
    assert crossed.ci[1] - crossed.ci[0] > 5 * (alone.ci[1] - alone.ci[0])


def test_a_vote_that_came_late_does_not_stand_for_one_that_is_still_listened_for(clips, tmp_path):
    from feedback_app.campaigns import register_campaign

    db = f"sqlite:///{tmp_path / 'e.db'}"
    with open_store(db) as store:
        register_campaign(store, "c", clips, target_votes=1, min_listen_ms=0)
        wanted = store.stats().campaigns[0].votes_wanted
        ada, *others = (store.sign_in(f"r{i}", store.add_rater(f"r{i}")).id for i in range(wanted + 1))
        slow, later = store.next_assignment(ada, lease_s=60), utc_now() + timedelta(seconds=61)
        taken = [store.next_assignment(rater, clock=lambda: later) for rater in others]  # all pairs, ada's too
        receipt = store.submit_vote(ada, slow.assignment_id, "a", idempotency_key="ada-000001", clock=lambda: later)
        assert receipt.excluded_reason == "late"
        assert counted(db, "c") == (0, wanted)
        for rater, offer in zip(others, taken):
            store.submit_vote(rater, offer.assignment_id, "b", idempotency_key=f"rater-{rater:04d}", clock=lambda: later)
    assert counted(db, "c") == (wanted, wanted)


def test_waiting_for_people_counts_their_votes_and_ends_with_the_last(clips, tmp_path, capsys):
    """Somebody else's server: the loop only looks into the database."""
    from feedback_app.campaigns import register_campaign

    db = f"sqlite:///{tmp_path / 'e.db'}"
    with open_store(db) as store:
        register_campaign(store, "c", clips, target_votes=1, min_listen_ms=0)
        code = f"""
from pathlib import Path
from rlhf.collecting import Collecting, collect
print(collect({db!r}, "c", Collecting(poll_s=0.05)), flush=True)
"""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as waiting:
            assert waiting.stdout is not None
            assert "0 of 6 votes are there" in waiting.stdout.readline()
            assert "encore app --db" in waiting.stdout.readline()
            rater = store.sign_in("ada", store.add_rater("ada"))
            assert rater is not None
            for number in range(6):
                offer = store.next_assignment(rater.id)
                assert offer is not None
                store.submit_vote(rater.id, offer.assignment_id, "a", idempotency_key=f"key-{number}")
            rest = waiting.stdout.read()
    assert "6 of 6 votes" in rest
    assert "'votes': 6" in rest


def test_a_person_signs_in_with_the_code_that_the_loop_shows_and_ends_the_wait(clips, tmp_path):
    """--serve: the app is the loop's own, and so is the rater."""
    from feedback_app.campaigns import register_campaign

    db = f"sqlite:///{tmp_path / 'e.db'}"
    with open_store(db) as store:
        register_campaign(store, "c", clips, target_votes=2, min_listen_ms=0)
    code = f"""
from rlhf.collecting import Collecting, admit, collect
admit({db!r}, ["ada"])
print(collect({db!r}, "c", Collecting(serve=True, port=0, poll_s=0.05)), flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as serving:
        assert serving.stdout is not None
        said = [serving.stdout.readline() for _ in range(4)]
        assert "sign in as ada with access code" in said[0]
        assert "0 of 12 votes are there" in said[1]
        assert "1 of the 2 people who are needed can sign in" in said[3]
        with open_store(db) as store:  # a second person, while it waits
            accounts = [{"handle": "ada", "token": said[0].split()[-1]}, {"handle": "bo", "token": store.add_rater("bo")}]
        (tmp_path / "accounts.json").write_text(json.dumps(accounts))
        url = said[2].split()[-1]
        subprocess.run([sys.executable, "-c", RATER, url, "c", tmp_path / "accounts.json", "12"], check=True)
        rest = serving.stdout.read()
    assert "12 of 12 votes" in rest
    assert "'votes': 12, 'wanted': 12" in rest
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url)


def test_more_accounts_for_programs_leave_the_first_as_they_were(tmp_path):
    db, path = f"sqlite:///{tmp_path / 'e.db'}", tmp_path / "accounts.json"
    first = read_json(stages.accounts_file(db, path, ["a"]))
    more = read_json(stages.accounts_file(db, path, ["a", "b"]))
    assert more[:1] == first
    assert [account["handle"] for account in more] == ["a", "b"]
    assert path.stat().st_mode & 0o077 == 0
    with open_store(db) as store:
        assert all(store.sign_in(account["handle"], account["token"]) for account in more)


def test_whoever_is_known_keeps_the_code(tmp_path, capsys):
    db = f"sqlite:///{tmp_path / 'e.db'}"
    admit(db, ["ada"])
    code = capsys.readouterr().out.split()[-1]
    admit(db, ["ada"])
    assert "encore owners code ada --db" in capsys.readouterr().out
    with open_store(db) as store:
        assert store.sign_in("ada", code) is not None


def test_an_app_that_ends_and_a_campaign_that_is_gone_end_the_wait(tmp_path):
    with subprocess.Popen(["false"], text=True) as ended:
        ended.wait()
        with pytest.raises(UserError, match="rating app that ended with exit code 1"):
            RatingApp("http://nowhere", ended).check()
    with pytest.raises(UserError, match="no campaign 'c'"):
        collect(f"sqlite:///{tmp_path / 'e.db'}", "c", Collecting())


def test_a_snapshot_cut_off_before_it_was_recorded_is_made_again(played, tmp_path):
    """Whose votes went out is on record, also after a kill between the folder and the record."""
    shutil.copytree(played, tmp_path / "loop")
    db, folder = tmp_path / "loop" / "encore.db", tmp_path / "loop" / "rounds" / "01"
    with sqlite3.connect(db) as connection:
        connection.execute("delete from snapshot_rater")
        connection.execute("delete from snapshot")
    connection.close()
    with open_store(f"sqlite:///{db}") as store:
        before = read_json(folder / "snapshot" / "snapshot.json")["sha256"]
        assert not is_recorded(store, before)
        assert freeze(f"sqlite:///{db}", "loop", folder, "snapshot")["sha256"] == before
        assert is_recorded(store, before)
    assert not list(folder.glob(".*"))


def test_a_snapshot_that_is_cut_off_twice_is_made_again(clips, tmp_path):
    """Between the new folder and its record, and there again: the first one still lies beside it under its other name."""
    from feedback_app.campaigns import register_campaign

    db = f"sqlite:///{tmp_path / 'e.db'}"
    with open_store(db) as store:
        register_campaign(store, "c", clips, target_votes=1, min_listen_ms=0)
        rater = store.sign_in("ada", store.add_rater("ada"))
        assert rater is not None
        offer = store.next_assignment(rater.id)
        assert offer is not None
        store.submit_vote(rater.id, offer.assignment_id, "a", idempotency_key="key-1234")
        told = freeze(db, "c", tmp_path, "snapshot")
        shutil.copytree(tmp_path / "snapshot", tmp_path / ".cut-snapshot")
        with sqlite3.connect(tmp_path / "e.db") as connection:
            connection.execute("delete from snapshot_rater")
            connection.execute("delete from snapshot")
        connection.close()
        assert freeze(db, "c", tmp_path, "snapshot") == told
        assert is_recorded(store, told["sha256"])
    assert not list(tmp_path.glob(".cut*"))


def test_votes_of_which_none_counts_promote_nobody(played, tmp_path):
    made = promoted_round(played, tmp_path, won=36, lost=4)
    shutil.rmtree(made.folder / "ab_snapshot")
    with open_store(made.loop.db) as store:
        for number in range(3):
            store.block_rater(f"program-{number:02d}")
    told = made.verdict()
    assert not told["promoted"]
    assert told["why"].startswith("no vote counts: campaign 'loop-ab-01' with 2 votes, 2 of them excluded")
    write_json(made.folder / "stages" / "verdict.json", {"seconds": 0, **told})
    assert told["why"] in "\n".join(status(made.loop.out))


def test_clips_that_a_kill_left_unfinished_are_no_hindrance(policy_dir, tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / ".tmp-abc.json").write_text("{")
    how = Settings(n=1, duration_s=0.4)
    assert sample(load_policy(policy_dir), [Prompt("calm folk", "p")], tmp_path / "clips", how, "base").is_file()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "song.wav").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        sample(load_policy(policy_dir), [Prompt("calm folk", "p")], tmp_path / "other", how, "base")


def test_the_command_line_offers_every_method_and_tells_the_rule():
    parser = cli._parser()
    for method in METHODS:
        assert parser.parse_args(["loop", "--method", method]).method == method
    assert "lies\nabove .5" in cli.LOOP
    assert all((ROOT / "rlhf" / f"{method.script}.py").is_file() for method in METHODS.values())


def test_stages_cut_off_at_any_moment_are_done_once_and_in_order(tmp_path, monkeypatch):
    """Cut before a stage's work, after it, and before its stamp: what has a stamp is never done again, and nothing is left out."""
    done: list[str] = []

    class CutError(Exception):
        pass

    def stage(name: str) -> Stage:
        def work() -> dict[str, str]:
            done.append(name)
            return {"made": name}

        return Stage(name, name, 1, work)

    names = ["samples", "votes", "train", "verdict"]
    real = stages.write_json
    for cut in names:

        def dies(path, value, cut=cut):
            if Path(path).stem == cut:
                raise CutError
            real(path, value)

        monkeypatch.setattr(stages, "write_json", dies)
        with pytest.raises(CutError):
            stages.run_stages(tmp_path, [stage(name) for name in names])
    monkeypatch.setattr(stages, "write_json", real)
    stages.run_stages(tmp_path, [stage(name) for name in names])
    assert done == [name for name in names for _ in range(2)]
    assert [stages.stamp(tmp_path, name)["made"] for name in names] == names


def test_a_stages_seconds_are_those_of_all_its_starts_and_unknown_once_one_was_killed(tmp_path, monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(stages.time, "monotonic", lambda: now)

    def starts(name: str, *takes: tuple[float, BaseException | None]) -> None:
        for seconds, cut in takes:

            def work(seconds=seconds, cut=cut) -> None:
                nonlocal now
                now += seconds
                if cut is not None:
                    raise cut

            with nullcontext() if cut is None else pytest.raises(type(cut)):
                stages.run_stages(tmp_path, [Stage(name, name, 30, work)])

    starts("train", (40.0, KeyboardInterrupt()), (20.0, UserError("exit code 1", "0", "mend it")), (5.0, None))
    assert stamp(tmp_path, "train")["seconds"] == 65.0
    assert "65 s" in capsys.readouterr().out
    real = stages.write_json

    def full(path, value):
        if now > 65.0:  # from when the work has begun nothing more is written, as after a kill or on a full disk
            raise OSError(28, "No space left on device")
        real(path, value)

    monkeypatch.setattr(stages, "write_json", full)
    starts("votes", (30.0, RuntimeError("what the stage itself says")))
    monkeypatch.setattr(stages, "write_json", real)
    starts("votes", (10.0, KeyboardInterrupt()), (7.0, None))
    assert stamp(tmp_path, "votes")["seconds"] is None
    assert "unknown time" in capsys.readouterr().out
    assert stages._pace(tmp_path, [Stage(name, name, 30, dict) for name in ("train", "votes")]) == 65.0 / 30


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"heldout": "train.txt"}, "held-out prompts that are trained on, 'calm folk'"),
        ({"prompts": None}, "expected both"),
        ({"method": "rlhf"}, "method 'rlhf'"),
        ({"min_decided": 20}, r"got 4 votes between champion and challenger \(2 held-out prompts\)"),
        ({"min_prompts": 6}, "got 2 held-out prompts, of which nobody could be promoted; expected 6 or more"),
        ({"min_prompts": 1}, "--min-prompts 1; expected 2 or more"),
        ({"clips_per_prompt": 1}, "2 clips and 1 vote"),
        ({"champion": "nowhere"}, "without manifest.json"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, match, files, policy_dir, tmp_path):
    given = {
        "prompts": "train.txt",
        "heldout": "heldout.txt",
        "policy": policy_dir,
        "out": tmp_path / "run",
        "min_decided": 4,
        "min_prompts": 2,
        **change,
    }
    given = {k: files / v if k in ("prompts", "heldout", "champion") and v else v for k, v in given.items()}
    with pytest.raises(UserError, match=match):
        Loop(settings(given), Collecting()).run(0)
    assert not (tmp_path / "run" / "loop.json").exists()  # so that the next call may say it otherwise


def test_a_champion_of_another_base_is_refused_and_settings_are_not_mixed(files, played, other_policy_dir):
    alien = played / "rounds" / "01" / "train" / "adapter"
    given = {
        "prompts": files / "train.txt",
        "heldout": files / "heldout.txt",
        "policy": other_policy_dir,
        "champion": alien,
        "min_decided": 4,
        "min_prompts": 2,
    }
    with pytest.raises(UserError, match="of base"):
        Loop(settings({**given, "out": played.parent / "other"}), Collecting()).run(0)
    with pytest.raises(UserError, match=r"got seed 7 for the loop"):
        settings({"out": played, "seed": 7})
    with pytest.raises(UserError, match=r"without loop.json"):
        status(played.parent / "nothing")


def test_two_loops_on_one_database_do_not_share_campaigns(files, policy_dir, clips, tmp_path):
    """Going back to an older champion in another folder would find the votes of the first loop's verdicts under its own rounds' names."""
    from feedback_app.campaigns import register_campaign

    db = f"sqlite:///{tmp_path / 'e.db'}"
    given = {
        "prompts": files / "train.txt",
        "heldout": files / "heldout.txt",
        "policy": policy_dir,
        "min_decided": 4,
        "min_prompts": 2,
        "db": db,
    }
    Loop(settings({**given, "out": tmp_path / "first"}), Collecting()).run(0)
    with open_store(db) as store:
        for name in ("loop-ab-1", "loop-ab-001", "loop-ab-x", "looped-ab-01"):  # which no round of the campaign "loop" will have
            register_campaign(store, name, clips, target_votes=1, min_listen_ms=0)
    Loop(settings({**given, "out": tmp_path / "second"}), Collecting()).run(0)
    for number, campaign in ((100, "a.b"), (1, "loop")):
        rival = settings({**given, "out": tmp_path / f"third-{number}", "campaign": campaign})
        with open_store(db) as store:
            register_campaign(store, Loop(rival, Collecting()).round(number).ab, clips, target_votes=1, min_listen_ms=0)
        with pytest.raises(UserError, match=rf"campaign '{campaign}-ab-{number:02d}' in .*, which is not this loop's"):
            Loop(rival, Collecting()).run(0)
    Loop(settings({"out": tmp_path / "first"}), Collecting()).run(0)  # they are its own
    Loop(settings({**given, "out": tmp_path / "fourth", "campaign": "again"}), Collecting()).run(0)


@pytest.mark.parametrize(
    ("command", "match"),
    [("no-such-program {url}", "no program"), ("python -c 'raise SystemExit(3)'", "exit code 3"), ("vote {who}", "placeholders of")],
)
def test_a_raters_command_that_fails_is_told(command, match, clips, tmp_path):
    from feedback_app.campaigns import register_campaign

    db = f"sqlite:///{tmp_path / 'e.db'}"
    with open_store(db) as store:
        register_campaign(store, "c", clips, target_votes=1, min_listen_ms=0)
    with pytest.raises(UserError, match=match):
        collect(db, "c", Collecting(raters=command, accounts=tmp_path / "a.json"))


def test_a_vote_on_an_unknown_clip_is_told(tmp_path):
    (tmp_path / "clips.jsonl").write_text('{"prompt_id": "p", "sha256": "a", "system": "champion"}\n')
    row = {"vote_id": 3, "prompt_id": "p", "rater": "r", "choice": "x", "clip_x": "a", "clip_y": "b" * 64}
    (tmp_path / "votes.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="vote 3 on clip bbbbbbbbbbbb"):
        read_outcomes(tmp_path, "challenger")
    (tmp_path / "votes.jsonl").write_text(json.dumps(row | {"clip_y": "a"}) + "\n")
    with pytest.raises(UserError, match="vote 3 on clips of 'champion' and 'champion'"):
        read_outcomes(tmp_path, "challenger")


def test_two_loops_do_not_work_on_one_folder(tmp_path):
    with only_one(tmp_path), pytest.raises(UserError, match="another process"), only_one(tmp_path):
        pass
