"""The owner's command line: every command against a real campaign, and wrong input refused in one line with exit code 2."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from db import owners
from db.export import export_snapshot
from db.store import Store, open_store
from feedback_app.owners import main, plain, table

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., str]


@pytest.fixture
def run(demo: object, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(*arguments, code=0) -> what was printed: stdout, or stderr where the code is another."""

    def call(*arguments: str, code: int = 0) -> str:
        assert main([arguments[0], "--db", demo.url, *arguments[1:]]) == code
        said = capsys.readouterr()
        assert (said.out if code else said.err) == ""
        return said.err if code else said.out

    return call


@pytest.fixture
def voted(demo: object) -> Iterator[Store]:
    """ada and bob: each votes four times for the same system, and says so in a comment."""
    with open_store(demo.url) as store:
        for handle in ("ada", "bob"):
            rater = store.sign_in(handle, store.add_rater(handle))
            while offer := store.next_assignment(rater.id):
                side = next(side for side in "ab" if "dpo" in store.audio_file(offer.assignment_id, side, rater.id).uri)
                store.submit_vote(rater.id, offer.assignment_id, side, idempotency_key=offer.assignment_id, comment=f"I am {handle}")
        yield store


def test_a_campaign_is_paused_closed_opened_and_on_record_without_an_actor(run: Run) -> None:
    for command, status in (("pause", "paused"), ("close", "closed"), ("open", "open")):
        assert run(command, "c") == f"campaign c: {status}\n"
        assert json.loads(run("campaigns", "--json"))[0]["status"] == status
    entries = json.loads(run("audit", "--json", "-n", "3"))
    assert [(entry["actor"], entry["action"]) for entry in entries] == [(None, "campaign.status")] * 3
    assert "(command line)" in run("audit")


def test_named_rules_change_and_the_others_stay(run: Run) -> None:
    before = json.loads(run("rules", "c", "--json"))
    changed = json.loads(run("rules", "c", "--json", "--target-votes", "5", "--aspect", "musicality", "--practice", "--gold-rate", ".1"))
    assert changed == before | {"target_votes": 5, "aspects": ["musicality"], "practice": True, "gold_rate": 0.1}
    assert json.loads(run("rules", "c", "--json", "--no-practice", "--no-aspects")) == changed | {"practice": False, "aspects": []}
    assert "target_votes" in run("rules", "c")


def test_an_invitation_from_the_command_line_lets_somebody_in_until_it_is_ended(run: Run, store: Store) -> None:
    link = run("invite", "--campaign", "c", "--people", "2", "--days", "1", "--note", "class", "--url", "https://rate.example/").strip()
    assert link.startswith("https://rate.example/#invite=")
    assert "class" in run("invitations")
    (row,) = json.loads(run("invitations", "--json"))
    assert (row["campaign"], row["max_uses"], row["n_used"]) == ("c", 2, 0)
    assert link.split("=")[1] not in run("invitations") + run("audit")
    run("end-invitation", str(row["id"]))
    assert owners.invitations(store)[0].expires_at <= owners.utc_now()


def test_a_person_gets_a_fresh_code_and_the_old_one_ends(run: Run, store: Store) -> None:
    first, second = (run("code", "mira", "--role", "owner").strip() for _ in range(2))
    assert store.sign_in("mira", first) is None
    assert store.sign_in("mira", second).role == "owner"
    assert "who is no rater" in run("code", "mira", code=2)
    run("block", "mira")
    assert "who is blocked" in run("code", "mira", "--role", "owner", code=2)
    assert store.sign_in("ada", run("code", "ada").strip()).role == "rater"
    told = run("audit")
    assert "rater.code" in told
    assert second not in told
    assert first not in told


def test_the_board_and_the_raters_are_tables_that_tell_what_is_stored(run: Run, voted: Store) -> None:
    board = run("leaderboard", "c").splitlines()
    assert [line.split()[0] for line in board[:3]] == ["system", "secret-dpo", "secret-base"]
    assert "8 votes of 2 raters rank" in board[4]
    assert "two raters agree in 100 % of 4 couples" in board[5]
    told = json.loads(run("leaderboard", "c", "--json"))
    assert [(row["system"], row["wins"]) for row in told["standings"]] == [("secret-dpo", 8), ("secret-base", 0)]
    assert json.loads(run("leaderboard", "c", "--json", "--tag", "split:heldout"))["n_votes"] == 0
    assert "nothing yet" in run("leaderboard", "c", "--aspect", "musicality")
    assert [row["n_votes"] for row in json.loads(run("quality", "c", "--json"))] == [4, 4]
    assert run("quality", "c").splitlines()[1].startswith("ada")
    assert run("raters").splitlines()[2].split()[1:5] == ["bob", "rater", "active", "4"]
    assert run("campaigns").splitlines()[1].split()[:6] == ["c", "open", "4", "0", "8", "12"]


def test_a_person_is_blocked_copied_and_forgotten(run: Run, voted: Store, tmp_path: Path) -> None:
    frozen = export_snapshot(voted, "c", tmp_path / "snapshots", "s")
    run("block", "ada")
    assert "rater_blocked 4" in run("leaderboard", "c")
    run("unblock", "ada")
    file = tmp_path / "ada.json"
    run("copy", "ada", "--out", str(file))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [vote["comment"] for vote in json.loads(file.read_text())["votes"]] == ["I am ada"] * 4
    assert "which exists" in run("copy", "ada", "--out", str(file), code=2)
    assert json.loads(run("copy", "bob"))["rater"]["handle"] == "bob"
    assert "--yes" in run("erase", "ada", code=2)
    assert frozen["sha256"] in run("erase", "ada", "--votes", "remove", "--yes")
    assert "ada" not in run("raters")
    assert "8 votes" not in run("leaderboard", "c")
    assert "no frozen snapshot" not in run("erase", "bob", "--yes")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["pause", "nowhere"], "campaign 'nowhere'"),
        (["rules", "c", "--target-votes", "0"], "target_votes=0"),
        (["rules", "c", "--gold-rate", "nan"], "gold_rate=nan"),
        (["rules", "c", "--aspect", "musicality", "--no-aspects"], "one of them"),
        (["invite", "--people", "0"], "max_uses=0"),
        (["invite", "--days", "1e300"], "--days 1e+300"),
        (["invite", "--days", "nan"], "--days nan"),
        (["invite", "--note", "x" * 501], "the note"),
        (["end-invitation", "7"], "invitation 7"),
        (["block", "nobody"], "handle 'nobody'"),
        (["erase", "nobody", "--yes"], "handle 'nobody'"),
        (["leaderboard", "nowhere"], "campaign 'nowhere'"),
        (["leaderboard", "c", "--tag", "mood:sad"], "tag 'mood:sad'"),
        (["quality", "nowhere"], "campaign 'nowhere'"),
        (["audit", "-n", "0"], "-n 0"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(run: Run, store: Store, arguments: list[str], told: str) -> None:
    before = owners.audit(store)
    said = run(*arguments, code=2)
    assert said.count("\n") == 1
    assert told in said
    assert "expected" in said
    assert "remedy" in said
    assert owners.audit(store) == before


def test_a_database_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["campaigns", "--db", f"sqlite:///{tmp_path / 'slip.db'}"]) == 2
    assert "slip.db" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_name_cannot_paint_the_terminal() -> None:
    assert plain("\x1b[2Jada\u202e") == "\\x1b[2Jada\\u202e"
    assert table(["n", "name"], [[5, "x\ny"], [10, "z"]]) == " n  name\n 5  x\\ny\n10  z"


def test_the_encore_command_hands_its_arguments_on(demo: object) -> None:
    command = [sys.executable, "-m", "rlhf.cli", "owners"]
    listed = subprocess.run([*command, "campaigns", "--db", demo.url, "--json"], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert (listed.returncode, json.loads(listed.stdout)[0]["name"]) == (0, "c")
    refused = subprocess.run([*command, "pause", "nowhere", "--db", demo.url], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert (refused.returncode, refused.stderr[:6]) == (2, "error:")


def test_the_encore_command_starts_the_app_with_what_owners_need(demo: object, tmp_path: Path) -> None:
    options = ["--rater=mira", "--owner=mira", "--data-root=a", "--data-root=b", f"--state-dir={tmp_path}", "--consent-of-everyone"]
    command = [sys.executable, "-m", "rlhf.cli", "app", "--db", demo.url, "--port", "0", *options]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)  # ends, for mira cannot be both
    assert "Sign in as mira" in ended.stdout
    assert "who is no owner" in ended.stderr
    assert ended.returncode == 2
