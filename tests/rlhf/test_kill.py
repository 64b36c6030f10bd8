"""`kill -9` at twenty random moments of training and saving: always a whole checkpoint, none lost, and in the end bitwise the same weights.

The runs are children forked from one process that has loaded everything once, so that twenty kills cost no twenty imports; each dies
by a real SIGKILL, from outside at a random moment, or by its own hand in the middle of writing a checkpoint.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.rlhf.ppo_toys import alone

KILLER = '''
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)

root = Path(sys.argv[1])
from base_models import atomic
from base_models.checkpoint import latest_training_state, load_tensors, load_training_state, tensors_sha256
from rlhf.train_ppo import TOY, Config, main
settings = {**TOY, "steps": 24, "batch_size": 4, "n_frames": 4, "minibatches": 1, "epochs": 1}
settings |= {"look_every": 5, "heldout_clips": 2, "listen": 0}
flush = atomic._flush

def child(out, suicide):
    """One process of the run; with `suicide`, it kills itself at that flush of a file, which is in the middle of a save."""
    pid = os.fork()
    if pid:
        return pid
    sys.stdout = sys.stderr = open(os.devnull, "w")
    flushes = iter(range(1, 10**9))
    def fatal(path):
        if next(flushes) == suicide:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(path)
    atomic._flush = fatal
    status = 1
    try:
        main(Config(**{**settings, "out": out, "save_every": 1, "resume": True}))
        status = 0
    finally:
        os._exit(status)

def ended(pid, wait):
    """Whether it was killed; by us where it is still there after `wait` seconds."""
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.001)
    else:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)

def whole(out):
    """Every folder that counts as a checkpoint can be read, and so can an adapter."""
    for folder in (out / "checkpoints").glob("step_*"):
        load_training_state(folder, restore_rng=False)
    if (out / "adapter").exists():
        load_tensors(out / "adapter" / "adapter_model.safetensors")

def weights(out):
    return tensors_sha256(load_tensors(out / "adapter" / "adapter_model.safetensors"))

began = time.monotonic()
assert not ended(child(root / "whole", 0), 200)
undisturbed = time.monotonic() - began
want, draw, kills, during, finals, seen, last = weights(root / "whole"), random.Random(0), 0, 0, [], [], ""
while kills < 20 or not finals:
    out = root / f"cut{len(finals)}"
    by_own_hand = kills < 20 and draw.random() < 0.5
    pid = child(out, draw.randint(1, 30) if by_own_hand else 0)
    wait = 200.0 if by_own_hand or kills >= 20 else draw.uniform(0.2, 0.6) * undisturbed
    killed = ended(pid, wait)
    kills, during = kills + killed, during + (killed and by_own_hand)
    whole(out)
    newest = latest_training_state(out)
    name = newest.name if newest else ""
    assert name >= last, (name, last)
    last = name if killed else ""
    seen.append(name)
    if not killed:
        finals.append(weights(out))
print(json.dumps({"kills": kills, "during_saves": during, "want": want, "finals": finals, "checkpoints": len(set(seen) - {""})}))
'''


def test_killed_twenty_times_ppo_ends_with_the_weights_of_the_undisturbed_run(tmp_path: Path) -> None:
    environment = {**alone(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", KILLER, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] >= 20
    assert told["during_saves"] >= 5
    assert told["checkpoints"] >= 5  # the kills fell at many places of the run
    assert told["finals"] == [told["want"]] * len(told["finals"])
