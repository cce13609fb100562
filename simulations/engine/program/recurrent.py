"""A gated recurrent unit (Cho et al. 2014, in torch's form) with its own backward pass through time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulations.engine import native
from simulations.engine.program.layers import Layer
from simulations.engine.program.slots import Layout, Slot


class Gru(Layer):
    """x (K B, T, I) -> all states (K B, T, H), from a zero state; one layer, one direction, batch first.

    Gates after torch: r, z from sigmoid, n = tanh(W_in x + b_in + r (W_hn h + b_hn)), h' = n + z (h - n). Sequences are
    kept with time first, (T, K, B, .), so that each step reads and writes contiguous memory; weight gradients are
    one product over all steps.
    """

    def __init__(self, module: nn.GRU, name: str) -> None:
        self.hidden = module.hidden_size
        self.names = [f"{name}.{part}_l0" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        self.layouts = tuple(
            Layout(n, tuple(getattr(module, n.rpartition(".")[2]).shape)) for n in (self.names if module.bias else ())
        )

    @staticmethod
    def fits(module: nn.GRU) -> bool:
        return module.num_layers == 1 and module.batch_first and not module.bidirectional and bool(module.bias)

    def forward(self, x: Tensor, slots: dict[str, Slot], clients: int) -> Tensor:
        mine = [slots[n] for n in self.names]
        count, steps, inputs = x.shape
        batch, hidden = count // clients, self.hidden
        self._compiled = native.usable(x, mine[1]) and native.small(mine[1]) and not hidden % native.LANES[x.dtype]
        if self._compiled:
            self._x = x.contiguous()
            self._made = native.gru(self._x, mine)
            return self._made[2][:, 1:].permute(0, 2, 1, 3).reshape(count, steps, hidden)
        w_in, w_state, b_in, b_state = (slot.value for slot in mine)
        # (K, T B, I): the input's part of every gate in one product
        self._x = x.view(clients, batch, steps, inputs).permute(0, 2, 1, 3).reshape(clients, steps * batch, inputs)
        gates = torch.baddbmm(b_in.unsqueeze(1), self._x, w_in.transpose(1, 2))
        gates = gates.view(clients, steps, batch, 3 * hidden).transpose(0, 1).contiguous()
        states = x.new_zeros(steps + 1, clients, batch, hidden)
        self._new = x.new_empty(steps, clients, batch, hidden)
        self._inner = x.new_empty(steps, clients, batch, hidden)  # W_hn h + b_hn
        recurrent, offset = w_state.transpose(1, 2), b_state.unsqueeze(1)
        product = x.new_empty(clients, batch, 3 * hidden)
        for t in range(steps):
            torch.baddbmm(offset, states[t], recurrent, out=product)
            gate = gates[t]
            switches = gate[..., : 2 * hidden].add_(product[..., : 2 * hidden]).sigmoid_()
            self._inner[t].copy_(product[..., 2 * hidden :])
            new = torch.addcmul(gate[..., 2 * hidden :], switches[..., :hidden], self._inner[t], out=self._new[t])
            new.tanh_()
            torch.lerp(new, states[t], switches[..., hidden:], out=states[t + 1])
        self._gates, self._states = gates, states
        return states[1:].permute(1, 2, 0, 3).reshape(count, steps, hidden)

    def backward(self, dy: Tensor, slots: dict[str, Slot], clients: int, *, wanted: bool) -> Tensor | None:
        if self._compiled:
            made, data = self._made, self._x
            del self._made, self._x
            return native.gru_backward(data, dy.contiguous(), [slots[n] for n in self.names], made, wanted=wanted)
        w_in, w_state = slots[self.names[0]].value, slots[self.names[1]].value
        count, steps, hidden = dy.shape
        batch, h = count // clients, self.hidden
        outside = dy.view(clients, batch, steps, hidden).permute(2, 0, 1, 3)
        some = [bool(flag) for flag in outside.flatten(1).any(1)]  # most often only the last state is used
        dgates = torch.empty_like(self._gates)  # towards W_in x; r and z have the same towards W_hh h
        dinner = torch.empty_like(self._new)
        dstate = torch.zeros_like(self._new[0])
        both = torch.empty_like(dgates[0])
        for t in reversed(range(steps)):
            if some[t]:
                dstate = dstate + outside[t]
            reset, keep = self._gates[t][..., :h], self._gates[t][..., h : 2 * h]
            new, before = self._new[t], self._states[t]
            gate = dgates[t]
            dnew = torch.mul(dstate, 1 - keep)
            torch.ops.aten.tanh_backward.grad_input(dnew, new, grad_input=gate[..., 2 * h :])
            candidate = gate[..., 2 * h :]
            torch.ops.aten.sigmoid_backward.grad_input(dstate * (before - new), keep, grad_input=gate[..., h : 2 * h])
            torch.ops.aten.sigmoid_backward.grad_input(candidate * self._inner[t], reset, grad_input=gate[..., :h])
            torch.mul(candidate, reset, out=dinner[t])
            both[..., : 2 * h] = gate[..., : 2 * h]
            both[..., 2 * h :] = dinner[t]
            dstate = torch.baddbmm(dstate * keep, both, w_state)
        by_client = dgates.transpose(0, 1).reshape(clients, steps * batch, 3 * h)
        towards = torch.cat([dgates[..., : 2 * h], dinner], dim=-1).transpose(0, 1)
        towards = towards.reshape(clients, steps * batch, 3 * h)
        before = self._states[:-1].transpose(0, 1).reshape(clients, steps * batch, h)
        dx = None
        if wanted:
            dx = torch.bmm(by_client, w_in).view(clients, steps, batch, -1).transpose(1, 2).reshape(count, steps, -1)
        slots[self.names[0]].product(by_client.transpose(1, 2), self._x)
        slots[self.names[1]].product(towards.transpose(1, 2), before)
        slots[self.names[2]].add(by_client.sum(1))
        slots[self.names[3]].add(towards.sum(1))
        del self._x, self._gates, self._states, self._new, self._inner
        return dx
