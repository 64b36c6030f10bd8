"""Files and folders that are whole or absent: written under a temporary name, flushed to the disk, renamed. No torch here.

The temporary name stands in the same folder, since a rename is atomic only within one file system.
"""

from __future__ import annotations

import contextlib
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
    """The same for a folder; one that already has the name is replaced only when the new one is whole."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=target.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        temporary.chmod(0o755)
        if target.exists():
            graveyard = Path(tempfile.mkdtemp(prefix=".tmp-old-", dir=target.parent))
            os.rename(target, graveyard / target.name)
            try:
                os.rename(temporary, target)
            except OSError:
                os.rename(graveyard / target.name, target)
                raise
            finally:
                shutil.rmtree(graveyard)
        else:
            os.rename(temporary, target)
        _flush(target.parent)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
