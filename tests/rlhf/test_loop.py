"""Online rounds: real clips, real app, votes over HTTP, a verdict by a stated rule, and no moment at which a kill does harm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from adapters.library import read_adapter
from base_models.checkpoint import read_json, write_json
from base_models.errors import UserError
from db.store import open_store
from rlhf import cli, stages
from rlhf.collecting import Collecting, collect, counted
from rlhf.loop import Loop, Round, settings, status
from rlhf.metrics import crossed_bootstrap
from rlhf.stages import ROOT, Stage, only_one
from rlhf.verdict import Outcome, decide, read_outcomes

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
    sizes = ["--duration", "0.6", "--target-votes", "1", "--ab-votes", "1", "--min-listen-ms", "0", "--min-decided", "2"]
    learns = ["--method", "sft", "--train", "--steps 2 --kl-clips 0 --held-out 0 --lr 0.05 --r 4"]
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
    assert told["n_votes"] == told["decided"] + told["ties"] == 2
    assert told["promoted"] == (told["ci"][0] > 0.5)
    assert champion["round"] == int(told["promoted"])
    if told["promoted"]:
        assert champion["adapter_sha256"] == read_adapter(champion["adapter"]).manifest.adapter_sha256
    assert read_adapter(played / "rounds" / "01" / "train" / "adapter").manifest.snapshot_sha256
    lines = "\n".join(status(played))
    assert told["why"] in lines
    assert "champion: " in lines


def test_held_out_votes_are_never_trained_on(played):
    folder = played / "rounds" / "01"
    trained = {json.loads(line)["prompt"] for line in (folder / "snapshot" / "votes.jsonl").read_text().splitlines()}
    compared = {json.loads(line)["prompt"] for line in (folder / "ab_snapshot" / "votes.jsonl").read_text().splitlines()}
    assert trained == {"sad piano", "calm folk", "dark rock", "happy jazz"}
    assert compared == {"slow ambient", "fast house"}


def test_a_second_call_changes_nothing_and_needs_no_settings(played, capsys):
    before = {p: p.read_bytes() for p in sorted(played.rglob("*.json"))}
    assert cli.main(["loop", "--out", str(played), "--rounds", "1"]) == 0
    assert {p: p.read_bytes() for p in sorted(played.rglob("*.json"))} == before
    assert cli.main(["loop", "status", "--out", str(played)]) == 0
    assert "round 01" in capsys.readouterr().out


def promoted_round(played: Path, tmp_path: Path, won: int, lost: int) -> Round:
    """The played round before its verdict, with so many votes for the challenger and against."""
    out = tmp_path / "loop"
    shutil.copytree(played, out)
    folder = out / "rounds" / "01"
    (folder / "stages" / "verdict.json").unlink()
    write_json(out / "champion.json", {"round": 0, "adapter": None, "adapter_sha256": None, "policy_sha256": "p", "votes": None})
    write_json(folder / "stages" / "ab_votes.json", {"seconds": 0, "votes": won + lost, "wanted": won + lost})
    clips = [{"sha256": name, "system": f"{name}-01"} for name in ("champion", "challenger")]
    votes = [
        {"vote_id": i, "prompt_id": f"p{i % 10}", "rater": f"r{i % 3}", "choice": "x" if i < won else "y", "clip_x": "challenger"}
        | {"clip_y": "champion", "excluded_reason": None}
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
    # The next round plays the new champion, and refuses it on another base.
    narrow = promoted_round(played, tmp_path / "narrow", won=22, lost=18)
    assert not narrow.verdict()["promoted"]
    assert narrow.loop.champion()["round"] == 0


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


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"heldout": "train.txt"}, "held-out prompts that are trained on, 'calm folk'"),
        ({"prompts": None}, "expected both"),
        ({"method": "grpo"}, "method 'grpo'"),
        ({"clips_per_prompt": 1}, "2 clips and 1 vote"),
        ({"champion": "nowhere"}, "without manifest.json"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, match, files, policy_dir, tmp_path):
    given = {"prompts": "train.txt", "heldout": "heldout.txt", "policy": policy_dir, "out": tmp_path / "run", **change}
    given = {k: files / v if k in ("prompts", "heldout", "champion") and v else v for k, v in given.items()}
    with pytest.raises(UserError, match=match):
        Loop(settings(given), Collecting()).run(0)


def test_a_champion_of_another_base_is_refused_and_settings_are_not_mixed(files, played, other_policy_dir):
    alien = played / "rounds" / "01" / "train" / "adapter"
    given = {"prompts": files / "train.txt", "heldout": files / "heldout.txt", "policy": other_policy_dir, "champion": alien}
    with pytest.raises(UserError, match="of base"):
        Loop(settings({**given, "out": played.parent / "other"}), Collecting()).run(0)
    with pytest.raises(UserError, match=r"got seed 7 for the loop"):
        settings({"out": played, "seed": 7})
    with pytest.raises(UserError, match=r"without loop.json"):
        status(played.parent / "nothing")


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
    (tmp_path / "clips.jsonl").write_text('{"sha256": "a", "system": "champion"}\n')
    row = {"vote_id": 3, "prompt_id": "p", "rater": "r", "choice": "x", "clip_x": "a", "clip_y": "b" * 64}
    (tmp_path / "votes.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="vote 3 on clip bbbbbbbbbbbb"):
        read_outcomes(tmp_path, "challenger")


def test_two_loops_do_not_work_on_one_folder(tmp_path):
    with only_one(tmp_path), pytest.raises(UserError, match="another process"), only_one(tmp_path):
        pass
