"""FSDP2 on CPUs: PPO whose frozen base is in shards over two gloo processes plays the same clips and takes the same steps.

accelerate cannot be asked: its FSDP2 configuration silently becomes DDP on CPUs. What our code calls, `fully_shard`, runs there.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

from tests.rlhf.ppo_toys import alone

ROUNDS = '''
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)

from adapters.lora import adapter_tensors
from base_models.sampling import generate
from base_models.launch import open_accelerator
from base_models.sharding import gathered, layers, local, share_held
from rlhf.ppo_look import look
from rlhf.ppo_run import Run
from rlhf.ppo_task import toy_task
from tests.rlhf.ppo_toys import config

def rounds(sharding, credit):
    """Two rounds and a look: the run, its clips and what it told. In each update both processes have as many clips of their own, in as
    many passes of the base: a pass that only one of them made would wait for the other for ever."""
    os.environ["ACCELERATE_USE_FSDP"] = str(sharding).lower()
    accelerator = open_accelerator(2, ("fsdp",))
    run = Run(config(Path("run"), credit=credit, batch_size=32, microbatch=4, heldout_clips=1, brake="off"), toy_task(0), accelerator)
    told, codes = [], []
    for _ in range(2):
        rollout, figures = run.judge(run.play())
        codes.append(rollout.codes)
        told.append(figures | run.learn(rollout))
        run.step += 1
    run.step = 0
    told.append(look(run))
    return run, codes, told

answer = {}
for credit in ("score", "codes"):
    (one, played, said), (two, played_too, said_too) = rounds(False, credit), rounds(True, credit)
    first = layers(two.lm)[0]
    frozen = [p for p in first.parameters() if not p.requires_grad]
    before, after = adapter_tensors(one.lm), adapter_tensors(two.lm)
    try:
        generate(two.lm, two.table.index([0, 1]), 5, seeds=[0, 1])
        refused = False
    except (RuntimeError, AssertionError, ValueError):
        refused = True
    with gathered(two.lm):
        base = [p.detach().clone() for p in first.parameters() if not p.requires_grad]
    theirs = [p for p in layers(one.lm)[0].parameters() if not p.requires_grad]
    answer[credit] = {
        "world": two.accelerator.num_processes,
        "held": sum(local(p).numel() for p in frozen) / sum(p.numel() for p in frozen),
        "whole": share_held(one.lm),
        "refused_when_sharded": refused,
        "same_clips": all(torch.equal(a, b) for a, b in zip(played, played_too)),
        "adapter": max((before[name] - after[name]).abs().max().item() for name in before),
        "moved": max(value.abs().max().item() for name, value in after.items() if "lora_B" in name),
        "base": max((a - b).abs().max().item() for a, b in zip(base, theirs)),
        "told": max(abs(a[name] - b[name]) for a, b in zip(said, said_too) for name in a if a[name] == a[name]),
    }
torch.distributed.barrier()
if one.accelerator.is_main_process:
    print(json.dumps(answer))
torch.distributed.destroy_process_group()
'''


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_ppo_with_its_frozen_base_in_shards_plays_and_learns_what_whole_processes_do(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    shared = {**alone(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ROUNDS],
            cwd=tmp_path,
            env={**shared, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers[0][1][-3000:] + answers[1][1][-3000:]
    for told in json.loads(answers[0][0].splitlines()[-1]).values():
        assert told["world"] == 2
        assert told["held"] < 0.6  # each process keeps half of a layer
        assert told["whole"] == 1
        assert told["refused_when_sharded"]
        assert told["same_clips"]
        assert told["moved"] > 1e-3
        for name in ("adapter", "base", "told"):
            assert told[name] < 1e-6, (name, told[name])
