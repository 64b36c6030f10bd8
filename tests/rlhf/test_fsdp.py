"""FSDP2 on CPUs, directly: a base with an adapter, sharded over two gloo processes, is the same policy and takes the same step.

accelerate cannot be asked: its FSDP2 configuration silently becomes DDP on CPUs. `fully_shard` itself runs there.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

from tests.rlhf.ppo_toys import alone

SHARDED = '''
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers.models.musicgen.modeling_musicgen import MusicgenDecoderLayer
torch.set_num_threads(1)

from base_models.sampling import generate
from tests.rlhf.ppo_toys import conditions, tiny_lm

def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x

def learn(lm, codes, cond, sync):
    """One step of Adam on the mean log-prob of this process's clips; returns log-probs before."""
    mine = [p for p in lm.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(mine, lr=1e-2, eps=1e-5)
    logps = lm.logps(codes, cond)
    (-logps.sum(1).mean()).backward()
    sync(mine)
    optimizer.step()
    return logps.detach()

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
codes = torch.randint(0, 8, (4, 3, 7), generator=torch.Generator().manual_seed(2))
cond = conditions(4)
plain = tiny_lm()
clips = generate(plain, cond, 7, seeds=range(4))
want = learn(plain, codes, cond, lambda mine: None)
after = {name: p.detach().clone() for name, p in plain.named_parameters() if p.requires_grad}
base = {name: p.detach().clone() for name, p in plain.named_parameters() if not p.requires_grad}

lm = tiny_lm()
sharded = [module for module in lm.modules() if isinstance(module, MusicgenDecoderLayer)]
for layer in sharded:
    fully_shard(layer)
local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in sharded[0].parameters())
whole = sum(p.numel() for p in sharded[0].parameters())

def unshard():
    for module in sharded:
        module.unshard()
def reshard():
    for module in sharded:
        module.reshard()

try:  # a sampler that reads weights finds shards
    generate(lm, cond, 7, seeds=range(4))
    refused = False
except (RuntimeError, AssertionError, ValueError) as error:
    refused = True
unshard()
played = generate(lm, cond, 7, seeds=range(4))
reshard()

part = slice(rank * 2, rank * 2 + 2)
got = learn(lm, codes[part], cond.index(part), lambda mine: None)
found = {name: full(p.detach()) for name, p in lm.named_parameters()}
told = {
    "world": world,
    "layers": len(sharded),
    "share": local / whole,
    "refused_when_sharded": refused,
    "same_clips": torch.equal(played.codes, clips.codes),
    "sampled_logps": (played.logps - clips.logps).abs().max().item(),
    "logps": (got - want[part]).abs().max().item(),
    "after": max((found[name] - p).abs().max().item() for name, p in after.items()),
    "base": max((found[name] - p).abs().max().item() for name, p in base.items()),
    "moved": max(p.abs().max().item() for p in [after[n] - q.detach() for n, q in tiny_lm().named_parameters() if n in after]),
}
dist.barrier()
if rank == 0:
    print(json.dumps(told))
dist.destroy_process_group()
'''


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_an_adapted_base_sharded_over_two_processes_scores_samples_and_learns_like_a_whole_one(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    shared = {**alone(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED],
            cwd=tmp_path,
            env={**shared, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers[0][1][-3000:] + answers[1][1][-3000:]
    told = json.loads(answers[0][0].splitlines()[-1])
    assert told["world"] == 2
    assert told["layers"] == 2
    assert told["share"] < 0.6  # each process keeps half of a layer
    assert told["refused_when_sharded"]
    assert told["same_clips"]
    assert told["moved"] > 5e-3
    for name in ("sampled_logps", "logps", "after", "base"):
        assert told[name] < 1e-6, (name, told[name])
