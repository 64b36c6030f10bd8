"""`encore loop --serve` and a person in a real Chromium: the round waits, the person rates every pair, the loop goes on by itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from threading import Thread

import pytest
from playwright.sync_api import expect

from base_models.checkpoint import read_json
from rlhf.stages import ROOT
from tests.feedback_app.browsing import PATIENCE_MS, Visit, browser, playwright, visit  # noqa: F401
from tests.rlhf.ppo_toys import alone

COMMAND = "import sys\nfrom rlhf.cli import main\nsys.exit(main(sys.argv[1:]))"


class Said:
    """A running program's lines, as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.lines, self.seen = Queue[str](), [""]
        self.reader = Thread(target=lambda: [self.lines.put(line) for line in process.stdout or ()])
        self.reader.start()

    def until(self, pattern: str) -> str:
        """The first group of the next line that has the pattern."""
        while not (found := re.search(pattern, self.seen[-1])):
            self.seen.append(self.lines.get(timeout=120))
        return found[1]


@pytest.fixture
def serving(policy_dir: Path, tmp_path: Path) -> Iterator[tuple[Path, Said]]:
    """(folder, lines) of a loop that waits for people."""
    (tmp_path / "train.txt").write_text("sad piano\ncalm folk\nslow waltz\n")
    (tmp_path / "heldout.txt").write_text("slow ambient\nfast house\n")
    names = ["--prompts", tmp_path / "train.txt", "--heldout", tmp_path / "heldout.txt", "--policy", policy_dir, "--out", tmp_path / "run"]
    sizes = [
        "--duration",
        "2",
        "--target-votes",
        "1",
        "--ab-votes",
        "1",
        "--min-decided",
        "2",
        "--min-prompts",
        "2",
        "--min-listen-ms",
        "300",
        "--rounds",
        "1",
    ]
    people = ["--serve", "--rater", "ada", "--port", "0", "--poll", "0.1"]
    command = [sys.executable, "-c", COMMAND, "loop", *map(str, names), *sizes, *people]
    environment = {**alone(), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as loop:
        said = Said(loop)
        yield tmp_path / "run", said
        loop.kill()
        said.reader.join()


def test_a_person_rates_every_pair_in_the_browser_and_the_round_goes_on(
    serving: tuple[Path, Said],
    visit: Callable[..., Visit],  # noqa: F811
    tmp_path: Path,
) -> None:
    out, said = serving
    code = said.until(r"sign in as ada with access code (\S+)")
    assert said.until(r"(0 of 3) votes are there")
    ada = visit(said.until(r"the rating app is at (http\S+)"))
    ada.at("signin")
    ada.sign_in("ada", code, then="guide")
    ada.page.get_by_role("button", name="Go on").locator("visible=true").click()
    ada.at("check")
    ada.page.get_by_role("button", name="I cannot do this now").click()
    ada.page.get_by_role("button", name="Go on").locator("visible=true").click()
    choices = []
    for key, choice in (("1", "a"), ("2", "b"), ("3", "tie")):
        ada.at("rate")
        assert ada.prompt() in ("sad piano", "calm folk", "slow waltz")
        ada.listen_by_keyboard("0:02")
        ada.page.screenshot(path=tmp_path / f"{choice}.png")
        ada.page.keyboard.press(key)
        choices.append(choice)
        if len(choices) < 3:
            expect(ada.page.locator(".count")).to_have_text(f"{len(choices)} rated · {3 - len(choices)} to go", timeout=PATIENCE_MS)
            assert not (out / "rounds" / "01" / "stages" / "votes.json").exists()  # it waits for the last one
    assert said.until(r"(3 of 3) votes")
    assert said.until(r"(training the reward model) \.\.\.")
    assert read_json(out / "rounds" / "01" / "stages" / "votes.json")["votes"] == 3
    votes = [json.loads(line) for line in (out / "rounds" / "01" / "snapshot" / "votes.jsonl").read_text().splitlines()]
    assert {vote["prompt"] for vote in votes} == {"sad piano", "calm folk", "slow waltz"}
    assert sorted(vote["choice"] == "tie" for vote in votes) == [False, False, True]
    assert {vote["rater"] for vote in votes} != {""}
    assert ada.errors == []
