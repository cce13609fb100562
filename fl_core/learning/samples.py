"""Samples: what a device collects one by one, before it is a data set. Each application says how, beside its loader. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample with its content file. time: seconds since 1970. label: canonical JSON, None until it is known.

    facts: what ``SampleFormat.check`` found.
    """

    id: str
    path: Path
    time: float
    label: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def _fits(sample: Sample, config: Any) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class SampleFormat:
    """suffixes: of content files; arrays are encoded as the first one.

    check(path) -> facts, JSON; ``schema`` in them must be the same for all samples of one store. Reads the whole file;
        raises DataError for one that is damaged or not in the format.
    label(value) -> the canonical form of a label; raises DataError.
    encode(arrays) -> content; raises DataError.
    write(samples, folder, client, config): a new data set in the application's format in the empty ``folder``, content as
        hard links where the format has files; a sample without a label gets a placeholder, which inference does not read.
    fits(sample, config): whether the label can be learned from, under this configuration where one is given.
    """

    suffixes: tuple[str, ...]
    check: Callable[[Path], dict[str, Any]]
    label: Callable[[Any], Any]
    encode: Callable[[Mapping[str, npt.NDArray[Any]]], bytes]
    write: Callable[[Sequence[Sample], Path, str, Any], None]
    fits: Callable[[Sample, Any], bool] = _fits


def npz_bytes(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Arrays as an npz file without pickles."""
    import io

    out = io.BytesIO()
    np.savez_compressed(out, allow_pickle=False, **arrays)
    return out.getvalue()
