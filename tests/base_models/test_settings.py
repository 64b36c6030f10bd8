import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from base_models.errors import UserError
from base_models.settings import ERROR_FILE, attribute_docstrings, parse, to_mapping


@dataclass(frozen=True)
class Config:
    steps: int = 100
    """How many updates."""
    out: Path = Path("runs/x")
    """Where to."""
    sizes: tuple[int, ...] = (1, 2)
    """Some sizes."""


PRESETS = {"smoke": {"steps": 3, "out": Path("runs/smoke")}}


def test_flags_beat_the_file_which_beats_the_preset(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('steps = 7\nout = "runs/file"\n')
    assert parse(Config, PRESETS, ["--preset", "smoke"]).steps == 3
    assert parse(Config, PRESETS, ["--preset", "smoke", "--config", str(file)]) == Config(7, Path("runs/file"))
    assert parse(Config, PRESETS, ["--config", str(file), "--steps", "9"]).steps == 9


def test_settings_survive_a_round_trip_through_their_file(tmp_path):
    import json

    config = Config(5, Path("a/b"), (3, 4, 5))
    (tmp_path / "c.json").write_text(json.dumps(to_mapping(config)))
    assert parse(Config, PRESETS, ["--config", str(tmp_path / "c.json")]) == config


@pytest.mark.parametrize("argv", [["--preset", "no"], ["--config", "no.toml"]])
def test_unknown_preset_or_file_is_a_clear_error(argv):
    with pytest.raises(UserError, match="remedy"):
        parse(Config, PRESETS, argv)


def test_unknown_name_in_the_file_is_a_clear_error(tmp_path):
    (tmp_path / "c.toml").write_text("stepz = 1\n")
    with pytest.raises(UserError, match="stepz"):
        parse(Config, PRESETS, ["--config", str(tmp_path / "c.toml")])


def test_help_tells_each_attribute_docstring(capsys):
    with pytest.raises(SystemExit):
        parse(Config, PRESETS, ["--help"])
    assert "How many updates." in capsys.readouterr().out


@pytest.fixture
def shown(capsys, monkeypatch):
    """shown(*argv, **how) -> --help as a terminal of 80 columns shows it, without its frames."""
    monkeypatch.setenv("COLUMNS", "80")

    def show(*argv, **how) -> str:
        with pytest.raises(SystemExit):
            parse(Config, PRESETS, [*argv, "--help"], **how)
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    return show


def test_help_lists_preset_and_config_as_options_with_a_line_for_each_preset(shown):
    told = shown()
    assert "--preset NAME A named set of values to start from; `--preset X --help` shows its values. smoke: sets steps, out" in told
    assert "--config FILE A .toml or .json file" in told
    assert "smoke: in a moment" in shown(say={"smoke": "in a moment"})
    assert "How many updates. (default: 3)" in shown("--preset", "smoke")


def test_help_shows_settings_in_groups_and_the_rest_as_the_runs(shown):
    told = shown(groups={"where": "out sizes"})
    of_run, where = told.partition(" run options ")[2].split(" where options ")
    assert "--steps" in of_run
    assert "--out" in where
    assert "--sizes" in where
    assert " run options " not in shown()


@pytest.mark.parametrize("groups", [None, {"where": "out sizes"}, {"a": "sizes", "b": "steps out"}])
def test_groups_change_nothing_of_what_is_read(groups, tmp_path):
    (tmp_path / "c.toml").write_text("sizes = [5]\n")
    argv = ["--preset", "smoke", "--config", str(tmp_path / "c.toml"), "--out", "y"]
    assert parse(Config, PRESETS, argv, groups=groups) == Config(3, Path("y"), (5,))
    with pytest.raises(SystemExit):
        parse(Config, PRESETS, ["--stepz", "1"], groups=groups)


@pytest.mark.parametrize("groups", [{"a": "stepz"}, {"a": "steps", "b": "steps"}])
def test_a_group_of_no_field_or_of_anothers_is_our_own_bug(groups):
    with pytest.raises(AssertionError, match="step"):
        parse(Config, PRESETS, [], groups=groups)


@dataclass(frozen=True)
class Parent:
    steps: int = 1
    """Of the
    parent."""


@dataclass(frozen=True)
class Child(Parent):
    lr: float = 0.1
    """Its
    own; `words`
    (and more)."""
    silent: int = 0


def test_a_docstring_of_several_lines_is_one_and_a_parents_counts():
    assert attribute_docstrings(Child) == {"steps": "Of the parent.", "lr": "Its own; `words` (and more)."}
    assert attribute_docstrings(int) == {}


def test_a_writer_threads_disk_trouble_is_left_to_the_line_of_the_main_thread_and_nothing_else_is(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import errno, threading\n"
        "from dataclasses import dataclass\n"
        "from base_models.settings import run\n"
        "@dataclass(frozen=True)\n"
        "class Config:\n"
        "    steps: int = 1\n"
        "    '''How many.'''\n"
        "def fail(error):\n"
        "    raise error\n"
        "def main(cfg):\n"
        "    for error in (OSError(errno.ENOSPC, 'full'), ValueError('a bug')):\n"
        "        thread = threading.Thread(target=fail, args=(error,))\n"
        "        thread.start()\n"
        "        thread.join()\n"
        "run(main, Config)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, script], env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=True)
    assert "a bug" in done.stderr
    assert "full" not in done.stderr


TRAINS = """
import atexit, sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.nn  # before a group is open, as accelerate does: imported later, it keeps that group as a default for good
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from base_models.errors import UserError
from base_models.settings import keep_until_the_end, run


def threads():
    return sum("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir())


@dataclass(frozen=True)
class Config:
    store: str = ""
    fails: bool = False


class Trainer:
    def __init__(self, model):
        self.model, self.itself = model, self


def main(cfg):
    distributed.init_process_group("gloo", init_method=f"file://{cfg.store}", rank=0, world_size=1)
    keep_until_the_end(distributed.group.WORLD)
    trainer = Trainer(DistributedDataParallel(torch.nn.Linear(2, 1)))
    trainer.model(torch.ones(1, 2)).sum().backward()
    print("training", threads())
    distributed.destroy_process_group()
    if cfg.fails:
        raise UserError("a", "b", "c")
    return trainer


atexit.register(lambda: print("leaving", threads()))
run(main, Config, show=lambda trainer: f"shown {type(trainer).__name__}, {bool(threads())}")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads from /proc")
@pytest.mark.parametrize(("flags", "code", "shown"), [([], 0, ["shown Trainer, True"]), (["--fails"], 2, [])])
def test_a_script_leaves_without_the_threads_of_its_process_group(tmp_path, flags, code, shown):
    script = tmp_path / "script.py"
    script.write_text(TRAINS)
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, script, "--store", str(tmp_path / "store"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    training, *told, leaving = done.stdout.splitlines()
    assert int(training.removeprefix("training ")) > 0
    assert told == shown
    assert leaving == "leaving 0"


def test_whoever_starts_a_script_can_read_the_error_that_ended_it_and_its_children_cannot_write_there(tmp_path):
    """The loop tells votes that teach nothing from all else that may end a training."""
    script = tmp_path / "script.py"
    script.write_text(
        "import dataclasses, os\n"
        "from base_models.errors import UserError\n"
        "from base_models.settings import ERROR_FILE, run\n"
        "class OwnError(UserError):\n    pass\n"
        "@dataclasses.dataclass(frozen=True)\nclass Config:\n    wrong: bool = False\n"
        "def main(cfg):\n    assert ERROR_FILE not in os.environ\n    if cfg.wrong:\n        raise OwnError('a', 'b', 'c')\n"
        "run(main, Config)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), ERROR_FILE: str(tmp_path / "error.json")}
    done = subprocess.run([sys.executable, str(script)], env=environment, check=False, capture_output=True)
    assert (done.returncode, (tmp_path / "error.json").exists()) == (0, False)
    done = subprocess.run([sys.executable, str(script), "--wrong"], env=environment, check=False, capture_output=True)
    assert done.returncode == 2
    assert json.loads((tmp_path / "error.json").read_text()) == {"error": "OwnError", "got": "a", "expected": "b", "remedy": "c"}
