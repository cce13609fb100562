"""Model arrays: an ordered mapping from parameter (or buffer) name to ndarray, and its safetensors form."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as safetensors_load
from safetensors.numpy import save as safetensors_save

from fl_core.contracts.errors import IntegrityError

Arrays = Mapping[str, npt.NDArray[np.generic]]
PIECE_BYTES = 1 << 20
SAFETENSORS_NAMES = {
    **{f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint", "float") for bits in (16, 32, 64)},
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def to_bytes(arrays: Arrays) -> bytes:
    """safetensors; shapes are kept, those of 0 dimensions too (``ascontiguousarray`` would make them 1)."""
    return safetensors_save({name: np.asarray(a, order="C") for name, a in arrays.items()})


DTYPES = {kind: np.dtype(name) for name, kind in SAFETENSORS_NAMES.items()}


def header(
    table: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The beginning of a safetensors file whose arrays of these types and shapes follow in this order, without gaps."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in table.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": SAFETENSORS_NAMES[dtype.name], "shape": list(shape), "data_offsets": [begin, end]}
    data = json.dumps(entries).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


def data_pieces(array: npt.NDArray[Any], size: int = PIECE_BYTES) -> Iterator[memoryview]:
    flat = np.asarray(array, order="C").reshape(-1).view(np.uint8)
    for start in range(0, flat.size, size):
        yield flat[start : start + size].data


def pieces(
    arrays: Arrays, size: int = PIECE_BYTES, metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """safetensors in pieces of at most about ``size`` bytes, for arrays too large to be copied whole; joined they are
    what ``from_bytes`` reads. The arrays must not change meanwhile.
    """
    yield header({name: (a.dtype, a.shape) for name, a in arrays.items()}, metadata)
    for array in arrays.values():
        yield from data_pieces(array, size)


def from_bytes(data: bytes, *, origin: str) -> dict[str, npt.NDArray[np.generic]]:
    """safetensors holds no code; a truncated or inconsistent file raises IntegrityError naming ``origin``."""
    try:
        return dict(safetensors_load(data))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise IntegrityError(f"{origin}: not a readable safetensors file: {error}") from None


def fingerprint(arrays: Arrays) -> str:
    """sha256 over names, dtypes, shapes and values, in sorted order: equal for equal models, wherever they are stored."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        digest.update(json.dumps([name, str(array.dtype), list(array.shape)]).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def check_like(arrays: Arrays, reference: Arrays, *, origin: str) -> None:
    """Raises IntegrityError unless names, dtypes and shapes are those of ``reference`` and every float is finite."""
    if set(arrays) != set(reference):
        odd = sorted(set(arrays) ^ set(reference))[0]
        raise IntegrityError(f"{origin}: array {odd!r} is {'unexpected' if odd in arrays else 'missing'}")
    for name, expected in reference.items():
        got = arrays[name]
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise IntegrityError(
                f"{origin}: array {name!r} is {got.dtype}{got.shape}, expected {expected.dtype}{expected.shape}"
            )
        if got.dtype.kind == "f" and not np.isfinite(got).all():
            raise IntegrityError(f"{origin}: array {name!r} holds values that are not finite")
