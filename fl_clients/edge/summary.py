"""What leaves the device about its predictions: counts, means and quantiles; never an example, an id or a single score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SMALLEST_COUNT = 5  # quantiles of fewer values would be the values
LABEL_LIMIT = 100


def summarize(columns: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """``columns``: an application's postprocessed columns, (N,) each.

    Numbers give mean and quantiles, names and whole numbers give counts by value. Values that are not finite are counted apart.
    """
    found: dict[str, Any] = {}
    for name in ("score", "prediction"):
        if name in columns:
            values = np.asarray(columns[name])
            found[name] = _numbers(values) if values.dtype.kind == "f" else _counts(values)
    return found


def _numbers(values: npt.NDArray[Any]) -> dict[str, Any]:
    finite = values[np.isfinite(values)].astype(np.float64)
    result: dict[str, Any] = {"count": int(finite.size), "not_finite": int(values.size - finite.size)}
    if finite.size >= SMALLEST_COUNT:
        result["mean"] = float(finite.mean())
        result["quantiles"] = {
            f"{q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(finite, QUANTILES), strict=True)
        }
    return result


def _counts(values: npt.NDArray[Any]) -> dict[str, Any]:
    common = Counter(str(v)[:64] for v in values.tolist()).most_common(LABEL_LIMIT)
    return {"count": int(values.size), "values": dict(sorted(common))}
