"""The PPO benchmark: its own side runs, its table says what three roles cost, and TRL is given the very model that we train."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import GenerationConfig

from benchmarks.ppo_trl import FlatPolicy
from rlhf.flat_policy import prompt_id
from rlhf.ppo_task import toy_task

ROOT = Path(__file__).resolve().parents[2]


def test_what_ppo_needs_beside_the_policy_costs_at_most_15_percent_of_its_memory_held_and_at_the_peak(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "ppo_step.py"), "--quick", "--out", str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "figures.json").read_text())
    for side in ("encore", "encore-codes"):
        assert row[f"memory_{side}"]["held"] <= 1.15
        assert row[f"memory_{side}"]["peak"] <= 1.15
        assert row["sides"][side]["cpu_seconds"] > 0


def test_the_rivals_sampler_draws_from_the_distribution_that_it_scores() -> None:
    task = toy_task(0)
    model = FlatPolicy(task.lm, task.table).eval()
    ids = torch.tensor([[prompt_id(row, task.lm.n_q, task.lm.card)] for row in range(3)])
    settings = GenerationConfig(max_new_tokens=task.lm.n_q * 6, temperature=1.0, do_sample=True)
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    with torch.no_grad():
        scored = model(made.sequences).logits[:, :-1]
    torch.testing.assert_close(torch.stack(made.scores, 1).softmax(-1), scored.softmax(-1), atol=1e-5, rtol=1e-4)
