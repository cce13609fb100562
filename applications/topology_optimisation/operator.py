"""The stiffness of a grid of elements, applied without being assembled. Torch-free, numpy alone.

Fields of nodes are arrays (dims, n_x + 1, ...), fields of elements (n_x, ...). All elements share one stiffness matrix, scaled
by the element's modulus. Displacements are turned into sums and differences along each axis; there the element's matrix
falls apart into blocks (``elements.mirror_blocks``), some ten times less arithmetic than gather, multiply, scatter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from applications.topology_optimisation import elements

Field = npt.NDArray[Any]


class Stiffness:
    """``free``: (dims, nodes...) 1 where a degree of freedom is free, 0 where it is held; held ones act as the identity."""

    def __init__(self, shape: tuple[int, ...], free: Field, dtype: npt.DTypeLike = np.float64) -> None:
        self.shape, self.dims, self.dtype = shape, len(shape), np.dtype(dtype)
        self.nodes = tuple(n + 1 for n in shape)
        self.free = free.astype(self.dtype)
        slots, blocks = elements.mirror_blocks(self.dims)
        self.slots, self.blocks = slots, blocks.astype(self.dtype)
        self.place = {(int(slots[p, a]), a): (p, a) for p in range(2**self.dims) for a in range(self.dims)}
        self._strained = np.empty(
            (2**self.dims, self.dims, *shape), self.dtype
        )  # kept: fresh pages cost more than sums
        self._forces = np.empty_like(self._strained)
        self.modulus: Field = np.ones(shape, self.dtype)
        self.diagonal: Field = np.ones((self.dims, *self.nodes), self.dtype)

    def update(self, modulus: Field) -> None:
        """modulus: (elements...) Young's modulus of each element."""
        self.modulus = modulus.astype(self.dtype)
        entry = float(elements.stiffness(self.dims)[0, 0])  # one value: the corners and axes are alike
        at_nodes = entry * _corner_sum(modulus.astype(np.float64))
        self.diagonal = np.where(self.free > 0, at_nodes[None], 1.0).astype(self.dtype)

    def modes(self, u: Field) -> Field:
        """Sums and differences over each element's corners: (2**dims blocks, dims, elements...); overwritten by the next call."""
        out = self._strained
        for a in range(self.dims):
            parts = [(0, u[a])]
            for axis in range(self.dims):
                last = axis == self.dims - 1
                following = []
                for code, part in parts:
                    low, high = _ends(part, axis)
                    for bit, combine in ((0, np.add), (1, np.subtract)):
                        target = out[self.place[2 * code + bit, a]] if last else None
                        following.append((2 * code + bit, combine(high, low, out=target)))
                parts = following
        return out

    def assemble(self, forces: Field) -> Field:
        """The transpose of ``modes``: element forces in that basis to forces at the nodes."""
        total = np.empty((self.dims, *self.nodes), self.dtype)
        for a in range(self.dims):
            parts = {code: forces[self.place[code, a]] for code in range(2**self.dims)}
            for axis in reversed(range(self.dims)):
                parts = {c: _spread(parts[2 * c], parts[2 * c + 1], axis) for c in range(len(parts) // 2)}
            total[a] = parts[0]
        return total

    def unmasked(self, u: Field) -> Field:
        """K u as if nothing were held."""
        flat = (2**self.dims, self.dims, -1)
        np.matmul(self.blocks, self.modes(u).reshape(flat), out=self._forces.reshape(flat))
        self._forces *= self.modulus
        return self.assemble(self._forces)

    def __call__(self, u: Field) -> Field:
        """(dims, nodes...) -> (dims, nodes...): K on the free part, the identity on the held part."""
        masked = self.free * u
        result = self.unmasked(masked)
        result *= self.free
        result += u
        result -= masked
        return result

    def strains(self, u: Field) -> Field:
        """Strains at the elements' centres, Voigt order (xx yy zz xy yz xz or xx yy xy): (strains, elements...) float64."""
        slopes = self.modes(u).astype(np.float64) / 2 ** (self.dims - 1)

        def slope(component: int, axis: int) -> Field:
            result: Field = slopes[self.place[1 << (self.dims - 1 - axis), component]]
            return result

        pairs = [(0, 1)] if self.dims == 2 else [(0, 1), (1, 2), (0, 2)]
        normal = [slope(a, a) for a in range(self.dims)]
        return np.stack([*normal, *(slope(a, b) + slope(b, a) for a, b in pairs)])

    def energy(self, u: Field) -> Field:
        """u_e^T K_e u_e of each element with unit modulus: (elements...) float64."""
        strained = self.modes(u).astype(np.float64).reshape(2**self.dims, self.dims, -1)
        forces = np.matmul(self.blocks.astype(np.float64), strained)
        result: Field = np.einsum("pae,pae->e", forces, strained).reshape(self.shape)
        return result


def _ends(field: Field, axis: int) -> tuple[Field, Field]:
    low: list[slice] = [slice(None)] * field.ndim
    high = list(low)
    low[axis], high[axis] = slice(None, -1), slice(1, None)
    return field[tuple(low)], field[tuple(high)]


def _spread(total: Field, difference: Field, axis: int) -> Field:
    """Forces on the sum and on the difference (upper minus lower) of two neighbours, back to the neighbours."""
    shape = list(total.shape)
    shape[axis] += 1
    out = np.empty(shape, total.dtype)
    low, high = _ends(out, axis)
    np.subtract(total, difference, out=low)
    last: list[Any] = [slice(None)] * out.ndim
    last[axis] = -1
    out[tuple(last)] = 0
    high += total
    high += difference
    return out


def _corner_sum(field: Field) -> Field:
    """Each node's sum over the elements around it."""
    for axis in range(field.ndim):
        shape = list(field.shape)
        shape[axis] += 1
        out = np.zeros(shape, field.dtype)
        low, high = _ends(out, axis)
        low += field
        high += field
        field = out
    return field
