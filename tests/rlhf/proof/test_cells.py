import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from base_models.checkpoint import read_json, write_json
from base_models.errors import UserError
from rlhf.proof.cells import CODE, HERE, PYTHON, ROOT, TOP, Cell, closure, place, portable, run_all, run_cell

COUNT = "import pathlib, sys; p = pathlib.Path(sys.argv[1]) / 'count'; p.write_text(str(int(p.read_text() if p.exists() else 0) + 1))"
COPY = "import pathlib, sys; pathlib.Path(sys.argv[2], 'copy').write_text(pathlib.Path(sys.argv[1], 'count').read_text() * 2)"


def counting(label="count", **more):
    return Cell(label, (sys.executable, "-c", COUNT, HERE), **more)


def copying(first):
    return Cell("copy", (sys.executable, "-c", COPY, place(first), HERE), (first,))


def quiet(text):
    pass


def test_a_cell_is_done_once_and_hands_its_folder_on(tmp_path):
    first = counting()
    second = copying(first)
    for _ in range(2):
        assert run_all([second], tmp_path, tell=quiet) == {}
    assert (first.folder(tmp_path) / "count").read_text() == "1"
    assert (second.folder(tmp_path) / "copy").read_text() == "11"


def test_other_settings_are_another_folder_and_so_is_all_that_hangs_on_them(tmp_path):
    first, other = counting(), Cell("count", (sys.executable, "-c", COUNT + "; 1", HERE))
    assert first.name != other.name
    assert copying(first).name != copying(other).name
    assert copying(first).name == copying(counting()).name
    assert str(tmp_path) not in "".join(copying(first).argv)
    assert ROOT in place(first)


def test_a_name_depends_neither_on_the_interpreter_nor_on_where_the_code_lies(tmp_path):
    tells = "import json, pathlib, sys; pathlib.Path(sys.argv[1], 'told').write_text(json.dumps([sys.executable, *sys.argv[2:]]))"
    inside, outside = TOP / "base_models" / "pretrained", tmp_path / "elsewhere"
    cell = Cell("told", (PYTHON, "-c", tells, HERE, portable(inside), portable(outside)))
    assert portable(inside) == f"{CODE}/base_models/pretrained"
    assert not {sys.executable, str(TOP)} & set(cell.argv)
    run_cell(cell, tmp_path)
    assert read_json(cell.folder(tmp_path) / "told") == [sys.executable, str(inside), str(outside)]


def test_needed_cells_come_first_and_each_once():
    first = counting()
    a, b = copying(first), Cell("b", ("true",), (first,))
    assert [cell.label for cell in closure([a, b, a])] == ["count", "copy", "b"]


def test_a_failure_stops_what_needs_it_and_nothing_else_and_is_mended_by_calling_again(tmp_path):
    stone = tmp_path / "stone"
    broken = Cell(
        "broken", (sys.executable, "-c", f"import pathlib, sys; sys.exit('no stone' * (not pathlib.Path({str(stone)!r}).exists()) or None)")
    )
    after, beside = Cell("after", ("true",), (broken,)), counting()
    failed = run_all([after, beside], tmp_path / "cells", jobs=2, tell=quiet)
    assert set(failed) == {broken.name, after.name}
    assert "no stone" in failed[broken.name]
    assert beside.is_done(tmp_path / "cells")
    stone.touch()
    assert run_all([after], tmp_path / "cells", tell=quiet) == {}


def test_only_an_interrupted_cell_is_told_to_resume(tmp_path):
    cell = Cell("say", (sys.executable, "-c", "import sys; sys.exit('--resume' not in sys.argv)"), resume=("--resume",))
    with pytest.raises(UserError, match="exit code 1"):
        run_cell(cell, tmp_path)
    run_cell(cell, tmp_path)
    assert read_json(cell.folder(tmp_path) / "cell.json")["argv"][-1] == "--resume"


def test_a_killed_runner_leaves_no_stamp_and_the_next_waits_for_its_orphan(tmp_path):
    """The orphan writes for a second after its runner is gone; the next runner must not work beside it."""
    writes = (
        "import pathlib, sys, time; p = pathlib.Path(sys.argv[1], 'log'); p.open('a').write('b'); time.sleep(1.5); p.open('a').write('e')"
    )
    runner = (
        "import sys; from pathlib import Path; from rlhf.proof.cells import Cell, HERE, run_cell\n"
        f"run_cell(Cell('slow', (sys.executable, '-c', {writes!r}, HERE)), Path({str(tmp_path)!r}))"
    )
    cell = Cell("slow", (sys.executable, "-c", writes, HERE))
    log = cell.folder(tmp_path) / "log"
    with subprocess.Popen([sys.executable, "-c", runner], cwd=TOP) as first:
        deadline = time.monotonic() + 60
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
    assert not cell.is_done(tmp_path)
    run_cell(cell, tmp_path)
    assert log.read_text() == "bebe"
    assert cell.is_done(tmp_path)


def test_no_more_than_the_asked_number_run_side_by_side(tmp_path):
    busy = tmp_path / "busy"
    busy.mkdir()
    source = (
        "import os, pathlib, sys, time\n"
        f"p = pathlib.Path({str(busy)!r}); me = p / str(os.getpid()); me.touch(); n = len(list(p.iterdir())); time.sleep(.2); me.unlink()\n"
        "pathlib.Path(sys.argv[1], 'n').write_text(str(n)); assert os.environ['OMP_NUM_THREADS'] == '1'"
    )
    cells = [Cell(f"c{index}", (sys.executable, "-c", source, HERE)) for index in range(5)]
    assert run_all(cells, tmp_path / "cells", jobs=2, tell=quiet) == {}
    seen = [int((Path(cell.folder(tmp_path / "cells")) / "n").read_text()) for cell in cells]
    assert max(seen) <= 2


def test_a_folder_without_a_stamp_is_not_done(tmp_path):
    cell = counting()
    cell.folder(tmp_path).mkdir(parents=True)
    write_json(cell.folder(tmp_path) / "figures.json", {})
    assert not cell.is_done(tmp_path)
