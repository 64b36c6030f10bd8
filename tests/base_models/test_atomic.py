"""A file or folder is the old one or the new one, never half of either."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from base_models import atomic
from base_models.atomic import atomic_file, atomic_folder


def write_half(target: Path) -> None:
    with atomic_file(target) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("disk full")


def fill_half(target: Path) -> None:
    with atomic_folder(target) as temporary:
        (temporary / "new").touch()
        raise RuntimeError("killed")


def test_a_failing_write_leaves_the_old_file_and_no_debris(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="disk full"):
        write_half(target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_appears_whole_with_its_parents_and_is_readable_by_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    with atomic_file(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert target.stat().st_mode & 0o777 == 0o644


def test_a_failing_folder_leaves_the_old_one_and_no_debris(tmp_path: Path) -> None:
    target = tmp_path / "corpus"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(RuntimeError, match="killed"):
        fill_half(target)
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "corpus"
    target.mkdir()
    (target / "old").touch()
    with atomic_folder(target) as temporary:
        (temporary / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def old_folder(target: Path) -> Path:
    target.mkdir()
    (target / "old").touch()
    return target


def replace(target: Path) -> None:
    with atomic_folder(target) as temporary:
        (temporary / "new").touch()


def killed_while_replacing(target: Path) -> bool:
    """Whether a process of its own died of replacing the folder."""
    pid = os.fork()
    if not pid:
        try:
            replace(target)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def fatal(call: Callable[[Path, Path], object]) -> Callable[[Path, Path], None]:
    """The call, and then `kill -9`."""

    def made(one: Path, other: Path) -> None:
        call(one, other)
        os.kill(os.getpid(), signal.SIGKILL)

    return made


@pytest.mark.skipif(sys.platform != "linux", reason="folders change places at once on Linux alone")
@pytest.mark.parametrize(("module", "call", "killed"), [(os, "rename", False), (atomic, "_exchange", True)])
def test_no_kill_finds_the_name_without_a_whole_folder(
    module: ModuleType, call: str, killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = old_folder(tmp_path / "corpus")
    monkeypatch.setattr(module, call, fatal(getattr(module, call)))
    assert killed_while_replacing(target) == killed  # no rename takes part in it that it could die after
    assert [path.name for path in target.iterdir()] == ["new"]


@pytest.mark.parametrize(("after", "kept"), [(0, "old"), (1, "old"), (2, "new")])
def test_where_folders_cannot_change_places_an_interrupt_between_the_renames_brings_the_old_one_back(
    after: int, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = old_folder(tmp_path / "corpus"), os.rename
    calls: list[Path] = []

    def interrupted(one: Path, other: Path) -> None:
        if not calls and after == 0:
            calls.append(one)
            raise KeyboardInterrupt
        calls.append(one)
        rename(one, other)
        if len(calls) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(target)
    assert [path.name for path in target.iterdir()] == [kept]
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_a_link_is_replaced_and_what_it_led_to_stays(tmp_path: Path) -> None:
    far = old_folder(tmp_path / "far")
    target = tmp_path / "link"
    target.symlink_to(far)
    replace(target)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in far.iterdir()] == ["old"]
    assert sorted(tmp_path.iterdir()) == [far, target]
