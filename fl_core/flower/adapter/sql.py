"""Statements on the SuperLink's own connection without SQLAlchemy's share of each (some 0.2 ms, ten times SQLite's)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Values = Mapping[str, Any] | Sequence[Mapping[str, Any]]


class Sql:
    """``sql(statement, values)`` -> rows as dicts; inside the state's transaction, which commits or rolls back it too.

    A sequence of values runs the statement once for each. The statement begins with its verb: that is how Python's
    sqlite3 knows that a transaction must be open.
    """

    def __init__(self, state: Any) -> None:
        self._state = state

    def __call__(self, statement: str, values: Values | None = None) -> list[dict[str, Any]]:
        with self._state.session() as session:
            connection = session.connection().connection.driver_connection
            if values is not None and not isinstance(values, Mapping):
                connection.executemany(statement, values)
                return []
            cursor = connection.execute(statement, values or {})
            if cursor.description is None:
                return []
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
