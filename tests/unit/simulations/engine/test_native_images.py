"""Kernels of images and of large matrices against torch, in float64 and float32."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from simulations.engine import native
from tests.unit.simulations.engine.test_native import SMALL, TYPES, near, needs_compiler, numbers, stack, stepped

pytestmark = needs_compiler
PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None, max_examples=80)
@given(
    dtype=TYPES, fused=st.booleans(), clients=st.integers(1, 2), channels=SMALL, outputs=st.integers(1, 20), kernel=PAIRS,
    stride=PAIRS, padding=st.tuples(st.integers(0, 2), st.integers(0, 2)), sides=st.tuples(SMALL, st.integers(1, 14)),
    wanted=st.booleans(),
)  # fmt: skip
def test_convolutions(
    dtype: torch.dtype, fused: bool, clients: int, channels: int, outputs: int, kernel: tuple[int, int],
    stride: tuple[int, int], padding: tuple[int, int], sides: tuple[int, int], wanted: bool,
) -> None:  # fmt: skip
    if any(n + 2 * p < k for n, p, k in zip(sides, padding, kernel, strict=True)):
        return
    made = stack(dtype, clients, fused, w=(outputs, *kernel, channels), b=(outputs,))
    w, b, batch = made.slots["w"], made.slots["b"], 3
    before = w.value.clone(), b.value.clone(), made.slots["before"].value.clone(), made.slots["after"].value.clone()
    x = numbers(dtype, clients * batch, *sides, channels)
    found = native.image(x, w, b, stride, padding)
    near(native.image(x, w, None, stride, padding), found - b.value.repeat_interleave(batch, 0)[:, None, None])
    dy = numbers(dtype, *found.shape, seed=2)
    dx = native.image_backward(x, dy, w, b, stride, padding, wanted=wanted)
    assert (dx is not None) == wanted
    gradients = []
    for k in range(clients):
        part = slice(k * batch, (k + 1) * batch)
        leaves = [t.clone().requires_grad_() for t in (x[part], before[0][k], before[1][k])]
        y = functional.conv2d(leaves[0].permute(0, 3, 1, 2), leaves[1].permute(0, 3, 1, 2), leaves[2], stride, padding)
        y = y.permute(0, 2, 3, 1)
        near(found[part], y.detach())
        one = torch.autograd.grad(y, leaves, dy[part])
        if dx is not None:
            near(dx[part], one[0])
        gradients.append(one)
    stepped(w, before[0], torch.stack([g[1] for g in gradients]))
    stepped(b, before[1], torch.stack([g[2] for g in gradients]))
    assert torch.equal(made.slots["before"].value, before[2])
    assert torch.equal(made.slots["after"].value, before[3])


def test_many_rows_of_an_image_in_blocks() -> None:
    """More rows than one block of the weights' gradient has, and the last block a short one."""
    made = stack(torch.float64, 1, False, w=(40, 3, 3, 24), b=(40,))
    x, dy = numbers(torch.float64, 2, 41, 37, 24), numbers(torch.float64, 2, 39, 35, 40, seed=2)
    native.image_backward(x, dy, made.slots["w"], made.slots["b"], (1, 1), (0, 0), wanted=False)
    leaf = torch.zeros(40, 24, 3, 3, dtype=torch.float64, requires_grad=True)
    y = functional.conv2d(x.permute(0, 3, 1, 2), leaf)
    (expected,) = torch.autograd.grad(y, leaf, dy.permute(0, 3, 1, 2))
    grad = made.slots["w"].grad
    assert grad is not None
    near(grad[0], expected.permute(0, 2, 3, 1))


@settings(deadline=None, max_examples=60)
@given(
    dtype=TYPES, kernel=PAIRS, stride=PAIRS, sides=st.tuples(st.integers(3, 9), st.integers(3, 9)), relu=st.booleans(),
    planar=st.booleans(), halved=st.booleans(),
)  # fmt: skip
def test_pooling(
    dtype: torch.dtype, kernel: tuple[int, int], stride: tuple[int, int], sides: tuple[int, int], relu: bool, planar: bool,
    halved: bool,
) -> None:  # fmt: skip
    padding = (kernel[0] // 2, kernel[1] // 2) if halved else (0, 0)
    x = numbers(dtype, 2, *sides, 5).mul(2).round()  # many ties
    leaf = x.clone().requires_grad_()
    y = functional.max_pool2d(leaf.permute(0, 3, 1, 2), kernel, stride, padding)
    y = torch.relu(y) if relu else y
    y = y if planar else y.permute(0, 2, 3, 1)
    dy = numbers(dtype, *y.shape, seed=2)
    found, which = native.image_pool(x, kernel, stride, padding, relu=relu, planar=planar)
    assert torch.equal(found, y.detach())
    dx = native.image_pool_backward(dy, which, x.shape, kernel, stride, padding, planar=planar)
    near(dx, torch.autograd.grad(y, leaf, dy)[0])


def test_pooling_lets_what_is_not_a_number_pass() -> None:
    x = torch.zeros(1, 2, 2, 1)
    x[0, 1, 0, 0] = float("nan")
    found, _ = native.image_pool(x, (2, 2), (2, 2), (0, 0), relu=True, planar=False)
    assert torch.isnan(found).all()


@settings(deadline=None, max_examples=30)
@given(
    dtype=TYPES, fused=st.booleans(), wanted=st.booleans(), clients=st.integers(1, 2), rows=st.integers(1, 12),
    inputs=st.integers(500, 700), outputs=st.integers(132, 150),
)  # fmt: skip
def test_large_matrices(
    dtype: torch.dtype, fused: bool, wanted: bool, clients: int, rows: int, inputs: int, outputs: int
) -> None:
    made = stack(dtype, clients, fused, w=(inputs, outputs), b=(outputs,))
    w, b = made.slots["w"], made.slots["b"]
    assert not native.small(w)
    assert native.takes_linear(w, rows)
    x, dy = numbers(dtype, clients, rows, inputs).mul(0.1), numbers(dtype, clients, rows, outputs, seed=2)
    before = w.value.clone(), b.value.clone()
    near(native.linear(x, w, b), x @ w.value + b.value.unsqueeze(1))
    dx = native.linear_backward(x, dy, w, b, wanted=wanted)
    assert (dx is not None) == wanted
    if dx is not None:
        torch.testing.assert_close(dx, dy @ before[0].transpose(1, 2), rtol=1e-4, atol=1e-4)
    stepped(w, before[0], x.transpose(1, 2) @ dy)
    stepped(b, before[1], dy.sum(1))
