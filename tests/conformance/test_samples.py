"""Every application's sample format: what is damaged or is no label is refused, never raised as something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fl_core.contracts.errors import DataError
from fl_core.learning.application import application
from fl_core.learning.samples import SampleFormat, npz_bytes
from tests.helpers import APPLICATIONS

FORMATS = {name: found for name in APPLICATIONS if (found := application(name).samples) is not None}
EVERY = pytest.mark.parametrize("name", sorted(FORMATS))


def found(name: str) -> SampleFormat:
    return FORMATS[name]


@EVERY
def test_suffixes_are_lower_case_and_not_those_of_messages_and_labels(name: str) -> None:
    suffixes = found(name).suffixes
    assert suffixes
    assert all(s == s.lower() and s[0] == "." for s in suffixes)
    assert not {".json", ".jsonl", ".csv"} & set(suffixes)


@EVERY
@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n", b"PK\x03\x04cut", b"\xff\xd8\xff", npz_bytes({"q": np.zeros(2)})]
)
def test_a_damaged_file_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    for suffix in found(name).suffixes:
        file = tmp_path / f"sample{suffix}"
        file.write_bytes(content)
        with pytest.raises(DataError):
            found(name).check(file)


@EVERY
@pytest.mark.parametrize("value", [None, True, [], {}, "", float("nan"), {"x": 1}])
def test_what_is_no_label_is_refused(name: str, value: object) -> None:
    with pytest.raises(DataError):
        found(name).label(value)


@EVERY
def test_arrays_of_another_kind_are_refused(name: str) -> None:
    for arrays in ({}, {"unknown": np.zeros(3)}, {"x": np.zeros((2, 2)), "X": np.zeros(3), "image": np.zeros(3)}):
        with pytest.raises(DataError):
            found(name).encode(arrays)
