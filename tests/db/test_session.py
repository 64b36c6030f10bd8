"""Opening, migrating, and what is said when the database is in trouble."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import inspect, select, text
from sqlalchemy.exc import IntegrityError

from db import migrations
from db.errors import StoreError, UnavailableError
from db.quality import Rules, tally
from db.schema import Assignment, Base, Campaign, Rater, Vote
from db.session import make_engine, parse_url, upgrade
from db.store import Store, open_store
from tests.postgres import Postgres


def partly(index: dict) -> str:
    """The condition of an index over some rows only, or nothing."""
    return "".join(str(value) for key, value in sorted(index.get("dialect_options", {}).items()) if key.endswith("_where"))


def constraints(engine: object) -> dict:
    look = inspect(engine)
    return {
        table: {
            "columns": sorted((c["name"], str(c["type"]), c["nullable"]) for c in look.get_columns(table)),
            "checks": sorted((c["name"], c["sqltext"]) for c in look.get_check_constraints(table)),
            "uniques": sorted((c["name"], c["column_names"]) for c in look.get_unique_constraints(table)),
            "foreign": sorted((c["name"], c["referred_table"]) for c in look.get_foreign_keys(table)),
            "indexes": sorted((c["name"], c["column_names"], partly(c)) for c in look.get_indexes(table)),
        }
        for table in look.get_table_names()
        if table != "alembic_version"
    }


def test_migrations_from_nothing_make_exactly_the_models(db_url: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    upgrade(db_url)
    other = request.getfixturevalue("postgres").new_database() if "postgresql" in db_url else f"sqlite:///{tmp_path / 'made.db'}"
    migrated, made = make_engine(db_url), make_engine(other)
    Base.metadata.create_all(made)
    with migrated.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    assert constraints(migrated) == constraints(made)
    migrated.dispose()
    made.dispose()


def test_upgrade_twice_keeps_what_is_stored(db_url: str) -> None:
    with open_store(db_url) as store:
        token = store.add_rater("ada")
    with open_store(db_url) as store:
        assert store.sign_in("ada", token) is not None


def test_two_programs_that_open_a_new_database_at_once_make_it_once(db_url: str) -> None:
    slowly = "import sys, time, db.session as s; look = s.current_revision; s.current_revision = lambda c: (look(c), time.sleep(2))[0]; "
    command = [sys.executable, "-c", slowly + "s.upgrade(sys.argv[1])", db_url]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [program.communicate(timeout=60)[1] for program in both] == ["", ""]


def test_votes_of_the_first_schema_come_through_the_second(db_url: str) -> None:
    upgrade(db_url, "0001")
    old = make_engine(db_url)
    at = "'2026-01-01 00:00:00'"
    with old.begin() as connection:
        for statement in (
            f"insert into campaign values (1, 'c', 1, 0, 'open', {at})",
            f"insert into rater values (1, 'ada', 'x', 'rater', 'active', 0, {at})",
            f"insert into rater values (2, 'own', 'y', 'admin', 'active', 0, {at})",
            "insert into prompt values (1, 'p', 'sad piano', 'h', 'train')",
            *(
                "insert into clip (id, prompt_id, sha256, uri, size_bytes, duration_ms, sample_rate, system, adapters, gen, created_at) "
                f"values ({i}, 1, 's{i}', 'u', 1, 1000, 16000, 'base', '[]', '{{}}', {at})"
                for i in (1, 2)
            ),
            "insert into pair values (1, 1, 1, 1, 2, 0, 0, null, 1, 1)",
            f"insert into assignment values ('as1', 1, 1, 0, true, 'least-voted-24', 1.0, 'voted', null, {at}, {at})",
            f"insert into vote values (1, 'as1', 1, 'key-00001', 'a', 2, 'fine', 5, 6, '[]', null, {at})",
        ):
            connection.execute(text(statement))
    old.dispose()
    with open_store(db_url) as store, store.read() as session:
        vote = session.scalars(select(Vote)).one()
        assert (vote.choice, vote.confidence, vote.comment, vote.coverage_a) == ("a", 2, "fine", None)
        assert session.scalars(select(Assignment)).one().kind == "normal"
        assert [rater.role for rater in session.scalars(select(Rater).order_by(Rater.id))] == ["rater", "owner"]
        assert session.scalars(select(Campaign)).one().chooser == "least_voted"
    with open_store(db_url) as store, pytest.raises(IntegrityError), store.write() as session:
        session.execute(text("delete from rater where id = 1"))  # the vote points to it: foreign keys hold after the rebuild


def downgrade(url: str, revision: str) -> None:
    """Takes a database back to an older schema, as `upgrade` brings it to a newer one."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("path_separator", "os")
    engine = make_engine(url, foreign_keys=False)
    with engine.execution_options(writes=True).begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, revision)
    engine.dispose()


def shape(url: str) -> dict:
    engine = make_engine(url)
    found = constraints(engine)
    engine.dispose()
    return found


def run(url: str, *statements: str) -> list:
    """The rows of the last statement."""
    engine = make_engine(url)
    with engine.begin() as connection:
        rows = [connection.execute(text(statement)) for statement in statements][-1]
        found = rows.all() if rows.returns_rows else []
    engine.dispose()
    return found


AT = "'2026-01-01 00:00:00'"
TWO_CLIPS = (
    "insert into prompt values (1, 'p', 'sad piano', 'h', 'train')",
    *(
        "insert into clip (id, prompt_id, sha256, uri, size_bytes, duration_ms, sample_rate, system, adapters, gen, created_at) "
        f"values ({i}, 1, 's{i}', 'u', 1, 6000, 16000, '{system}', '[]', '{{}}', {AT})"
        for i, system in ((1, "base"), (2, "dpo"))
    ),
)


def test_old_assignments_are_given_what_they_asked_for_and_lose_it_again(db_url: str) -> None:
    upgrade(db_url, "0005")
    before = shape(db_url)
    heard = {1: None, 2: (5000, 4000, "null"), 3: (300, 700, "null"), 4: (0, 0, "'import:v.csv'")}
    run(
        db_url,
        *TWO_CLIPS,
        f"insert into campaign (id, name, target_votes, min_listen_ms, status, aspects, created_at) "
        f"values (1, 'c', 9, 3000, 'open', '[\"musicality\"]', {AT})",
        "insert into pair (id, campaign_id, prompt_id, clip_x_id, clip_y_id, gain_x_db, gain_y_db, target_votes, n_open) "
        "values (1, 1, 1, 1, 2, 0, 0, 9, 4)",
        *(
            f"insert into rater (id, handle, token_sha256, role, status, session_epoch, created_at) "
            f"values ({i}, 'rater {i}', '{i}', 'rater', 'active', 0, {AT})"
            for i in heard
        ),
        *(
            "insert into assignment (id, pair_id, rater_id, rep, swapped, policy, propensity, status, issued_at, expires_at) "
            f"values ('as{i}', 1, {i}, 0, true, 'least-voted-24', 1.0, '{'voted' if said else 'leased'}', {AT}, {AT})"
            for i, said in heard.items()
        ),
        *(
            "insert into vote (id, assignment_id, rater_id, idempotency_key, choice, listen_a_ms, listen_b_ms, source, events, created_at) "
            f"values ({i}, 'as{i}', {i}, 'k{i}', 'a', {said[0]}, {said[1]}, {said[2]}, '[]', {AT})"
            for i, said in heard.items()
            if said
        ),
    )
    kept = run(db_url, "select * from assignment order by id"), run(db_url, "select * from vote order by id")
    for _ in range(2):
        with open_store(db_url) as store, store.read() as session:
            asked = [(row.min_listen_ms, row.aspects) for row in session.scalars(select(Assignment).order_by(Assignment.id))]
            # The third was taken under a lower rule, which nobody wrote down; the fourth was given elsewhere.
            assert asked == [(least, ["musicality"]) for least in (3000, 3000, 300, 0)]
            campaign = session.scalars(select(Campaign)).one()
            assert [cell.reason for cell in tally(session, campaign, Rules())] == [None] * 3
        downgrade(db_url, "0005")
        assert shape(db_url) == before
        assert (run(db_url, "select * from assignment order by id"), run(db_url, "select * from vote order by id")) == kept


def test_old_pairs_are_given_the_names_of_their_clips_and_lose_them_again(db_url: str) -> None:
    upgrade(db_url, "0006")
    before = shape(db_url)
    run(
        db_url,
        *TWO_CLIPS,
        f"insert into campaign (id, name, target_votes, min_listen_ms, status, created_at) values (1, 'c', 9, 3000, 'open', {AT})",
        "insert into pair (id, campaign_id, prompt_id, clip_x_id, clip_y_id, gain_x_db, gain_y_db, gold, target_votes, n_open, priority) "
        "values (1, 1, 1, 1, 2, -1.5, 0, 'y', 9, 4, 0.25)",
    )
    kept = run(db_url, "select * from pair")
    for _ in range(2):
        upgrade(db_url)
        assert run(db_url, "select system_x, system_y, gold, priority from pair") == [("base", "dpo", "y", 0.25)]
        downgrade(db_url, "0006")
        assert shape(db_url) == before
        assert run(db_url, "select * from pair") == kept


def test_what_was_once_found_of_raters_goes_and_its_table_comes_again(db_url: str) -> None:
    upgrade(db_url, "0007")
    before = shape(db_url)
    upgrade(db_url)
    assert shape(db_url).keys() == before.keys() - {"rater_quality"}
    downgrade(db_url, "0007")
    assert shape(db_url) == before


def test_a_database_of_a_newer_encore_is_refused(db_url: str) -> None:
    upgrade(db_url)
    engine = make_engine(db_url)
    with engine.begin() as connection:
        connection.execute(text("update alembic_version set version_num = '9999'"))
    engine.dispose()
    with pytest.raises(StoreError, match="9999"):
        upgrade(db_url)


def test_somebody_elses_tables_are_left_alone(sqlite_url: str, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "votes.db") as connection:
        connection.execute("create table vote (mine text)")
    connection.close()
    with pytest.raises(StoreError, match="foreign tables"):
        upgrade(sqlite_url)


@pytest.mark.parametrize("url", ["nonsense", "mysql://host/db", "sqlite://", "sqlite:///:memory:"])
def test_a_url_that_cannot_hold_votes_is_refused(url: str) -> None:
    with pytest.raises(StoreError):
        open_store(url)


def test_a_password_is_never_shown() -> None:
    with pytest.raises(StoreError) as caught:
        parse_url("mysql://ada:hunter2@host/db")
    assert "hunter2" not in str(caught.value)


def test_postgresql_goes_through_psycopg() -> None:
    assert parse_url("postgresql://ada@host/db").drivername == "postgresql+psycopg"


def test_a_postgresql_database_that_is_not_there_says_so(postgres: Postgres) -> None:
    with pytest.raises(UnavailableError, match="no answer from the database"):
        open_store(postgres.url("nowhere"))


def test_a_vote_is_flushed_to_the_disk_before_it_is_acknowledged(sqlite_store: Store) -> None:
    with sqlite_store.read() as session:
        assert session.execute(text("pragma synchronous")).scalar() == 2  # FULL
        assert session.execute(text("pragma journal_mode")).scalar() == "wal"
        assert session.execute(text("pragma foreign_keys")).scalar() == 1


def test_a_locked_database_says_so_and_works_again_afterwards(sqlite_url: str, tmp_path: Path) -> None:
    with open_store(sqlite_url, busy_timeout_s=0.05) as store:
        other = sqlite3.connect(tmp_path / "votes.db", isolation_level=None)
        other.execute("begin immediate")
        with pytest.raises(UnavailableError, match="locked database"):
            store.add_rater("ada")
        other.execute("rollback")
        other.close()
        assert store.add_rater("ada")


def test_a_full_disk_says_so_and_stores_nothing(sqlite_store: Store, make_rows: Callable, tmp_path: Path) -> None:
    rows = make_rows(40)
    with sqlite_store.engine.connect() as connection:
        pages = connection.execute(text("pragma page_count")).scalar()
    # SQLite answers SQLITE_FULL at its page limit just as it does on a disk without room.
    with sqlite_store.write() as session:
        session.execute(text(f"pragma max_page_count = {pages + 1}"))
    with pytest.raises(UnavailableError, match="full disk"):
        sqlite_store.create_campaign("c", rows, tmp_path / "clips")
    assert sqlite_store.stats().campaigns == []


def test_a_read_only_database_says_so(sqlite_url: str, tmp_path: Path) -> None:
    open_store(sqlite_url).close()
    with (
        Store(f"sqlite:///file:{tmp_path / 'votes.db'}?mode=ro&uri=true") as store,
        pytest.raises(UnavailableError, match="read-only database"),
    ):
        store.add_rater("ada")


def test_a_file_that_is_no_database_says_so(tmp_path: Path) -> None:
    (tmp_path / "song.db").write_bytes(b"RIFF" * 1000)
    with pytest.raises(StoreError, match="no database"):
        open_store(f"sqlite:///{tmp_path / 'song.db'}")


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="folder"):
        open_store(f"sqlite:///{tmp_path / 'file' / 'sub' / 'votes.db'}")


def test_a_copy_of_a_closed_database_is_complete(sqlite_url: str, tmp_path: Path) -> None:
    with open_store(sqlite_url) as store:
        token = store.add_rater("ada")
    shutil.copy(tmp_path / "votes.db", tmp_path / "copy.db")
    with open_store(f"sqlite:///{tmp_path / 'copy.db'}") as copy:
        assert copy.sign_in("ada", token) is not None


def test_db_imports_neither_torch_nor_the_web() -> None:
    code = (
        "import sys, db.store, db.export, db.session; "
        "bad = {'torch', 'transformers', 'fastapi', 'gradio', 'base_models'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
