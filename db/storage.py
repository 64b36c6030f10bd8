"""Files wherever they lie: a plain path, `file://`, or any store that fsspec knows (`s3://bucket/clips`, `zip://::clips.zip`).

A driver that is missing (s3fs for s3, say) or a store that does not answer is a StoreError that names the file.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec

from db.errors import StoreError

BLOCK = 256 * 1024


def local_path(uri: str) -> Path | None:
    """The path behind a plain path or a `file://` address; None for a store elsewhere."""
    if uri.startswith("file://"):
        return Path(unquote(urlsplit(uri).path))
    return None if "://" in uri else Path(uri)


def inside(base: str, name: str) -> str | None:
    """The address of `name` below the folder `base`, or None if it would lie anywhere else."""
    if not name or "\x00" in name or not name.isprintable():
        return None
    folder = local_path(base)
    if folder is not None:
        root = folder.resolve()
        try:
            path = (root / name).resolve()
        except (OSError, RuntimeError, ValueError):  # a loop of links, a name that no file system takes
            return None
        return str(path) if not Path(name).is_absolute() and path.is_relative_to(root) else None
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or any(mark in name for mark in ("://", "::", "\\", "?", "#", "%")):
        return None
    head, chain, rest = base.partition("::")
    slash = "" if head.endswith("://") else "/"
    return f"{head.rstrip('/') if slash else head}{slash}{'/'.join(parts)}{chain}{rest}"


@contextmanager
def told(uri: str) -> Iterator[None]:
    """Turns what a store's driver raises into a StoreError. Drivers share no family of errors, hence `Exception`."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise StoreError(f"{uri}: {reason}", "a readable file", "check its address, its permissions and the store's driver") from error


def size_bytes(uri: str) -> int:
    """The size of a file. Raises StoreError."""
    with told(uri):
        path = local_path(uri)
        if path is not None:
            return path.stat().st_size
        system, name = fsspec.url_to_fs(uri)
        size = system.size(name)
        if size is None:
            raise StoreError(f"{uri} of unknown size", "a store that tells a file's size", "copy the clips to another store")
        return int(size)


def is_file(uri: str) -> bool:
    """Whether a file lies there. Raises StoreError when the store does not answer."""
    with told(uri):
        path = local_path(uri)
        if path is not None:
            return path.is_file()
        system, name = fsspec.url_to_fs(uri)
        return bool(system.isfile(name))


def is_folder(uri: str) -> bool:
    """Whether a folder lies there. Raises StoreError when the store does not answer."""
    with told(uri):
        path = local_path(uri)
        if path is not None:
            return path.is_dir()
        system, name = fsspec.url_to_fs(uri)
        return bool(system.isdir(name))


def read_bytes(uri: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The bytes of a file from `start` to before `stop`, block by block. Raises StoreError."""
    with told(uri), _open(uri) as file:
        file.seek(start)
        left = (stop if stop is not None else size_bytes(uri)) - start
        while left > 0:
            block = file.read(min(BLOCK, left))
            if not block:
                raise StoreError(f"{uri}, which ends early", "a whole file", "copy it again")
            left -= len(block)
            yield block


def sha256(uri: str) -> str:
    """The hash of a file's bytes, hex. Raises StoreError."""
    with told(uri), _open(uri) as file:
        digest = hashlib.sha256()
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """The file as a path: itself where it is local, else a copy that is deleted at the end. Raises StoreError."""
    path = local_path(uri)
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="encore-") as folder:
        copy = Path(folder) / f"file{suffix(uri)}"
        with told(uri), _open(uri) as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target, BLOCK)
        yield copy


def suffix(uri: str) -> str:
    """The ending of a file's name, in small letters, with its dot."""
    return PurePosixPath(uri.partition("::")[0]).suffix.lower()


@contextmanager
def _open(uri: str) -> Iterator[Any]:
    path = local_path(uri)
    if path is not None:
        with path.open("rb") as file:
            yield file
        return
    system, name = fsspec.url_to_fs(uri)  # an archive closes its files when its file system is forgotten: hold on to it
    with system.open(name, "rb") as file:
        yield file
