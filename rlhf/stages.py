"""Work in stages that can be interrupted at any moment: what `encore demo` and `encore loop` share.

Each stage leaves a stamp when it is whole; a second call does only what is missing. A stage that was cut off is called again, so it
has to go on where it stopped, or begin anew; its seconds are those of all its starts. Programs of ours that stand beside this package
(the rating app, the training scripts) are started, never imported.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base_models.checkpoint import read_json, write_json
from base_models.errors import UserError
from base_models.settings import ERROR_FILE
from rlhf.snapshot import NothingToLearnError

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Stage:
    """One step. `weight` is its usual share of the time, for the ETA."""

    name: str
    what: str
    weight: float
    run: Callable[[], dict[str, Any] | None]


def stamp_path(folder: Path, name: str) -> Path:
    return folder / "stages" / f"{name}.json"


def stamp(folder: Path, name: str) -> dict[str, Any]:
    """What a finished stage returned, and its `seconds`: of all its starts together, None where one was killed, whose time nobody knows."""
    found: dict[str, Any] = read_json(stamp_path(folder, name))
    return found


def run_stages(folder: Path, stages: Sequence[Stage]) -> None:
    """Do what is missing, in order, and say how long the rest will take."""
    for number, stage in enumerate(stages, start=1):
        place = f"[{number:2}/{len(stages)}] {stage.what}"
        if stamp_path(folder, stage.name).is_file():
            print(f"{place}: done before", flush=True)
            continue
        left = sum(s.weight for s in stages[number - 1 :])
        print(f"{place} ...  (about {minutes(left * _pace(folder, stages))} left)", flush=True)
        spent = folder / "stages" / f".{stage.name}.spent"
        seconds, result = _timed(stage, spent)
        write_json(stamp_path(folder, stage.name), {"seconds": seconds, **result})
        spent.unlink()
        print(f"        {'unknown time, as a start was killed' if seconds is None else f'{seconds:.0f} s'}", flush=True)


def _timed(stage: Stage, spent: Path) -> tuple[float | None, dict[str, Any]]:
    """The seconds of all starts of a stage, and what it returned. `spent` keeps those of starts that were cut off: None while one runs,
    which is what a kill leaves."""
    before = read_json(spent)["seconds"] if spent.is_file() else 0.0
    write_json(spent, {"seconds": None})
    start = time.monotonic()

    def so_far() -> float | None:
        return None if before is None else before + time.monotonic() - start

    try:
        result = stage.run() or {}
    except BaseException:
        with suppress(OSError):  # no room: the time stays unknown, and what the stage says is heard
            write_json(spent, {"seconds": so_far()})
        raise
    seconds = so_far()
    write_json(spent, {"seconds": seconds})
    return seconds, result


def _pace(folder: Path, stages: Sequence[Stage]) -> float:
    """Seconds per unit of weight, from the stages that are done in a known time (1 where none is)."""
    done = [(s.weight, stamp(folder, s.name)["seconds"]) for s in stages if stamp_path(folder, s.name).is_file()]
    known = [(weight, seconds) for weight, seconds in done if seconds is not None]
    weight = sum(w for w, _ in known)
    return sum(seconds for _, seconds in known) / weight if weight > 20 else 1.0


def minutes(seconds: float) -> str:
    """A time as people say it."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Refuses a second process on the same folder; a killed one holds nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}, on which another process works", "one at a time", "wait for it, or stop it") from error
        yield


# ---- other programs --------------------------------------------------------------------------------------------------


TIED = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""
"""prctl(PR_SET_PDEATHSIG, SIGKILL), then the program itself: it keeps the process, and with it the promise."""


def tied(command: Sequence[str]) -> list[str]:
    """The command as one that the kernel ends when this process ends, even by `kill -9`: a trainer left behind would write into the
    folder in which the next call's trainer works, a rating app would keep its port. Linux alone promises it."""
    return [sys.executable, "-I", "-S", "-c", TIED, str(os.getpid()), *command] if sys.platform == "linux" else list(command)


def run_together(commands: Sequence[Sequence[str]], environment: Mapping[str, str]) -> list[int]:
    """Run programs side by side until the last has ended; their exit codes. None of them outlives this call, or this process."""
    running = [subprocess.Popen(tied(command), env=dict(environment)) for command in commands]
    try:
        return [process.wait() for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def run_python(*programs: Sequence[Any]) -> None:
    """Run Python programs of ours side by side; their progress goes to the terminal, and a failure ends the work with its words.

    Raises: UserError; of a single program NothingToLearnError, where that is what ended it.
    """
    environment = python_environment()
    if len(programs) > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // len(programs)))
    commands = [[sys.executable, *map(str, arguments)] for arguments in programs]
    with tempfile.TemporaryDirectory() as folder:
        error_file = Path(folder) / "error.json"
        if len(programs) == 1:
            environment[ERROR_FILE] = str(error_file)
        codes = run_together(commands, environment)
        told = read_json(error_file) if error_file.is_file() else {"error": None}
    if told.pop("error") == NothingToLearnError.__name__ and any(codes):
        raise NothingToLearnError(**told)
    for command, code in zip(commands, codes):
        if code:
            got = f"exit code {code} of {' '.join(command[1:4])}"
            raise UserError(got, "0", "mend what it says above and call again: it resumes")


def python_environment() -> dict[str, str]:
    """The environment in which our packages are found from any folder."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": path}


def resume_flag(run: Path) -> list[str]:
    """What a training script is told when its folder is there already."""
    return ["--resume"] if run.exists() else []


@dataclass(frozen=True)
class RatingApp:
    """The running app."""

    url: str
    process: subprocess.Popen[str]

    def check(self) -> None:
        """Raises UserError where it has ended."""
        if (code := self.process.poll()) is not None:
            got = f"a rating app that ended with exit code {code}"
            raise UserError(got, "one that serves until the votes are there", "see its error above and call again: no vote is lost")


@contextmanager
def rating_app(db: str, port: int = 0) -> Iterator[RatingApp]:
    """The real app while the block runs. Port 0 takes a free one."""
    command = [sys.executable, "-m", "feedback_app.app", "--db", db, "--port", str(port)]
    with subprocess.Popen(tied(command), cwd=ROOT, stdout=subprocess.PIPE, text=True) as app:
        try:
            assert app.stdout is not None
            line = app.stdout.readline()
            if "ready at" not in line:
                raise UserError(f"a rating app that did not start: {line!r}", "a line with its address", "see its error above")
            url = line.rsplit(" ", 1)[1].strip()
            print(f"        the rating app is at {url}", flush=True)
            yield RatingApp(url, app)
        finally:
            app.terminate()


def access_token(store: Any, handle: str) -> str:
    """A fresh access token, whether the rater is new or was left by an interrupted call."""
    from db.errors import StoreError

    try:
        return str(store.add_rater(handle))
    except StoreError:
        return str(store.renew_token(handle))


def accounts_file(db: str, path: Path, handles: Sequence[str]) -> Path:
    """JSON of handle and token for raters who are programs, readable by nobody else. Who stands in it keeps the token; others are added."""
    from db.store import open_store

    known = read_json(path) if path.is_file() else []
    if new := [handle for handle in handles if handle not in {account["handle"] for account in known}]:
        with open_store(db) as store:
            write_json(path, known + [{"handle": handle, "token": access_token(store, handle)} for handle in new])
        path.chmod(0o600)
    return path
