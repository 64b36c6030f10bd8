"""A look of a PPO run: the held-out prompts are played, all parts of the reward asked, and the brake judges; the best is remembered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from adapters.lora import adapter_disabled, adapter_tensors, set_adapter_tensors
from base_models.conditions import Conditions
from base_models.sampling import generate
from base_models.sharding import gathered
from rlhf.brake import Look
from rlhf.judges import scores
from rlhf.metrics import diversity
from rlhf.ppo_run import Run
from rlhf.rollout import look_seed, play, sample_seed
from rlhf.round_plan import whole_prompts

LOOK = 0x10C4


def look_is_due(run: Run) -> bool:
    """Whether the held-out prompts should be played now."""
    return run.task.heldout is not None and run.step % run.cfg.look_every == 0


@torch.no_grad()
def look(run: Run) -> dict[str, float]:
    """Play the held-out prompts, with the seeds of every look; ask all parts of the reward; let the brake judge. Returns figures."""
    cfg, heldout = run.cfg, run.task.heldout
    assert heldout is not None
    rows = [row for row in range(len(heldout)) for _ in range(cfg.heldout_clips)]
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    # Every process plays as many: the last ones begin anew, and what is double is cut off. Clips of one prompt stay together (diversity).
    share = -(-len(heldout) // world) * cfg.heldout_clips
    mine = [index % len(rows) for index in range(rank * share, (rank + 1) * share)]
    seen: dict[str, list[Tensor]] = {"kl": [], "marks": [], "spread": [], "points": []}
    examples: list[tuple[str, Tensor]] = []
    spread = {} if run.task.spread is None else {"": run.task.spread}
    for part, cond, prompts, seeds in _parts(run, rows, mine):
        how: dict[str, Any] = {"temperature": cfg.temperature, "cfg_coef": cfg.cfg_coef}
        clips = play(run.lm, run.critic, cond, [rows[index] for index in part], seeds, cfg.n_frames, **how)
        seen["kl"].append((clips.logps - clips.ref_logps).sum(1))
        known = scores({name: part.score for name, part in run.reward.parts.items()} | spread, clips.codes, prompts)
        nothing = clips.logps.new_full((len(part),), float("nan"))
        seen["spread"].append(known.pop("", nothing))
        seen["marks"].append(run.reward.marks(clips.codes, prompts, everything=True, known=known))
        seen["points"].append(run.task.embed(clips.codes, prompts) if run.task.embed else nothing[:, None])
        examples += [(prompts[i], clips.codes[i]) for i, index in enumerate(part) if index % cfg.heldout_clips == 0]
    kl, marks, apart, points = (run.accelerator.gather(torch.cat(parts))[: len(rows)] for parts in seen.values())
    words = [heldout.texts[row] for row in rows]
    if run.step == 0:
        looks = 1 if run.reward.measured else cfg.base_looks
        every = [marks, *(_marks_of_base(run, rows, mine, number) for number in range(1, looks))]
        run.reward.measure(torch.cat(every), words * looks, rows * looks)
        if line := run.reward.not_held(run.held):
            run.accelerator.print(line, flush=True)
    run.reward.hold(run.held, marks, words, cfg.hold_rate, cfg.hold_slack)
    now = Look(
        scores=run.reward.judge(marks, words, stated=True).total.cpu(),
        prompt_ids=rows,
        kl=kl.mean().item(),
        spread=apart[torch.isfinite(apart)].mean().item(),
        diversity=diversity(points.cpu(), rows) if cfg.heldout_clips > 1 else float("nan"),
    )
    reason = run.brake(run.step, now)
    if run.brake.best_step == run.step:
        run.best = adapter_tensors(run.lm)
    if reason and cfg.brake != "off":
        run.braked = reason
    run.examples = examples[: cfg.listen]
    return run.brake.figures(now) | {f"heldout_{name}": value for name, value in run.reward.figures(marks).items()}


def _parts(run: Run, rows: list[int], mine: list[int], number: int = 0) -> Iterator[tuple[list[int], Conditions, list[str], list[int]]]:
    """This process's clips of a look, a batch at a time: their indices, conditions, prompts and seeds. number: as of `look_seed`."""
    cfg, heldout = run.cfg, run.task.heldout
    assert heldout is not None
    table = heldout.table.to(run.accelerator.device)
    chunk = whole_prompts(cfg.batch_size // run.accelerator.num_processes, cfg.heldout_clips)
    for start in range(0, len(mine), chunk):
        part = mine[start : start + chunk]
        asked = [rows[index] for index in part]
        yield (
            part,
            table.index(asked),
            [heldout.texts[row] for row in asked],
            [sample_seed(look_seed(cfg.seed, LOOK, number), index) for index in part],
        )


def _marks_of_base(run: Run, rows: list[int], mine: list[int], number: int) -> Tensor:
    """All parts' marks [B, P] of the clips of a look, over all processes, as the base plays them with seeds of this look's own. What a
    policy that has moved on plays shares with the base's clips the prompts alone, and not what their seeds happened to bring."""
    marks = []
    for _, cond, prompts, seeds in _parts(run, rows, mine, number):
        with gathered(run.lm), adapter_disabled(run.lm):
            made = generate(run.lm, cond, run.cfg.n_frames, seeds=seeds, temperature=run.cfg.temperature, cfg_coef=run.cfg.cfg_coef)
        marks.append(run.reward.marks(made.codes, prompts, everything=True))
    everyone: Tensor = run.accelerator.gather(torch.cat(marks))
    return everyone[: len(rows)]


def rewind(run: Run) -> int:
    """Put the adapter of the best look back; returns its step."""
    set_adapter_tensors(run.lm, run.best)
    return run.brake.best_step
