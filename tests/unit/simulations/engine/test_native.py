"""Each compiled kernel against torch, in float64 and float32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from simulations.engine import native
from simulations.engine.native import build
from simulations.engine.program.slots import Layout, Slot, Stack

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5}
TYPES = st.sampled_from(list(TOLERANCES))
SMALL = st.integers(1, 9)
# Not "no kernels": where there is a compiler that they do not pass, these tests must fail.
needs_compiler = pytest.mark.skipif(
    build.compiler() is None or build.switched_off(), reason="no C compiler here, or FIELDFLEET_KERNELS=off"
)
pytestmark = needs_compiler


def stack(dtype: torch.dtype, clients: int, fused: bool, **shapes: tuple[int, ...]) -> Stack:
    """Parameters that lie among others, each client's own."""
    layouts = [Layout(name, shape) for name, shape in {"before": (3,), **shapes, "after": (2,)}.items()]
    made = Stack(layouts, clients, fused=fused, dtype=dtype, device=torch.device("cpu"))
    made.values.normal_(generator=torch.Generator().manual_seed(5))
    for slot in made.slots.values():
        slot.rate, slot.keep = 0.1, 0.9
    return made


def numbers(dtype: torch.dtype, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCES[found.dtype], atol=TOLERANCES[found.dtype])


def stepped(slot: Slot, before: Tensor, gradient: Tensor) -> None:
    """Either the gradient was kept, or the step was done."""
    if slot.grad is None:
        near(slot.value, 0.9 * before - 0.1 * gradient)
    else:
        near(slot.grad, gradient)
        assert torch.equal(slot.value, before)


@settings(deadline=None, max_examples=60)
@given(
    dtype=TYPES,
    fused=st.booleans(),
    wanted=st.booleans(),
    sizes=st.tuples(SMALL, SMALL, st.integers(1, 40), st.integers(1, 40)),
)
def test_linear(dtype: torch.dtype, fused: bool, wanted: bool, sizes: tuple[int, int, int, int]) -> None:
    clients, rows, inputs, outputs = sizes
    made = stack(dtype, clients, fused, w=(inputs, outputs), b=(outputs,))
    w, b = made.slots["w"], made.slots["b"]
    x, dy = numbers(dtype, clients, rows, inputs), numbers(dtype, clients, rows, outputs, seed=2)
    before = w.value.clone(), b.value.clone(), made.slots["before"].value.clone(), made.slots["after"].value.clone()
    near(native.linear(x, w, b), x @ w.value + b.value.unsqueeze(1))
    near(native.linear(x, w, None), x @ w.value)
    dx = native.linear_backward(x, dy, w, b, wanted=wanted)
    assert (dx is not None) == wanted
    if dx is not None:
        near(dx, dy @ before[0].transpose(1, 2))
    stepped(w, before[0], x.transpose(1, 2) @ dy)
    stepped(b, before[1], dy.sum(1))
    assert torch.equal(made.slots["before"].value, before[2])
    assert torch.equal(made.slots["after"].value, before[3])


@settings(deadline=None, max_examples=60)
@given(
    dtype=TYPES, fused=st.booleans(), clients=st.integers(1, 3), channels=SMALL, outputs=st.integers(1, 20),
    taps=st.integers(1, 5), stride=st.integers(1, 3), padding=st.integers(0, 4), dilation=st.integers(1, 3),
    steps=st.integers(9, 20),
)  # fmt: skip
def test_convolutions(
    dtype: torch.dtype, fused: bool, clients: int, channels: int, outputs: int, taps: int, stride: int, padding: int,
    dilation: int, steps: int,
) -> None:  # fmt: skip
    out = (steps + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
    if out < 1:
        return
    made = stack(dtype, clients, fused, w=(taps, channels, outputs), b=(outputs,))
    w, b, batch = made.slots["w"], made.slots["b"], 2
    x = numbers(dtype, clients * batch, steps, channels)
    dy = numbers(dtype, clients * batch, out, outputs, seed=2)
    before = w.value.clone(), b.value.clone()
    chosen = (stride, padding, dilation, out)
    found, dx = native.conv(x, w, b, chosen), native.conv_backward(x, dy, w, b, chosen, wanted=True)
    assert dx is not None
    gradients = []
    for k in range(clients):
        part = slice(k * batch, (k + 1) * batch)
        leaves = [t.clone().requires_grad_() for t in (x[part], before[0][k], before[1][k])]
        y = functional.conv1d(
            leaves[0].transpose(1, 2), leaves[1].permute(2, 1, 0), leaves[2], stride, padding, dilation
        ).transpose(1, 2)
        near(found[part], y.detach())
        one = torch.autograd.grad(y, leaves, dy[part])
        near(dx[part], one[0])
        gradients.append(one)
    stepped(w, before[0], torch.stack([g[1] for g in gradients]))
    stepped(b, before[1], torch.stack([g[2] for g in gradients]))


@settings(deadline=None, max_examples=60)
@given(
    dtype=TYPES,
    kernel=st.integers(1, 4),
    stride=st.integers(1, 5),
    steps=st.integers(4, 12),
    relu=st.booleans(),
    halved=st.booleans(),
)
def test_pooling(dtype: torch.dtype, kernel: int, stride: int, steps: int, relu: bool, halved: bool) -> None:
    padding = kernel // 2 if halved else 0
    x = numbers(dtype, 3, steps, 5).mul(2).round()  # many ties
    leaf = x.clone().requires_grad_()
    y = functional.max_pool1d(leaf.transpose(1, 2), kernel, stride, padding).transpose(1, 2)
    y = torch.relu(y) if relu else y
    dy = numbers(dtype, *y.shape, seed=2)
    found, which = native.pool(x, kernel, stride, padding, relu=relu)
    assert torch.equal(found, y.detach())
    dx = native.pool_backward(dy, found, which, steps, (kernel, stride, padding), relu=relu)
    near(dx, torch.autograd.grad(y, leaf, dy)[0])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scale", [0.3, 30.0])  # the second one far into saturation
def test_gated_recurrent_units(dtype: torch.dtype, fused: bool, scale: float) -> None:
    clients, batch, steps, inputs, hidden = 2, 3, 7, 5, 16
    made = stack(
        dtype, clients, fused, a=(3 * hidden, inputs), b=(3 * hidden, hidden), c=(3 * hidden,), d=(3 * hidden,)
    )
    made.values.mul_(scale)
    slots = [made.slots[name] for name in "abcd"]
    before = [slot.value.clone() for slot in slots]
    x, dy = numbers(dtype, clients * batch, steps, inputs), numbers(dtype, clients * batch, steps, hidden, seed=2)
    state = native.gru(x, slots)
    found = state[2][:, 1:].permute(0, 2, 1, 3).reshape(dy.shape).clone()
    dx = native.gru_backward(x, dy, slots, state, wanted=True)
    assert dx is not None
    gradients = []
    for k in range(clients):
        part, module = slice(k * batch, (k + 1) * batch), nn.GRU(inputs, hidden, batch_first=True).to(torch.float64)
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), before, strict=True):
                parameter.copy_(value[k])
        leaf = x[part].double().requires_grad_()
        y = module(leaf)[0]
        one = torch.autograd.grad(y, [leaf, *module.parameters()], dy[part].double())
        close = {"rtol": 10 * scale * TOLERANCES[dtype], "atol": 10 * scale * TOLERANCES[dtype]}
        torch.testing.assert_close(found[part].double(), y.detach(), **close)
        torch.testing.assert_close(dx[part].double(), one[0], **close)
        gradients.append(one[1:])
    for number, slot in enumerate(slots):
        gradient = torch.stack([g[number] for g in gradients])
        taken = slot.grad if slot.grad is not None else (0.9 * before[number] - slot.value) / 0.1
        torch.testing.assert_close(
            taken.double(), gradient, rtol=200 * scale * TOLERANCES[dtype], atol=200 * scale * TOLERANCES[dtype]
        )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("classes", [1, 2, 6, 62])
def test_cross_entropy(dtype: torch.dtype, classes: int) -> None:
    logits = numbers(dtype, 3, 4, classes).mul(20).requires_grad_()
    targets = torch.arange(12).view(3, 4) % classes
    expected = functional.cross_entropy(logits.view(12, classes), targets.view(12), reduction="none").view(3, 4).sum(1)
    sums, gradient = native.cross_entropy(logits.detach(), targets, 0.25)
    near(sums, expected.detach())
    near(gradient, 0.25 * torch.autograd.grad(expected.sum(), logits)[0])
    with pytest.raises(ValueError, match="no class"):
        native.cross_entropy(logits.detach(), targets + classes, 0.25)


def test_what_is_not_a_number_stays_visible() -> None:
    logits = torch.tensor([[[0.0, float("nan"), 1.0]]])
    sums, gradient = native.cross_entropy(logits, torch.zeros(1, 1, dtype=torch.int64), 1.0)
    assert torch.isnan(sums).all()
    assert torch.isnan(gradient).any()


def test_orders_of_no_examples() -> None:
    found = native.permutations([1, 2], 0)
    assert found is not None
    assert found.shape == (2, 0)
