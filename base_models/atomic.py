"""Files and folders that are whole or absent: written under a temporary name, flushed to the disk, renamed. No torch here.

The temporary name stands in the same folder, since a rename is atomic only within one file system. A folder that has content cannot be
renamed over, so Linux is asked to let the two change places (renameat2 with RENAME_EXCHANGE); elsewhere it takes two renames.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it into place when the block succeeds, remove it when it does not."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, target)
        _flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The same for a folder; one that already has the name is replaced only when the new one is whole.

    Where two folders cannot change places at once, a kill between the two renames leaves the old one under a temporary name, in
    `.tmp-old-*`; any error, Ctrl-C included, brings it back.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=target.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        temporary.chmod(0o755)
        if not target.exists():
            os.rename(temporary, target)
        elif not _exchange(temporary, target):
            _replace(temporary, target)
        _flush(target.parent)
    finally:
        _remove(temporary)


def _exchange(one: Path, other: Path) -> bool:
    """The two change places at once. False, and nothing done, where the system or its file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _replace(new: Path, target: Path) -> None:
    """Two renames; the old folder goes only when a folder stands under the name, and comes back when the new one did not get there."""
    graveyard = Path(tempfile.mkdtemp(prefix=".tmp-old-", dir=target.parent))
    old = graveyard / target.name
    try:
        os.rename(target, old)
        os.rename(new, target)
    finally:
        if not target.exists():
            os.rename(old, target)
        shutil.rmtree(graveyard)


def _remove(path: Path) -> None:
    """What is left under a temporary name: nothing, half a folder, or the old one (perhaps a link to a folder)."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
