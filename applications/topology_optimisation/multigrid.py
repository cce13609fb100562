"""Conjugate gradients preconditioned by one multigrid cycle (Amir, Aage, Lazarov 2014), for the stiffness of a grid.

The fine grid is never assembled. Coarse grids carry the Galerkin products P^T K P: since the interpolation stays inside one
coarse element, they are sums over its children, so that the contrast between material and void reaches every level exactly.
Chebyshev polynomials of the diagonally scaled operator smooth, before and after alike, which keeps the cycle symmetric.
The cycle runs in single precision, the iteration around it in double. Torch-free; needs scipy (extra ``design``).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import linalg, sparse

from applications.topology_optimisation import elements
from applications.topology_optimisation.operator import Field, Stiffness

COARSEST = 600  # degrees of freedom that are solved directly in no time
SMOOTHED_SHARE = 8.0  # the smoother takes care of eigenvalues down to this part of the largest
SHIFTS = (1e-10, 1e-8, 1e-6, 1e-4)
ELEMENT_BOUND = {2: 2.8889, 3: 5.3182}  # largest eigenvalue of D^-1 K of one element, which no assembly of it exceeds


@dataclass(frozen=True)
class Solution:
    """u: (dims, nodes...); residual: norm of f - K u over that of f."""

    u: Field
    iterations: int
    residual: float


def interpolate(coarse: Field) -> Field:
    """(dims, coarse nodes...) -> (dims, fine nodes...), linear along each axis."""
    for axis in range(1, coarse.ndim):
        shape = list(coarse.shape)
        shape[axis] = 2 * shape[axis] - 1
        fine = np.empty(shape, coarse.dtype)
        fine[_every(fine.ndim, axis, 0)] = coarse
        middle = fine[_every(fine.ndim, axis, 1)]
        np.add(coarse[_cut(axis, 0, -1)], coarse[_cut(axis, 1, None)], out=middle)
        middle *= coarse.dtype.type(0.5)
        coarse = fine
    return coarse


def restrict(fine: Field) -> Field:
    """The transpose of ``interpolate``."""
    for axis in range(1, fine.ndim):
        coarse = fine[_every(fine.ndim, axis, 0)].copy()
        half = fine[_every(fine.ndim, axis, 1)] * fine.dtype.type(0.5)
        coarse[_cut(axis, 0, -1)] += half
        coarse[_cut(axis, 1, None)] += half
        fine = coarse
    return fine


def _every(dims: int, axis: int, start: int) -> tuple[slice, ...]:
    return tuple(slice(start, None, 2) if a == axis else slice(None) for a in range(dims))


def _cut(axis: int, low: int, high: int | None) -> tuple[Any, ...]:
    return (*[slice(None)] * axis, slice(low, high))


@functools.lru_cache(maxsize=16)
def _pattern(shape: tuple[int, ...]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """(indptr, indices, where each entry of the element matrices goes) of the assembled matrix of a grid."""
    dofs = element_dofs(shape)
    size = len(shape) * int(np.prod([n + 1 for n in shape]))
    keys = dofs[:, :, None].astype(np.int64) * size + dofs[:, None, :]
    unique, inverse = np.unique(keys.ravel(), return_inverse=True)
    indptr = np.searchsorted(unique // size, np.arange(size + 1)).astype(np.int32)
    return indptr, (unique % size).astype(np.int32), inverse.ravel()


@functools.lru_cache(maxsize=16)
def element_dofs(shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """(elements, dofs) numbers in a flattened (dims, nodes...) field."""
    nodes = tuple(n + 1 for n in shape)
    number = np.arange(int(np.prod(nodes))).reshape(nodes)
    first = number[tuple(slice(-1) for _ in nodes)].ravel()
    step = number[tuple(elements.corners(len(shape)).T)]
    per_component = first[:, None] + step[None, :]
    return np.concatenate([per_component + a * int(np.prod(nodes)) for a in range(len(shape))], axis=1)


@functools.cache
def child_products(dims: int) -> Field:
    """(child, dofs, dofs): what a child of unit modulus adds to its coarse element."""
    r = elements.prolongations(dims)
    result: Field = r.transpose(0, 2, 1) @ (elements.stiffness(dims) @ r)
    return result


class _Level:
    """One assembled grid below the finest, and what smooths on it."""

    def __init__(self, shape: tuple[int, ...], matrices: Field) -> None:
        self.shape, self.nodes = shape, tuple(n + 1 for n in shape)
        indptr, indices, place = _pattern(shape)
        data = np.bincount(place, matrices.ravel(), minlength=len(indices)).astype(np.float32)
        self.matrix = sparse.csr_array((data, indices, indptr), shape=(len(indptr) - 1,) * 2)
        diagonal = np.asarray(self.matrix.diagonal())
        self.dead = diagonal <= 0  # every fine degree of freedom around is held
        self.inverse = np.where(self.dead, 0, 1 / np.where(self.dead, 1, diagonal)).astype(np.float32)
        self.largest = 0.0

    def __call__(self, u: Field) -> Field:
        result: Field = (self.matrix @ u.ravel()).reshape(u.shape)
        return result

    def estimate(self) -> None:
        """The largest eigenvalue of D^-1 A by power iteration, with room for what it misses."""
        x = np.random.default_rng(0).normal(size=len(self.inverse)).astype(np.float32)
        value = 1.0
        for _ in range(8):
            x = self.inverse * (self.matrix @ (x / np.linalg.norm(x)))
            value = float(np.linalg.norm(x))
        self.largest = 1.15 * value


class Multigrid:
    """The preconditioner of one problem; ``update`` follows each change of the design."""

    def __init__(self, shape: tuple[int, ...], free: Field, *, degree: int = 2) -> None:
        self.shape, self.dims, self.degree = shape, len(shape), degree
        self.fine = Stiffness(shape, free, np.float32)
        self.free = self.fine.free
        self.inverse = np.ones_like(self.free)
        self.levels: list[_Level] = []
        self.factor: Any = None
        if self._halves(shape):
            self._own = self._touched()

    def _halves(self, shape: tuple[int, ...]) -> bool:
        size = self.dims * int(np.prod([n + 1 for n in shape]))
        return all(n % 2 == 0 for n in shape) and size > COARSEST

    def update(self, modulus: Field) -> None:
        self.fine.update(modulus)
        self.inverse = (self.free / self.fine.diagonal).astype(np.float32)
        self.levels = []
        shape = self.shape
        matrices: Field | None = None
        while self._halves(shape):
            matrices = self._first(modulus) if matrices is None else self._next(matrices, shape)
            shape = tuple(n // 2 for n in shape)
            self.levels.append(_Level(shape, matrices))
        self._factorise(modulus)
        for level in self.levels[:-1]:
            level.estimate()

    def _touched(self) -> tuple[npt.NDArray[np.int64], Field]:
        """Coarse elements with a held degree of freedom, and their own (child, dofs * dofs) Galerkin products."""
        r, k = elements.prolongations(self.dims), elements.stiffness(self.dims)
        masks = _children(self.free.reshape(-1)[element_dofs(self.shape)] > 0, self.shape)  # coarse, child, dof
        touched = np.flatnonzero(~masks.all(axis=(1, 2)))
        held = masks[touched].astype(np.float64)[..., None] * r
        own = held.transpose(0, 1, 3, 2) @ (k @ held)
        return touched, own.reshape(len(touched), len(r), -1)

    def _first(self, modulus: Field) -> Field:
        """(coarse elements, dofs, dofs): the Galerkin products of the finest grid's elements."""
        children = _children(modulus.reshape(-1), self.shape)
        basis = child_products(self.dims)
        matrices: Field = children @ basis.reshape(len(basis), -1)
        touched, own = self._own
        matrices[touched] = np.matmul(children[touched, None, :], own)[:, 0]
        return matrices.reshape(-1, *basis.shape[1:]).astype(np.float32)

    def _next(self, matrices: Field, shape: tuple[int, ...]) -> Field:
        r = elements.prolongations(self.dims).astype(np.float32)
        size = r.shape[-1]
        children = _children(matrices.reshape(len(matrices), -1), shape)
        total = np.zeros((len(children), size, size), np.float32)
        for c in range(len(r)):
            half = children[:, c].reshape(-1, size) @ r[c]  # K R, and K is symmetric
            total += (half.reshape(-1, size, size).transpose(0, 2, 1).reshape(-1, size) @ r[c]).reshape(-1, size, size)
        return total

    def _factorise(self, modulus: Field) -> None:
        """The coarsest grid is solved directly: dense where it is small, else by a sparse factorisation."""
        if self.levels:
            last = self.levels[-1]
            matrix = (last.matrix + sparse.diags_array(last.dead.astype(np.float32))).astype(np.float64)
        else:
            matrix = assembled(self.shape, modulus, self.free)
        if matrix.shape[0] <= 2 * COARSEST:
            self.factor = functools.partial(linalg.cho_solve, positive_factor(matrix.toarray()))
        else:
            from scipy.sparse import linalg as sparse_linalg

            self.factor = sparse_linalg.splu(matrix.tocsc()).solve

    def __call__(self, residual: Field) -> Field:
        """One V-cycle: (dims, nodes...) -> (dims, nodes...), symmetric and positive definite."""
        r = residual.astype(np.float32)
        scale = float(np.abs(r).max()) or 1.0
        return self._cycle(r / scale, 0).astype(np.float64) * scale

    def _cycle(self, r: Field, number: int) -> Field:
        """``number`` 0 is the finest grid; the last is solved directly."""
        if number == len(self.levels):
            solved: Field = self.factor(r.ravel().astype(np.float64)).astype(np.float32).reshape(r.shape)
            return solved * self.free if number == 0 else solved
        if number == 0:
            operator: Any = self.fine
            inverse, largest = self.inverse, ELEMENT_BOUND[self.dims]
        else:
            level = self.levels[number - 1]
            operator, inverse, largest = level, level.inverse.reshape(r.shape), level.largest
        z = chebyshev(operator, inverse, largest, r, self.degree)
        below = self._cycle(restrict((r - operator(z)) * (inverse > 0)), number + 1)
        z += interpolate(below) * (inverse > 0)
        z += chebyshev(operator, inverse, largest, r - operator(z), self.degree)
        return z


def positive_factor(matrix: Field) -> tuple[Field, bool]:
    """The Cholesky factor of a symmetric matrix with as small a share of its largest entry on the diagonal as makes it positive.

    A piece of material without support is singular, and what single precision left of void may be below zero.
    """
    largest = float(matrix.diagonal().max())
    for share in SHIFTS:
        try:
            found: tuple[Field, bool] = linalg.cho_factor(matrix + share * largest * np.eye(len(matrix)))
            return found
        except linalg.LinAlgError:
            continue
    raise linalg.LinAlgError(f"a coarse grid is not positive definite, even with {SHIFTS[-1]:g} of its diagonal added")


class Direct:
    """A sparse factorisation in the place of a cycle: in two dimensions it fills little and is the faster way."""

    def __init__(self, shape: tuple[int, ...], free: Field) -> None:
        self.shape, self.free = shape, free
        self.factor: Any = None

    def update(self, modulus: Field) -> None:
        from scipy.sparse import linalg as sparse_linalg

        self.factor = sparse_linalg.splu(assembled(self.shape, modulus, self.free).tocsc())

    def __call__(self, residual: Field) -> Field:
        found: Field = self.factor.solve(residual.ravel()).reshape(residual.shape)
        return found


def chebyshev(operator: Any, inverse: Field, largest: float, r: Field, degree: int) -> Field:
    """A polynomial of D^-1 A applied to D^-1 r that damps eigenvalues in [largest / SMOOTHED_SHARE, largest]."""
    high, low = largest, largest / SMOOTHED_SHARE
    theta, delta = (high + low) / 2, (high - low) / 2
    sigma = theta / delta
    rho = 1 / sigma
    step = inverse * r / np.float32(theta)
    z: Field = step.copy()
    for _ in range(degree - 1):
        rho, before = 1 / (2 * sigma - rho), rho
        step = np.float32(rho * before) * step + np.float32(2 * rho / delta) * (inverse * (r - operator(z)))
        z += step
    return z


def _children(values: Field, shape: tuple[int, ...]) -> Field:
    """(fine elements, ...) -> (coarse elements, 2**dims, ...)."""
    dims, rest = len(shape), values.shape[1:]
    split = values.reshape(*[m for n in shape for m in (n // 2, 2)], *rest)
    order = [*range(0, 2 * dims, 2), *range(1, 2 * dims, 2), *range(2 * dims, split.ndim)]
    return split.transpose(order).reshape(-1, 2**dims, *rest)


def assembled(shape: tuple[int, ...], modulus: Field, free: Field) -> Any:
    """The whole stiffness as a sparse matrix, held degrees of freedom as the identity: for small grids and for checks."""
    indptr, indices, place = _pattern(shape)
    k = elements.stiffness(len(shape)).ravel()
    data = np.bincount(place, (modulus.reshape(-1, 1) * k).ravel(), minlength=len(indices))
    matrix = sparse.csr_array((data, indices, indptr), shape=(len(indptr) - 1,) * 2)
    mask = sparse.diags_array((free.ravel() > 0).astype(np.float64))
    return mask @ matrix @ mask + sparse.diags_array((free.ravel() == 0).astype(np.float64))


def solve(
    stiffness: Stiffness,
    preconditioner: Any,
    force: Field,
    *,
    start: Field | None = None,
    tolerance: float = 1e-8,
    limit: int = 400,
) -> Solution:
    """Preconditioned conjugate gradients for K u = f, from ``start``; ``tolerance`` is relative to the norm of ``force``.

    The direction update is the flexible one (Notay 2000), since the cycle in single precision is not quite linear.
    """
    f = force * stiffness.free
    size = float(np.linalg.norm(f))
    u = np.zeros_like(f) if start is None else start * stiffness.free
    if size == 0.0:
        return Solution(np.zeros_like(f), 0, 0.0)
    r = f - stiffness(u) if start is not None else f.copy()
    direction, energy = np.zeros_like(f), 1.0
    error = float(np.linalg.norm(r)) / size
    count = 0
    before = r
    while error > tolerance and count < limit:
        z = preconditioner(r)
        top = float(np.vdot(z, r))
        beta = (top - float(np.vdot(z, before))) / energy if count else 0.0
        direction = z + beta * direction
        image = stiffness(direction)
        curvature = float(np.vdot(direction, image))
        if not curvature > 0 or not np.isfinite(curvature):
            break
        alpha = float(np.vdot(direction, r)) / curvature
        u += alpha * direction
        before, r = r, r - alpha * image
        energy = top
        error = float(np.linalg.norm(r)) / size
        count += 1
    return Solution(u, count, error)
