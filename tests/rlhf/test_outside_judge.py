import sys

import pytest
import torch

from base_models.errors import UserError
from base_models.policy import PRETRAINED
from rlhf.outside_judge import OutsideJudge
from rlhf.ppo_task import load_task

ECHO = """
import json, sys, soundfile
for line in sys.stdin:
    asked = json.loads(line)
    peaks = [float(abs(soundfile.read(name)[0]).max()) for name in asked["files"]]
    print(json.dumps({"scores": [None if p == "mute" else x for x, p in zip(peaks, asked["prompts"])]}), flush=True)
"""


class Codec:
    sample_rate = 16_000


class Policy:
    """Plays the first code as a level: 0..9 -> 0..0.9."""

    codec = Codec()

    def decode(self, codes):
        return (codes[:, :1, :1] / 10.0) * torch.ones(1, 1, 800)


@pytest.fixture
def judge():
    judge = OutsideJudge([sys.executable, "-c", ECHO], Policy())
    yield judge
    judge.close()


def test_scores_are_what_the_program_hears_and_null_is_nan(judge):
    codes = torch.tensor([[[1]], [[5]], [[8]]])
    told = judge(codes, ["a", "mute", "b"])
    assert told[[0, 2]].tolist() == pytest.approx([0.1, 0.8], abs=1e-3)
    assert told.isnan().tolist() == [False, True, False]
    assert told.dtype == torch.float32


def test_the_program_is_started_once(judge):
    judge(torch.tensor([[[1]]]), ["a"])
    first = judge._program.pid
    judge(torch.tensor([[[2]]]), ["a"])
    assert judge._program.pid == first


def test_the_program_ends_with_its_judge():
    judge = OutsideJudge([sys.executable, "-c", ECHO], Policy())
    judge(torch.tensor([[[1]]]), ["a"])
    program = judge._program
    del judge
    assert program.poll() == 0


@pytest.mark.parametrize("answer", ["", "no", "[1]", '{"scores": [1, 2]}', '{"scores": ["x"]}', '{"scores": [NaN]}'])
def test_any_other_answer_is_an_error_that_names_the_remedy(answer):
    judge = OutsideJudge([sys.executable, "-c", f"input(); print({answer!r})"], Policy())
    with pytest.raises(UserError, match="mend the program"):
        judge(torch.tensor([[[1]]]), ["a"])
    judge.close()


def test_a_program_that_is_not_there_is_an_error():
    with pytest.raises(UserError, match="score-command"):
        OutsideJudge(["/no/such/program"], Policy())(torch.tensor([[[1]]]), ["a"])
    with pytest.raises(UserError, match="watch-command"):
        OutsideJudge(["/no/such/program"], Policy(), "--watch-command")(torch.tensor([[[1]]]), ["a"])


@pytest.mark.parametrize(("reward", "command"), [(None, None), ("runs/reward", "judge")])
def test_ppo_wants_one_judge(tmp_path, reward, command):
    with pytest.raises(UserError, match="one of them"):
        load_task(tmp_path, reward, tmp_path / "prompts.txt", command=command)


def test_ppo_by_checks_alone_wants_no_judge_and_never_two(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("sad piano\n")
    task = load_task(PRETRAINED, None, prompts, listeners=False)
    assert task.score is None
    assert {"mood", "instrument", "similarity"} <= set(task.checks)
    with pytest.raises(UserError, match="one of them"):
        load_task(PRETRAINED, tmp_path, prompts, command="judge", listeners=False)
