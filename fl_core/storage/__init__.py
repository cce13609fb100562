"""Atomic files, SQLite in WAL mode, append-only logs, bounded archive reading."""
