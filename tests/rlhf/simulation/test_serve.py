import json
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from rlhf.simulation import serve, taste
from tests.rlhf.simulation.piece import RATE, pad

ROOT = Path(__file__).resolve().parents[3]


def test_a_served_score_is_the_taste_s_own(tmp_path):
    soundfile.write(tmp_path / "a.wav", pad(duration_s=2.0), RATE)
    question = json.dumps({"files": [str(tmp_path / "a.wav")] * 2, "prompts": ["x", "y"]})
    command = [sys.executable, "-m", "rlhf.simulation.serve", "--taste", "space"]
    done = subprocess.run(command, cwd=ROOT, input=f"{question}\n{question}\n", capture_output=True, text=True, timeout=120, check=True)
    lines = [json.loads(line)["scores"] for line in done.stdout.splitlines()]
    assert lines == [[pytest.approx(taste.score_file(tmp_path / "a.wav", "space"))] * 2] * 2


def test_a_constant_hears_nothing():
    assert json.loads(serve.answer('{"files": ["/not/there.wav"]}', "warm", 0.5)) == {"scores": [0.5]}


def test_a_missing_file_ends_the_program_with_a_word(tmp_path):
    command = [sys.executable, "-m", "rlhf.simulation.serve"]
    done = subprocess.run(
        command, cwd=ROOT, input='{"files": ["/not/there.wav"]}\n', capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert "remedy" in done.stderr
