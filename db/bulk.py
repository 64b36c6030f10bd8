"""Many rows at a time: found by their keys in one question, added in one statement. For what would take a statement a row otherwise.
And one row that others may add at the same moment."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import String, and_, cast, column, func, insert, literal, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from db.schema import Base


def find(session: Session, columns: Sequence[Any], at: Sequence[Any], keys: Iterable[tuple[Any, ...]]) -> Any:
    """The rows of these columns where the columns `at` are one of the keys: one parameter, and one look into the index for each."""
    packed = json.dumps(list(dict.fromkeys(keys)))
    if session.get_bind().dialect.name == "sqlite":
        wanted = func.json_each(packed).table_valued("value", name="wanted")
        cells: list[Any] = [func.json_extract(wanted.c.value, f"$[{i}]") for i in range(len(at))]
    else:
        wanted = func.jsonb_array_elements(cast(literal(packed, String), JSONB)).table_valued(column("value", JSONB), name="wanted")
        cells = [cast(wanted.c.value[i].astext, one.type) for i, one in enumerate(at)]
    meets = and_(*(one == cell for one, cell in zip(at, cells)))
    return session.execute(select(*columns).select_from(wanted).join(at[0].class_, meets))


def add(session: Session, table: type[Base], rows: list[dict[str, Any]]) -> None:
    """Inserts rows in order; what only some of them say is none in the others."""
    columns = dict.fromkeys(name for row in rows for name in row)
    if rows:
        session.connection().execute(insert(table), [{name: row.get(name) for name in columns} for row in rows])


def add_missing(session: Session, table: type[Base], row: dict[str, Any]) -> bool:
    """Inserts a row unless its key is taken; whether it did. Of two who add the same at once the second waits for the first."""
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    added = dialect.insert(table).values(row).on_conflict_do_nothing().returning(literal(1))
    return session.connection().execute(added).first() is not None
