"""A file or folder is the old one or the new one, never half of either."""

from __future__ import annotations

from pathlib import Path

import pytest

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
