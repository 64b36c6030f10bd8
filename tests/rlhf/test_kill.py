"""`kill -9` at random moments of training and saving: always a whole checkpoint, none lost, and in the end bitwise the same weights.

The runs are children forked from one process that has loaded everything once, so that so many kills cost no imports; each dies by a
real SIGKILL, from outside at a random moment of its training, or by its own hand in the middle of writing a file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rlhf.ppo_toys import alone

KILLER = '''
import dataclasses, json, os, random, signal, sys, time, warnings
from pathlib import Path
import torch
torch.set_num_threads(1)

root, name, least = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
from base_models import atomic
from base_models.checkpoint import latest_training_state, load_tensors, load_training_state, tensors_sha256

held = {"ppo held": "code_5", "rounds held": "even"}.get(name)
if name.startswith("ppo"):
    from rlhf.ppo_run import Run as Trained
    from rlhf.train_ppo import TOY, Config, main
    begins, settings = "play", {**TOY, "steps": 24, "batch_size": 4, "n_frames": 4, "minibatches": 1, "epochs": 1}
    settings |= {"look_every": 5, "heldout_clips": 2, "listen": 0}
    if held:
        from tests.rlhf.ppo_toys import CODES, two_slopes
        settings |= {**CODES, "weights": "human=1,code_5=0.1", "hold": held, "look_every": 1}
        train, main = main, lambda cfg: train(cfg, two_slopes())
elif name == "sft":
    from rlhf.sft_run import Learner as Trained
    from rlhf.train_sft import PRESETS, Config, main
    begins, settings = "learn", {**PRESETS["smoke"], "steps": 24, "kl_clips": 2, "listen": 0, "look_every": 5}
elif name == "grpo":
    from rlhf.flat_grpo import FlatGRPOTrainer as Trained
    from rlhf.train_grpo import PRESETS, Config, main
    begins, settings = "play", {**PRESETS["smoke"], "steps": 14, "batch_size": 8, "microbatch": 4, "n_frames": 4, "listen": 0}
else:
    from rlhf import train_dpo
    from rlhf.train_dpo import PRESETS, Config, main
    settings = {"precision": "fp32", "listen": 0, "kl_clips": 2}
    if name.startswith("rounds"):
        from rlhf.own_pairs import OwnPairs as Trained
        settings = {**PRESETS["smoke_reward"], **settings, "rounds": 14, "round_prompts": 4, "n_frames": 4, "held_out_clips": 4}
        begins, settings = "measure", settings | {"batch_size": 2}
        if held:
            from tests.rlhf.ppo_toys import even_too
            train_dpo.toy_task = even_too
            settings |= {"pairing": "edits", "round_clips": 1, "rounds": 10, "weights": "human=1,even=0.1", "hold": held}
    else:
        from rlhf.flat_dpo import FlatDPOTrainer
        from rlhf.flat_kto import FlatKTOTrainer
        Trained = FlatKTOTrainer if name == "kto" else FlatDPOTrainer
        begins, settings = "training_step", {**PRESETS["smoke"], **settings, "steps": 30, "loss": "kto" if name == "kto" else "sigmoid"}
settings |= {"save_every": 1, "resume": True}
flush = atomic._flush

def child(out, suicide):
    """One process of the run, and a pipe on which it says that it begins to train; with `suicide`, it kills itself at that flush of a
    file from then on, which is in the middle of a save."""
    says, hears = os.pipe()
    pid = os.fork()
    if pid:
        os.close(hears)
        return pid, says
    sys.stdout = sys.stderr = open(root / "told.txt", "w")
    flushes = iter(range(1, 10**9))
    begun = []
    training = getattr(Trained, begins)
    def first(*args, **kwargs):
        if not begun:
            begun.append(1)
            os.write(hears, b"x")
        return training(*args, **kwargs)
    setattr(Trained, begins, first)
    def fatal(path):
        if begun and next(flushes) == suicide:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(path)
    atomic._flush = fatal
    status = 1
    try:
        main(Config(**{**settings, "out": out}))
        status = 0
    except BaseException:
        import traceback
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)

def ended(process, wait):
    """Whether it was killed; by us where it still trains after `wait` seconds of it."""
    pid, says = process
    os.read(says, 1)
    os.close(says)
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.001)
    else:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, (root / "told.txt").read_text()[-3000:]
    return os.WIFSIGNALED(status)

def whole(out):
    """Every folder that counts as a checkpoint can be read, and so can an adapter."""
    for folder in (out / "checkpoints").glob("step_*"):
        step = load_training_state(folder, restore_rng=False)[0]
        if name != "sft" and not name.startswith("ppo"):
            assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == step
    if (out / "adapter").exists():
        load_tensors(out / "adapter" / "adapter_model.safetensors")

def timeless(row):
    return {k: v for k, v in row.items() if "second" not in k and "time" not in k}

def result(out):
    """The weights, what was told on the way to them (a word said twice or left out would show), and what a held part weighed: all along
    by DPO's held.json, at last by PPO's checkpoint."""
    rows = [timeless(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]
    now = []
    if held and name.startswith("ppo"):
        now = [row[f"heldout_reward_{held}_weight"] for row in rows if f"heldout_reward_{held}_weight" in row]
        now += [load_training_state(latest_training_state(out), restore_rng=False)[2]["reward"]["now"][held]]
    elif held:
        now = [weight[held] for weight in json.loads((out / "held.json").read_text()).values()]
    return [tensors_sha256(load_tensors(out / "adapter" / "adapter_model.safetensors")), rows, now]

began = time.monotonic()
process = child(root / "whole", 0)
os.read(process[1], 1)
training = time.monotonic()
assert os.WEXITSTATUS(os.waitpid(process[0], 0)[1]) == 0, (root / "told.txt").read_text()[-3000:]
undisturbed = time.monotonic() - training
want, draw, kills, during, finals, seen, last = result(root / "whole"), random.Random(0), 0, 0, [], [], ""
while kills < least or not finals:
    out = root / f"cut{len(finals)}"
    by_own_hand = kills < least and draw.random() < 0.5
    process = child(out, draw.randint(1, 30) if by_own_hand else 0)
    wait = 200.0 if by_own_hand or kills >= least else draw.uniform(0, 0.5) * undisturbed
    killed = ended(process, wait)
    kills, during = kills + killed, during + (killed and by_own_hand)
    whole(out)
    newest = latest_training_state(out)
    step = newest.name if newest else ""
    assert step >= last, (step, last)
    last = step if killed else ""
    seen.append(step)
    if not killed:
        finals.append(result(out))
odd = [(a, b) for final in finals for a, b in zip(final[1], want[1]) if a != b][:2] + [len(f[1]) for f in finals] + [len(want[1])]
print(json.dumps({
    "kills": kills, "during_saves": during, "checkpoints": len(set(seen) - {""}), "finals": len(finals),
    "same_weights": all(final[0] == want[0] for final in finals), "same_words": all(final[1] == want[1] for final in finals),
    "same_held": all(final[2] == want[2] for final in finals), "held": want[2],
    "odd": odd, "undisturbed": undisturbed, "seconds": time.monotonic() - began,
}))
'''


@pytest.mark.parametrize(
    ("trainer", "kills"),
    [("ppo", 20), ("ppo held", 10), ("dpo", 10), ("rounds", 10), ("rounds held", 5), ("sft", 5), ("grpo", 3), ("kto", 3)],
)
def test_killed_again_and_again_a_run_ends_with_the_weights_and_the_words_of_the_undisturbed_one(
    trainer: str, kills: int, tmp_path: Path
) -> None:
    environment = {**alone(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", KILLER, str(tmp_path), trainer, str(kills)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(told)
    assert told["kills"] >= kills
    assert told["during_saves"] >= kills // 5
    assert told["checkpoints"] >= min(3, kills - 1)  # the kills fell at several places of the run
    assert told["same_weights"], told
    assert told["same_words"], told["odd"]
    assert told["same_held"]
    assert len(set(told["held"])) >= 2 or "held" not in trainer  # the weight of what is held has moved
