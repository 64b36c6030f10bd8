"""A disk without room: a small file system of its own where that may be mounted, and a limit that the kernel keeps anywhere."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WAYS = ("tmpfs", "limit")
SIZE = 16 << 20


class SmallDisk:
    """A folder whose room can be taken and given back while a process works in it."""

    def __init__(self, folder: Path, mounted: bool) -> None:
        self.folder, self.mounted = folder, mounted

    def fill(self, pid: int) -> None:
        """No room any more. Without a file system of its own, for this process alone."""
        if not self.mounted:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            return
        with contextlib.suppress(OSError), open(self.folder / "ballast", "ab", buffering=0) as ballast:
            for size in (1 << 16, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while ballast.write(bytes(size)):
                        pass

    def make_room(self, pid: int | None = None) -> None:
        if self.mounted:
            (self.folder / "ballast").unlink(missing_ok=True)
        elif pid is not None:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@contextlib.contextmanager
def small_disk(folder: Path, way: str) -> Iterator[SmallDisk]:
    """`tmpfs`: 16 MB that are really full, where this user may mount them; else the test is skipped. `limit`: no file may grow."""
    folder.mkdir()
    if way == "limit":
        if sys.platform != "linux":
            pytest.skip("limits of another process: Linux alone has them")
        yield SmallDisk(folder, False)
        return
    if os.geteuid() != 0:
        pytest.skip("a small file system is mounted by root alone; the limit stands for it")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}; the limit stands for it")
    try:
        yield SmallDisk(folder, True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def make_small_disk(tmp_path: Path) -> Iterator[Callable[[str], SmallDisk]]:
    """make_small_disk(way) -> an empty disk for this test."""
    with contextlib.ExitStack() as open_ones:
        yield lambda way: open_ones.enter_context(small_disk(tmp_path / "disk", way))
