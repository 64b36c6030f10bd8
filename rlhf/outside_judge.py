"""A judge that is another program: clips as files out, scores in. It may be anything that hears a file, and is known by its answers alone.

    codes [B, K, T] -> wav files -> {"files": [...], "prompts": [...]} on its stdin, one line
                    <- {"scores": [...]} on its stdout, one line; null where it cannot tell

The program starts with the first call, keeps no state between lines, and ends with this process. The proof's upper bound, "gold as
reward", is such a judge: what it likes stays in a process that no trainer can read. As --watch-command it is only asked at looks, and
its answers are plotted: whether the gold taste rises with the reward that stands for it.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from base_models.audio import write_audio
from base_models.errors import UserError
from base_models.policy import Policy


class OutsideJudge:
    """A `rlhf.judges.Score` by a program of its own."""

    def __init__(self, command: Sequence[str], policy: Policy, flag: str = "--score-command") -> None:
        """Args: command: the program and its arguments. policy: whose codec turns codes into sound. flag: what named the program."""
        self.command, self.policy, self.flag = list(command), policy, flag
        self._program: subprocess.Popen[str] | None = None
        self._end: Callable[[], object] | None = None

    def __call__(self, codes: Tensor, prompts: list[str]) -> Tensor:
        """codes [B, K, T] -> score [B], float32 on the codes' device; NaN where the program says null.

        Raises: UserError when the program cannot be started, ends, or answers anything but one number or null a clip."""
        with tempfile.TemporaryDirectory(prefix="encore-judge-") as folder:
            files = []
            for index, clip in enumerate(codes):
                wav = self.policy.decode(clip[None])[0].float().cpu().numpy()
                peak = float(np.abs(wav).max(initial=0.0))
                files.append(str(Path(folder) / f"{index:06d}.wav"))
                write_audio(files[-1], wav / max(1.0, peak / 0.99), self.policy.codec.sample_rate)
            scores = self._ask({"files": files, "prompts": list(prompts)}, len(codes))
        return torch.tensor([math.nan if score is None else score for score in scores], dtype=torch.float32, device=codes.device)

    def _ask(self, question: dict[str, list[str]], n: int) -> list[float | None]:
        name = " ".join(self.command[:4])
        try:
            if self._program is None:
                self._program = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                self._end = weakref.finalize(self, end, self._program)
            assert self._program.stdin is not None
            assert self._program.stdout is not None
            self._program.stdin.write(json.dumps(question) + "\n")
            self._program.stdin.flush()
            line = self._program.stdout.readline()
        except OSError as error:
            raise UserError(f"{name}: {error}", "a program that reads questions", f"check {self.flag}") from error
        try:
            scores = json.loads(line)["scores"]
            whole = len(scores) == n and all(score is None or (type(score) in (int, float) and math.isfinite(score)) for score in scores)
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise UserError(
                f"{name} answered {line[:80]!r}", f'{{"scores": [{n} numbers or null]}}', "mend the program; its errors are above"
            )
        return list(scores)

    def close(self) -> None:
        """End the program; it also ends with its judge."""
        if self._end is not None:
            self._end()
        self._program = self._end = None


def end(program: subprocess.Popen[str]) -> None:
    """Close its pipes, which tells it to end, and wait for that."""
    for pipe in (program.stdin, program.stdout):
        if pipe is not None:
            pipe.close()
    program.wait(timeout=30)
