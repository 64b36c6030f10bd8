"""Cells: steps of a long experiment, each a program with a folder of its own, done once, safe to kill, run side by side.

    Cell(label, argv, needs) -> <root>/<label>-<8 hex digits>/ {cell.json, log.txt, what the program makes, done.json}

A cell's name holds a hash of its program's arguments, and these name the folders of the cells before it: other settings are another
folder, and what they do not touch is not done again. `done.json` appears when the program has ended well, and nothing else counts. A
lock on the folder is handed on to the program, so that a second runner waits for an orphan of a killed one and does not work beside it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base_models.checkpoint import read_json, write_json
from base_models.errors import UserError
from rlhf.proof.left import expected, seconds_left

HERE = "{here}"
"""Stands in a cell's arguments for its own folder."""
PYTHON, CODE = "{python}", "{code}"
"""Stand in arguments for this interpreter and for the folder of this source tree, so that a name does not depend on where they lie."""
TOP = Path(__file__).resolve().parents[2]


class Kept(ABC):
    """A folder of results by its name."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    def folder(self, root: Path) -> Path:
        return root / self.name

    def is_done(self, root: Path) -> bool:
        return (self.folder(root) / "done.json").is_file()


@dataclass(frozen=True)
class Cell(Kept):
    """One program. `argv` may hold HERE, ROOT, PYTHON and CODE, which are filled in when it runs; another cell's folder stands in it as
    `place` makes it. `resume` and `weight` are no part of the name."""

    label: str
    """Where it lies, such as ppo/warm/s0."""
    argv: tuple[str, ...]
    needs: tuple[Cell, ...] = ()
    resume: tuple[str, ...] = ()
    """Added where an interrupted call has left something."""
    weight: float = 1.0
    """Its usual seconds, where no finished cell tells better (rlhf.proof.left)."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps([self.label, self.argv, [cell.sha256 for cell in self.needs]]).encode()).hexdigest()

    @property
    def name(self) -> str:
        return f"{self.label}-{self.sha256[:8]}"


@dataclass(frozen=True)
class Earlier(Kept):
    """A cell of an earlier call, of which the name alone is known: to be read, not to be run."""

    known_as: str

    @property
    def name(self) -> str:
        return self.known_as


ROOT = "{root}"
"""Stands in arguments for the folder of all cells, so that a name does not depend on where an experiment lies."""


def place(cell: Cell, *parts: str) -> str:
    """A path in another cell's folder, as it stands in arguments."""
    return "/".join((ROOT, cell.name, *parts))


def portable(path: Path) -> str:
    """A path as it stands in arguments: within this source tree by its place there, else whole."""
    whole = Path(os.path.abspath(path))  # a link within the tree stays what it is called
    return "/".join((CODE, *whole.relative_to(TOP).parts)) if whole.is_relative_to(TOP) else str(whole)


def _filled(argument: str, folder: Path, root: Path) -> str:
    """An argument of the cell in `folder` as its program gets it."""
    for name, stands_for in ((HERE, folder), (ROOT, root), (PYTHON, sys.executable), (CODE, TOP)):
        argument = argument.replace(name, str(stands_for))
    return argument


def closure(cells: Iterable[Cell]) -> list[Cell]:
    """The cells and all that they need, each once, needed ones first."""
    found: dict[str, Cell] = {}

    def add(cell: Cell) -> None:
        if cell.name not in found:
            for need in cell.needs:
                add(need)
            found[cell.name] = cell

    for cell in cells:
        add(cell)
    return list(found.values())


def run_cell(cell: Cell, root: Path, environment: dict[str, str] | None = None) -> float:
    """Do a cell if it is not done; returns the seconds of this call. environment: of its program, None for this one's own.

    Raises UserError with the log's end where its program fails."""
    folder = cell.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with open(folder / "lock", "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if cell.is_done(root):
            return 0.0
        begun = (folder / "cell.json").is_file()
        filled = [_filled(argument, folder, root) for argument in (*cell.argv, *(cell.resume if begun else ()))]
        write_json(folder / "cell.json", {"label": cell.label, "argv": filled, "needs": [need.name for need in cell.needs]})
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            code = subprocess.run(
                filled, cwd=TOP, stdout=log, stderr=subprocess.STDOUT, env=environment, pass_fds=(lock.fileno(),), check=False
            ).returncode
        if code:
            end = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-1500:]
            raise UserError(
                f"exit code {code} of cell {cell.name}: ...{end}", "0", f"mend what it says ({folder / 'log.txt'}) and call again"
            )
        seconds = time.monotonic() - began
        write_json(folder / "done.json", {"seconds": round(seconds, 2)})
        return seconds


def say(text: str) -> None:
    print(text, flush=True)


def run_all(cells: Sequence[Cell], root: Path, jobs: int = 1, tell: Callable[[str], None] = say, threads: int = 1) -> dict[str, str]:
    """Do the cells and all that they need, `jobs` at a time, each program with so many `threads`; a failed cell stops what needs it
    and nothing else.

    Returns: name -> what went wrong, empty where all is done."""
    environment = {**os.environ, "PYTHONPATH": str(TOP), "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    everything = closure(cells)
    waiting = {cell.name: cell for cell in everything if not cell.is_done(root)}
    total, failed = len(everything), dict[str, str]()
    done = total - len(waiting)
    begun: dict[str, float] = {}

    def minutes() -> str:
        """Of what is left, by what finished cells took; what has run of the running ones is taken off."""
        left = [cell for cell in everything if cell.name in waiting or cell in running.values()]
        seconds = expected(everything, root)
        for name, since in begun.items():
            seconds[name] = max(seconds[name] - (time.monotonic() - since), 0.0)
        return f"about {seconds_left(left, seconds, jobs) / 60:.0f} min left"

    stop = threading.Event()
    running: dict[Future[float], Cell] = {}
    tell(f"{total} cells, {done} of them done before; {minutes()}, an estimate")
    with ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="cell") as pool:
        try:
            while waiting or running:
                for cell in list(waiting.values()):
                    lost = [need.name for need in cell.needs if need.name in failed]
                    if lost:
                        failed[cell.name] = f"needs {lost[0]}"
                        del waiting[cell.name]
                    elif len(running) < jobs and all(need.is_done(root) for need in cell.needs) and not stop.is_set():
                        del waiting[cell.name]
                        tell(f"      begin {cell.name}")
                        begun[cell.name] = time.monotonic()
                        running[pool.submit(run_cell, cell, root, environment)] = cell
                if not running:
                    continue
                ready, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ready:
                    cell = running.pop(future)
                    try:
                        seconds = future.result()
                    except UserError as error:
                        failed[cell.name] = error.got
                        tell(f"FAILED {cell.name}: {error}")
                        continue
                    done += 1
                    tell(f"[{done}/{total}] {cell.name}  {seconds:.0f} s; {minutes()}")
        except BaseException:
            stop.set()
            raise
    return failed


def result(cell: Kept, root: Path, name: str = "figures.json") -> dict[str, Any]:
    """What a cell's program wrote. Raises UserError where the cell is not done."""
    if not cell.is_done(root):
        raise UserError(f"cell {cell.name}, which is not done", "a finished one", "run it first")
    found: dict[str, Any] = read_json(cell.folder(root) / name)
    return found
