"""The adapter stores and drops whole trees in a few statements; Flower's ObjectStore, object by object, is the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_core.contracts.errors import IntegrityError
from fl_core.flower import adapter, wire
from fl_core.flower.adapter import LinkStore
from fl_core.flower.messages import Reply

Tree = tuple[Any, dict[str, bytes]]  # ObjectTree, contents by id


def make(kind: str, children: list[Tree], salt: int) -> Tree:
    """An object with Flower's head; equal arguments make equal ids."""
    names = list(dict.fromkeys(tree.object_id for tree, _ in children))
    body = b"%d" % salt
    content = f"{kind} {','.join(names)} {len(body)}".encode() + b"\0" + body
    contents: dict[str, bytes] = {}
    for _, below in children:
        contents.update(below)
    unique = {tree.object_id: tree for tree, _ in children}
    name = wire.object_id(content)
    return wire.message.ObjectTree(object_id=name, children=list(unique.values())), {**contents, name: content}


LEAVES = st.integers(0, 3).map(lambda salt: make("ArrayChunk", [], salt))
ARRAYS = st.lists(LEAVES, max_size=3).map(lambda below: make("Array", below, 0))
RECORDS = st.lists(ARRAYS, max_size=3).map(lambda below: make("ArrayRecord", below, 1))
ROOTS = st.tuples(st.lists(RECORDS, max_size=2), st.integers(0, 2)).map(lambda t: make("RecordDict", *t))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LinkStore, LinkStore]]:
    folder = tmp_path_factory.mktemp("stores")
    found = LinkStore(folder / "ours.db"), LinkStore(folder / "flower.db")
    yield found
    for store in found:
        store._state._engine.dispose()
        store._store._engine.dispose()


def content_of(store: LinkStore) -> list[list[tuple[Any, ...]]]:
    tables = {
        "objects": "object_id, content, is_available, ref_count",
        "object_children": "parent_id, child_id",
        "run_objects": "run_id, object_id",
    }
    return [
        sorted(tuple(row.values()) for row in store._state.query(f"SELECT {columns} FROM {table}"))
        for table, columns in tables.items()
    ]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.booleans(), ROOTS), max_size=8))
def test_the_same_rows_after_any_sequence(stores: tuple[LinkStore, LinkStore], steps: list[tuple[bool, Tree]]) -> None:
    ours, flower = stores
    for store in stores:
        store._store.clear()
    for add, (tree, contents) in steps:
        if add:
            with ours.together():
                ours._objects.add(7, contents.items(), "test")
            missing = flower._store.preregister(7, tree)
            for name in missing:
                flower._store.put(name, contents[name])
        else:
            with ours.together():
                ours._objects.sweep([tree.object_id])
            flower._store.delete(tree.object_id)
        assert content_of(ours) == content_of(flower)


def test_a_reference_to_nothing_is_refused_and_undone(stores: tuple[LinkStore, LinkStore]) -> None:
    ours, _ = stores
    ours._store.clear()
    tree, contents = make("RecordDict", [make("ArrayRecord", [], 0)], 0)
    with pytest.raises(IntegrityError, match="not there"), ours.together():
        ours._objects.add(7, [(tree.object_id, contents[tree.object_id])], "test")
    assert content_of(ours) == [[], [], []]


def test_arrays_joined_once_are_those_of_flower() -> None:
    """Several chunks, equal ones that two arrays share, none at all; and chunks that are not what an array names."""
    adapter.assume_identity(run_id=1, task_id=1, node_id=1)
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"large": rng.normal(size=(700, 500)), "scalar": np.array(3.0), "empty": np.zeros((0, 3))}
    arrays |= {"zeros": np.zeros(600_000, np.float32), "more zeros": np.zeros((2, 600_000), np.float32)}
    reply = Reply(num_examples=1, metrics={}, arrays=arrays)
    _, _, objects = adapter.deflate(Message(reply.to_record(), 1, "train"))
    root = list(objects)[-1]
    found = adapter.inflate(root, dict(objects), origin="test").content.array_records["arrays"]
    expected = inflate_object_from_contents(root, dict(objects)).content.array_records["arrays"]  # type: ignore[attr-defined]
    assert {n: vars(a)["data"] for n, a in found.items()} == {n: vars(a)["data"] for n, a in expected.items()}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name].numpy(), array)
    chunks = [i for i, content in objects.items() if content.startswith(b"ArrayChunk ")]
    for wrong in (objects[root], b"ArrayChunk  1", b"", objects[list(objects)[-2]]):
        with pytest.raises(IntegrityError, match="test: message is not readable"):
            adapter.inflate(root, {**objects, chunks[0]: wrong}, origin="test")
