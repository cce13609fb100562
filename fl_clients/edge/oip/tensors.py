"""Between the protocol's tensors and numpy arrays; nothing that comes in is trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.contracts.errors import InputError

Array = npt.NDArray[Any]
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**32  # empty dimensions counted as one: numpy refuses larger shapes even without elements

# datatype -> (numpy dtype, field of InferTensorContents); FP16 has no field and travels in raw contents only.
DATATYPES: Mapping[str, tuple[str, str]] = {
    "BOOL": ("bool", "bool_contents"),
    "INT8": ("int8", "int_contents"),
    "INT16": ("int16", "int_contents"),
    "INT32": ("int32", "int_contents"),
    "INT64": ("int64", "int64_contents"),
    "UINT8": ("uint8", "uint_contents"),
    "UINT16": ("uint16", "uint_contents"),
    "UINT32": ("uint32", "uint_contents"),
    "UINT64": ("uint64", "uint64_contents"),
    "FP16": ("float16", ""),
    "FP32": ("float32", "fp32_contents"),
    "FP64": ("float64", "fp64_contents"),
}
NAMES = {dtype: name for name, (dtype, _) in DATATYPES.items()}
WIDE = {"int_contents": np.int32, "uint_contents": np.uint32}


def datatype(dtype: Any) -> str:
    return NAMES[str(np.dtype(dtype))]


def decode_inputs(inputs: Sequence[Any], raw: Sequence[bytes], *, max_batch: int) -> dict[str, Array]:
    """Arrays by name from typed or from raw contents (never both). Raises InputError naming the tensor."""
    if raw and len(raw) != len(inputs):
        raise InputError(f"{len(raw)} raw contents for {len(inputs)} inputs")
    arrays: dict[str, Array] = {}
    for i, tensor in enumerate(inputs):
        if tensor.name in arrays:
            raise InputError(f"input {tensor.name!r} is given twice")
        arrays[tensor.name] = _decode(tensor, raw[i] if raw else None, max_batch)
    return arrays


def _decode(tensor: Any, raw: bytes | None, max_batch: int) -> Array:
    if tensor.datatype not in DATATYPES:
        raise InputError(
            f"input {tensor.name!r}: datatype {tensor.datatype!r} is not supported",
            remedy=f"accepted: {', '.join(DATATYPES)}",
        )
    dtype, field = DATATYPES[tensor.datatype]
    shape = tuple(tensor.shape)
    if not 1 <= len(shape) <= MAX_DIMENSIONS or min(shape) < 0 or math.prod(max(d, 1) for d in shape) > MAX_ELEMENTS:
        raise InputError(f"input {tensor.name!r}: shape {list(shape)} is not usable")
    if shape[0] > max_batch:
        raise InputError(f"input {tensor.name!r}: a batch of {shape[0]}, over the limit of {max_batch}")
    count = math.prod(shape)
    if raw is not None:
        if tensor.HasField("contents"):
            raise InputError(f"input {tensor.name!r} has typed contents beside raw contents")
        return _from_raw(tensor.name, raw, np.dtype(dtype).newbyteorder("<"), shape, count)
    values = getattr(tensor.contents, field) if field else ()
    if len(values) != count:
        raise InputError(
            f"input {tensor.name!r}: {len(values)} values in {field or 'no field'}, its shape has {count}",
            remedy="fill the field of its datatype, or send raw contents",
        )
    return _narrowed(tensor.name, values, dtype, field).reshape(shape)


def _from_raw(name: str, raw: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], count: int) -> Array:
    if len(raw) != count * dtype.itemsize:
        raise InputError(f"input {name!r}: {len(raw)} bytes, its shape and datatype make {count * dtype.itemsize}")
    array = np.frombuffer(raw, dtype)
    if dtype == np.bool_ and array.view(np.uint8).max(initial=0) > 1:
        raise InputError(f"input {name!r}: a BOOL is 0 or 1")
    return array.astype(dtype.newbyteorder("="), copy=False).reshape(shape)


def _narrowed(name: str, values: Any, dtype: str, field: str) -> Array:
    """The protocol has no field for 8 and 16 bits: they travel as 32, and must fit."""
    wide = np.array(values, WIDE.get(field, dtype))
    narrow = wide.astype(dtype)
    if field in WIDE and not np.array_equal(wide, narrow):
        raise InputError(f"input {name!r}: a value does not fit its datatype")
    return narrow


def fill_output(tensor: Any, name: str, array: Array) -> None:
    tensor.name, tensor.datatype = name, datatype(array.dtype)
    tensor.shape.extend(array.shape)


def raw_bytes(array: Array) -> bytes:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def fill_contents(tensor: Any, array: Array) -> None:
    """Typed contents; raises InputError for FP16, which has none."""
    field = DATATYPES[tensor.datatype][1]
    if not field:
        raise InputError(f"output {tensor.name!r}: FP16 travels in raw contents only")
    getattr(tensor.contents, field).extend(array.ravel().tolist())
