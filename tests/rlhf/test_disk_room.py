"""A disk that fills up while something works in it: the trouble in words, what was there still whole, and with room again the same end.

tests/base_models/test_full_disk.py has the disk that is full from the beginning.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import pytest

from base_models.checkpoint import latest_training_state, load_tensors, load_training_state, read_json
from tests.rlhf.ppo_toys import alone, untimed
from tests.small_disk import WAYS, make_small_disk  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
LONG: dict[str, list[str]] = {
    "train_ppo": ["--steps", "12", "--batch-size", "8", "--n-frames", "6", "--save-every", "1", "--listen", "0"],
    "train_dpo": ["--steps", "24", "--save-every", "1", "--precision", "fp32", "--listen", "0"],
}
"""Options of a run that saves often enough to be met between two checkpoints."""

FORKED = """
import importlib, os, runpy, sys, traceback
import torch
torch.set_num_threads(1)
for module in sys.argv[1].split(","):
    importlib.import_module(module)
for line in sys.stdin:  # a program and its options
    command = line.rstrip("\\n").split("\\t")
    pid = os.fork()
    if not pid:
        code = 1
        os.dup2(2, 1)
        sys.argv = command
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(pid, flush=True)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(f"\\nexit code {code}", file=sys.stderr, flush=True)
"""


class Programs:
    """Scripts of ours, forked from one process that has their imports behind it."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED, "rlhf.train_ppo,rlhf.train_dpo,rlhf.train_reward"]
        environment = {**alone(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(command, text=True, env=environment, cwd=folder, **pipes)
        self.lines = Queue[str]()
        self.reader = Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:  # a pipe, which no limit on files and no full disk stops
            self.lines.put(line)

    def run(self, script: Path, *options: object, meanwhile: Callable[[int], None] = lambda pid: None) -> tuple[int, str]:
        """(exit code, what it said). meanwhile: is told the running script's process."""
        print(*map(str, [script, *options]), sep="\t", file=self.process.stdin, flush=True)
        meanwhile(int(self.process.stdout.readline()))
        said = ""
        while not (line := self.lines.get(timeout=240)).startswith("exit code "):
            said += line
        return int(line.split()[-1]), said

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.reader.join()
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    made = Programs(tmp_path_factory.mktemp("programs"))
    yield made
    made.close()


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def assert_told(said: str) -> None:
    assert "Traceback" not in said, said
    [line] = [line for line in said.replace("\r", "\n").splitlines() if ": got " in line]
    assert "%|" not in line  # on a line of its own
    assert "; expected a place that can be written" in line
    assert "; remedy: free s" in line or "; remedy: raise the limit" in line
    assert "No space left on device" in line or "File too large" in line


def whole(out: Path) -> int:
    """Every checkpoint can be read; the newest one's step."""
    for folder in (out / "checkpoints").glob("step_*"):
        load_training_state(folder, restore_rng=False)
    newest = latest_training_state(out)
    return 0 if newest is None else int(read_json(newest / "state.json")["step"])


def words(out: Path) -> list[dict[str, Any]]:
    rows = [untimed(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "time" not in name and "second" not in name} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    for name, options in LONG.items():
        code, said = programs.run(ROOT / "rlhf" / f"{name}.py", "--preset", "smoke", *options, "--out", folder / name)
        assert code == 0, said
    return {name: folder / name for name in LONG}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LONG)
def test_a_disk_that_fills_up_costs_nothing_but_the_time(name, way, programs, undisturbed, make_small_disk):  # noqa: F811
    disk = make_small_disk(way)
    out = disk.folder / "run"
    command = [ROOT / "rlhf" / f"{name}.py", "--preset", "smoke", *LONG[name], "--out", out]
    full = []

    def starve(pid: int) -> None:
        while not ended(pid):
            if list((out / "checkpoints").glob("step_*")):
                disk.fill(pid)
                full.append(whole(out))
                return

    code, said = programs.run(*command, meanwhile=starve)
    assert full
    assert code == 2, said
    assert_told(said)
    assert whole(out) >= full[0] > 0  # none that was there is lost
    assert not (out / "adapter").exists()
    disk.make_room()
    code, said = programs.run(*command, "--resume")
    assert code == 0, said
    assert list(out.rglob(".tmp-*")) == []
    ours, theirs = (load_tensors(run / "adapter" / "adapter_model.safetensors") for run in (out, undisturbed[name]))
    assert ours.keys() == theirs.keys()
    assert all((ours[key] == theirs[key]).all() for key in ours)
    assert words(out) == words(undisturbed[name])


@pytest.mark.parametrize("way", WAYS)
def test_a_reward_that_found_no_room_is_trained_anew_in_the_same_folder(way, programs, make_small_disk):  # noqa: F811
    disk = make_small_disk(way)
    out = disk.folder / "reward"
    command = [ROOT / "rlhf" / "train_reward.py", "--preset", "smoke", "--out", out]
    code, said = programs.run(*command, meanwhile=disk.fill)
    assert code == 2, said
    assert_told(said)
    assert not list(out.rglob("*.safetensors"))
    disk.make_room()
    code, said = programs.run(*command)
    assert code == 0, said
    assert load_tensors(next(out.rglob("*.safetensors")))


@pytest.mark.parametrize("way", WAYS)
def test_clips_that_found_no_room_are_played_later_and_are_the_same(way, programs, policy_dir, make_small_disk, tmp_path):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("".join(f"piano {i} caf\u00e9\n" for i in range(8)))
    (tmp_path / "cli.py").write_text("import sys\nfrom rlhf.cli import main\nsys.exit(main(sys.argv[1:]))\n")
    disk = make_small_disk(way)
    given = ["sample", "--policy", policy_dir, "--prompts", tmp_path / "prompts.txt", "-n", "8", "--duration", "1"]

    def starve(pid: int) -> None:
        while not ended(pid):
            if list((disk.folder / "clips").glob("*.wav")):
                disk.fill(pid)
                return

    code, said = programs.run(tmp_path / "cli.py", *given, "--out", disk.folder / "clips", meanwhile=starve)
    assert code == 2, said
    assert_told(said)
    assert not (disk.folder / "clips" / "manifest.jsonl").exists()
    disk.make_room()
    for out in (disk.folder / "clips", tmp_path / "whole"):
        code, said = programs.run(tmp_path / "cli.py", *given, "--out", out)
        assert code == 0, said
    assert (disk.folder / "clips" / "manifest.jsonl").read_text() == (tmp_path / "whole" / "manifest.jsonl").read_text()
