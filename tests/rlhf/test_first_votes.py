"""The guide's commands, as they stand on the page, on a tiny policy: only sizes are exchanged, and the people."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from adapters.library import read_adapter
from base_models.corpus.styles import GENRES, HELD_OUT_MOOD
from base_models.settings import parse
from feedback_app import campaigns
from rlhf import cli, commands, train_ppo
from rlhf.asked import asked_genre, asked_mood
from rlhf.sample_pairs import read_prompts
from rlhf.stages import ROOT, accounts_file

PAGE = ROOT / "docs" / "first-votes.md"
EXAMPLES = ROOT / "examples"
FEWER = {"train.txt": 10, "watch.txt": 4, "heldout.txt": 4}
"""The prompts of each shipped file that the test goes on with."""
SMALLER = {"--duration 4": "--duration 0.6", "--duration 6": "--duration 1", "--n-frames 100": "--n-frames 15", "-n 4": "-n 2"}
EXTRA = {
    "train_sft": ["--steps", "1", "--r", "2", "--kl-clips", "2"],
    "train_dpo": ["--steps", "1", "--r", "2", "--kl-clips", "0"],
    "train_ppo": ["--steps", "1", "--batch-size", "4", "--r", "2"],
}


def blocks() -> list[tuple[str, str, str]]:
    """(language, its note, content) of each fenced block of the page. vote:NAME is a page that is kept open for votes of a campaign."""
    return re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def smaller(line: str) -> list[str]:
    for text, small in SMALLER.items():
        line = line.replace(text, small)
    return shlex.split(line)


def execute(line: str, policy: Path) -> None:
    """One command of the page, in this process: its own arguments, read by its own parser."""
    words = smaller(line)
    policy_of = ["--policy", str(policy)]
    if words[0] == "cp":
        assert words[-1] == "."
        for file in words[1:-1]:
            lines = (ROOT / file).read_text(encoding="utf-8").splitlines(keepends=True)
            Path(Path(file).name).write_text("".join(lines[: FEWER[Path(file).name]]), encoding="utf-8")
    elif words[:2] == ["python", "-m"]:
        assert words[2] == "feedback_app.campaigns"
        assert campaigns.main(words[3:]) == 0
    elif words[0] == "python":
        module = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
        name = module.__name__.split(".")[-1]
        module.main(parse(module.Config, module.PRESETS, [*words[2:], *policy_of, *EXTRA.get(name, [])]))
    else:
        assert words[0] == "encore"
        takes_policy = words[1] in ("sample", "evaluate", "generate")
        assert cli.main([*words[1:], *(policy_of if takes_policy else [])]) == 0


def vote_in_the_browsers_stead(line: str, campaign: str, folder: Path) -> None:
    """The page's server, and two programs in place of its listeners."""
    with sqlite3.connect(folder / "first.db") as votes:  # programs need not listen for three seconds
        votes.execute("update campaign set min_listen_ms = 0")
    accounts = accounts_file("sqlite:///first.db", folder / "accounts.json", ["cy", "dee"])
    assert "--port" not in line  # the page is where the guide says; here it takes a free port
    command = [sys.executable, "-m", "rlhf.cli", *smaller(line)[1:], "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True) as app:
        assert app.stdout is not None
        try:
            lines = iter(app.stdout.readline, "")
            url = next(line.rsplit(" ", 1)[1].strip() for line in lines if "ready at" in line)
            voting = [sys.executable, "-m", "rlhf.simulation.vote", "--url", url, "--campaign", campaign, "--raters", str(accounts)]
            subprocess.run(voting, env=environment, check=True, stdout=subprocess.DEVNULL)
        finally:
            os.killpg(app.pid, 15)


@pytest.mark.timeout(600)
def test_the_guides_commands_lead_from_votes_to_an_adapter(policy_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    ran, votes = 0, train_ppo.PRESETS["votes"]
    for language, note, content in blocks():
        assert language == "sh"
        for line in content.splitlines():
            if note.startswith("vote:"):
                vote_in_the_browsers_stead(line, note.removeprefix("vote:"), tmp_path)
            elif note == "":
                execute(line, policy_dir)
            ran += note != "loop"
    assert ran == 18
    for name in ("sft", "dpo", "ppo"):
        assert read_adapter(Path("runs/first") / name / "adapter").manifest.snapshot_sha256
    assert Path("sad-piano.wav").is_file()
    assert Path("best-of-4.wav").is_file()
    ppo = read_adapter(Path("runs/first/ppo/adapter")).manifest.config
    assert (ppo["heldout_prompts"], ppo["kl_power"], ppo["hold"]) == ("watch.txt", *(votes[key] for key in ("kl_power", "hold")))
    told = capfd.readouterr().out
    assert "unchanged" in told  # the lineage found the snapshot as it was frozen
    assert re.search(r"^\s*ppo\s", told, re.MULTILINE)  # the board


def test_the_loop_of_the_guide_is_one_that_the_command_line_knows():
    lines = next(content for _, note, content in blocks() if note == "loop").splitlines()
    args = cli._parser().parse_args(shlex.split(lines[0])[1:])
    assert args.run is commands.loop
    assert args.serve
    assert cli._parser().parse_args(shlex.split(lines[1])[1:]).action == "status"


def test_every_exchanged_size_stands_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    assert all(size in text for size in SMALLER)


def test_the_example_prompts_are_three_disjoint_files_in_words_that_the_base_knows():
    texts = {name: [p.prompt for p in read_prompts(EXAMPLES / name)] for name in FEWER}
    assert {name: len(found) for name, found in texts.items()} == {"train.txt": 48, "watch.txt": 24, "heldout.txt": 40}
    everything = [text for found in texts.values() for text in found]
    assert len(set(everything)) == len(everything)
    asked = {name: [(asked_genre(text), asked_mood(text)) for text in found] for name, found in texts.items()}
    assert not [pair for found in asked.values() for pair in found if None in pair]
    known = set(HELD_OUT_MOOD.items())
    assert not known & {*asked["train.txt"], *asked["watch.txt"]}
    assert known <= set(asked["heldout.txt"])
    assert sum(pair in known for pair in asked["heldout.txt"]) == len(GENRES)
    watched = [genre for genre, _ in asked["watch.txt"]]
    assert {watched.count(genre) for genre in GENRES} == {2}  # each genre is held by its own clips
