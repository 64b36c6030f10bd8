"""Engines, transactions and the database's own troubles in words.

SQLite runs in WAL with `synchronous=FULL`: a committed vote survives kill -9 and power loss. Writers say BEGIN
IMMEDIATE, so that nobody reads, thinks, and then finds that the world moved on. PostgreSQL takes the same code by URL.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from db.errors import RefusedError, StoreError, UnavailableError

BUSY_TIMEOUT_S = 5.0
UPGRADING = int.from_bytes(b"encore")
"""PostgreSQL's lock for whoever makes or migrates a database: there may be no table yet to lock."""

_SQLITE_TROUBLE = {
    "SQLITE_BUSY": ("a locked database", "that no other program holds a write lock", "wait, then try again"),
    "SQLITE_LOCKED": ("a locked database", "that no other program holds a write lock", "wait, then try again"),
    "SQLITE_READONLY": ("a read-only database", "that file and folder are writable", "mend their permissions"),
    "SQLITE_FULL": ("a full disk", "room for the write", "free some space, then try again"),
    "SQLITE_CANTOPEN": (
        "a database that cannot be opened",
        "a readable and writable file in an existing folder",
        "check the path and its permissions",
    ),
    "SQLITE_IOERR": ("an I/O error", "a disk that works", "check the disk and its free space"),
    "SQLITE_CORRUPT": ("a damaged database", "an intact SQLite file", "restore it from a backup"),
    "SQLITE_NOTADB": ("a file that is no database", "an SQLite file", "name another file"),
}
_POSTGRES_TROUBLE = {
    "53100": ("a full disk", "room for the write", "free some space, then try again"),
    "25006": ("a read-only database", "a writable PostgreSQL server", "connect to the primary"),
    "55P03": ("a locked database", "that no other program holds the lock", "wait, then try again"),
    "40P01": ("a deadlock", "that no other program holds the lock", "try again"),
    "40001": ("a serialisation failure", "no concurrent writer", "try again"),
}


def parse_url(url: str) -> URL:
    """The SQLAlchemy URL; PostgreSQL always through psycopg 3, SQLite always a file. Raises StoreError."""
    example = "name one like sqlite:///runs/demo/encore.db or postgresql://user:pw@host/encore"
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise StoreError(f"database url {url!r}", "a database URL", example) from error
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise StoreError(f"database url {_shown(parsed)}", "SQLite or PostgreSQL", example)
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise StoreError("an in-memory SQLite database", "a file that survives the process", example)
    return parsed


def _shown(url: URL) -> str:
    return url.render_as_string(hide_password=True)


def make_engine(url: str | URL, busy_timeout_s: float = BUSY_TIMEOUT_S, foreign_keys: bool = True) -> Engine:
    """An engine whose SQLite transactions are real ones. Connections with option `writes` begin IMMEDIATE.

    Args: foreign_keys: whether SQLite enforces them; off only to make a table anew that others point to.
    """
    parsed = parse_url(url) if isinstance(url, str) else url
    try:
        if parsed.get_backend_name() != "sqlite":
            return create_engine(parsed, pool_size=10, max_overflow=20, pool_pre_ping=True)
        engine = create_engine(parsed, pool_size=40, connect_args={"timeout": busy_timeout_s, "check_same_thread": False})
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        remedy = "pip install 'encore-music[postgres]'"
        raise StoreError(f"{_shown(parsed)} without its driver", "an installed database driver", remedy) from error

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # the driver must not begin behind our back; _begin does
        for pragma in ("journal_mode=WAL", "synchronous=FULL", f"foreign_keys={'ON' if foreign_keys else 'OFF'}"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


@contextmanager
def told_in_words(url: URL) -> Iterator[None]:
    """Turns a database in trouble into `UnavailableError`; errors that are our own bugs pass as they are."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        cause: BaseException | None = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(error, DataError):
            raise RefusedError("a value the database cannot hold", "text without NUL, numbers in range", "correct it") from error
        trouble: tuple[str, str, str] | None = None
        if isinstance(cause, sqlite3.Error):
            name = getattr(cause, "sqlite_errorname", "")
            trouble = next((t for code, t in _SQLITE_TROUBLE.items() if name.startswith(code)), None)
        elif isinstance(error, PoolTimeout):
            trouble = ("no free database connection", "a free one within 30 s", "wait, then try again")
        elif isinstance(error, DBAPIError):
            state = getattr(cause, "sqlstate", None)
            trouble = _POSTGRES_TROUBLE.get(state or "")
            if trouble is None and (error.connection_invalidated or state is None or state[:2] in ("08", "28", "57")):
                trouble = (
                    f"no answer from the database ({type(cause).__name__})",
                    "a running server that accepts this user",
                    "start it or correct the URL",
                )
        if trouble is None:
            raise
        raise UnavailableError(f"{trouble[0]} ({_shown(url)})", trouble[1], trouble[2]) from error


class Transactions:
    """Opens transactions: `read()` sees one consistent state, `write()` commits when its block ends well.

    `read_core()` and `write_core()` are the same without the ORM, for what happens at every vote: a session costs as much CPU as
    five statements.
    """

    def __init__(self, engine: Engine, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        self.engine = engine
        self._writer = engine.execution_options(writes=True)
        self._timeout_s = 6 * busy_timeout_s  # many of our own threads may stand before one that waits for SQLite
        # SQLite polls for its write lock; queueing our own threads here is fair and cheaper.
        self._turn = threading.Lock() if engine.dialect.name == "sqlite" else None

    @contextmanager
    def read(self) -> Iterator[Session]:
        with told_in_words(self.engine.url), Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        with (
            self._my_turn(),
            told_in_words(self.engine.url),
            Session(self._writer, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    @contextmanager
    def read_core(self) -> Iterator[Connection]:
        with told_in_words(self.engine.url), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def write_core(self) -> Iterator[Connection]:
        with self._my_turn(), told_in_words(self.engine.url), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def _my_turn(self) -> Iterator[None]:
        if self._turn and not self._turn.acquire(timeout=self._timeout_s):
            trouble = _SQLITE_TROUBLE["SQLITE_BUSY"]
            raise UnavailableError(f"{trouble[0]} ({_shown(self.engine.url)})", trouble[1], trouble[2])
        try:
            yield
        finally:
            if self._turn:
                self._turn.release()


def upgrade(url: str, revision: str = "head") -> None:
    """Brings the database at `url` to the newest schema; an empty one is made from nothing. Safe to call again.

    Raises: StoreError when the database is newer than this code, cannot be opened, or is not ours.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        folder = Path(parsed.database).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"folder {folder}: {error.strerror}", "a writable folder", "choose another") from error
    engine = make_engine(parsed, foreign_keys=False)
    try:
        with told_in_words(parsed), engine.execution_options(writes=True).begin() as connection:
            _upgrade(connection, revision)
            if parsed.get_backend_name() == "sqlite" and (broken := connection.exec_driver_sql("pragma foreign_key_check").all()):
                got = f"{len(broken)} rows that point nowhere, the first in {broken[0][0]}"
                raise StoreError(got, "a database without loose ends", "restore it from a backup")
    finally:
        engine.dispose()


def _upgrade(connection: Connection, revision: str) -> None:
    from alembic import command  # only when a database is opened for the first time or is old
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    if connection.dialect.name == "postgresql":
        connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": UPGRADING})
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    at = current_revision(connection)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if at is not None and at not in known:
        raise StoreError(f"a database at revision {at}", f"one of {sorted(known)}", "update Encore, or name another")
    if at is None and (tables := set(inspect(connection).get_table_names())) & {"vote", "campaign", "rater"}:
        raise StoreError(f"foreign tables {sorted(tables)}", "an empty database or one of Encore's", "name another")
    command.upgrade(config, revision)


def current_revision(connection: Connection) -> str | None:
    """The alembic revision written in the database, or None."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("select version_num from alembic_version")).scalar_one_or_none()
