"""CSV tables from outside, checked before use."""

from __future__ import annotations

import csv
from pathlib import Path

from fl_core.contracts.errors import DataError


def read_csv(path: Path, *, required: tuple[str, ...], limit_rows: int = 10_000_000) -> list[dict[str, str]]:
    """The rows of a UTF-8 CSV file with a header. Raises DataError naming the file, the column or the line."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            header = reader.fieldnames or []
            missing = [name for name in required if name not in header]
            if missing:
                raise DataError(
                    f"{path}: column {missing[0]!r} is missing", remedy=f"columns found: {', '.join(header) or 'none'}"
                )
            rows: list[dict[str, str]] = []
            for row in reader:
                if None in row or any(value is None for value in row.values()):
                    raise DataError(f"{path}: line {reader.line_num} does not have {len(header)} fields")
                rows.append(row)
                if len(rows) > limit_rows:
                    raise DataError(f"{path}: more than {limit_rows:,} rows")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: not readable as CSV: {error}") from None
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows
