"""One HTML style, pictures and tables; every room's report goes through it. Needs the extra ``report`` (matplotlib)."""
