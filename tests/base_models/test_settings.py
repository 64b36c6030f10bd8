import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from base_models.errors import UserError
from base_models.settings import parse, to_mapping


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
