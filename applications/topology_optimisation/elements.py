"""Finite elements of a regular grid: bilinear squares (Q4, plane stress) and trilinear cubes (H8), unit side, unit modulus.

Degrees of freedom of one element are ordered by component, then by corner; corner ``c`` of ``2**dims`` lies at the bits of
``c``, the first axis in the highest bit. The same order serves the prolongation between grids. Torch-free.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
POISSON = 0.3


def corners(dims: int) -> npt.NDArray[np.int64]:
    """(2**dims, dims) offsets of an element's corners, each 0 or 1."""
    return np.array(list(itertools.product((0, 1), repeat=dims)), np.int64)


def elasticity(dims: int, poisson: float = POISSON) -> Matrix:
    """Hooke's law with modulus 1 in Voigt order: plane stress (3, 3), or (6, 6) with xx yy zz, then the shears."""
    if dims == 2:
        return np.array([[1, poisson, 0], [poisson, 1, 0], [0, 0, (1 - poisson) / 2]]) / (1 - poisson**2)
    lame = poisson / ((1 + poisson) * (1 - 2 * poisson))
    shear = 1 / (2 * (1 + poisson))
    law = np.zeros((6, 6))
    law[:3, :3] = lame
    law[np.arange(3), np.arange(3)] += 2 * shear
    law[np.arange(3, 6), np.arange(3, 6)] = shear
    return law


def strain_displacement(point: npt.ArrayLike, dims: int) -> Matrix:
    """B (strains, dofs) at ``point`` in [0, 1]^dims of the unit element."""
    at = np.asarray(point, np.float64)
    where = corners(dims)
    factor = np.where(where == 1, at, 1 - at)  # (corners, dims)
    sign = np.where(where == 1, 1.0, -1.0)
    gradient = np.stack([sign[:, a] * np.prod(np.delete(factor, a, axis=1), axis=1) for a in range(dims)])
    count = len(where)
    pairs = [(0, 1)] if dims == 2 else [(0, 1), (1, 2), (0, 2)]
    b = np.zeros((dims + len(pairs), dims * count))
    for a in range(dims):
        b[a, a * count : (a + 1) * count] = gradient[a]
    for row, (p, q) in enumerate(pairs, start=dims):
        b[row, p * count : (p + 1) * count] = gradient[q]
        b[row, q * count : (q + 1) * count] = gradient[p]
    return b


@functools.cache
def stiffness(dims: int, poisson: float = POISSON) -> Matrix:
    """The element stiffness: integral of B^T C B by the two-point Gauss rule on each axis, which is exact here."""
    law = elasticity(dims, poisson)
    points = 0.5 + np.array([-0.5, 0.5]) / np.sqrt(3)
    total = np.zeros((dims * 2**dims, dims * 2**dims))
    for point in itertools.product(points, repeat=dims):
        b = strain_displacement(point, dims)
        total += b.T @ law @ b / 2**dims
    result: Matrix = (total + total.T) / 2
    result.setflags(write=False)
    return result


@functools.cache
def prolongations(dims: int) -> Matrix:
    """(2**dims, dofs, dofs): from a coarse element's displacements to those of each of its children."""
    where = corners(dims)
    nodes = (where[:, None, :] + where[None, :, :]) / 2  # child, node of the child, axis
    weights = np.prod(np.where(where[None, None] == 1, nodes[:, :, None], 1 - nodes[:, :, None]), axis=3)
    result: Matrix = np.stack([np.kron(np.eye(dims), w) for w in weights])
    result.setflags(write=False)
    return result


@functools.cache
def mirror_blocks(dims: int, poisson: float = POISSON) -> tuple[npt.NDArray[np.int64], Matrix]:
    """The stiffness in the basis of sums and differences over corners, where it falls apart into ``2**dims`` blocks.

    A square or cube of isotropic material looks the same in each of its mirrors, so that modes of different parity do not
    couple: ``2**dims`` blocks of (dims, dims) instead of one full matrix. Returns (slots, blocks): ``slots[p, a]`` is the
    Walsh index (bit = difference along that axis) of component ``a`` in block ``p``.
    """
    count = 2**dims
    where = corners(dims)
    walsh = np.where((where @ where.T) % 2 == 0, 1.0, -1.0) * 1.0
    # differences are upper minus lower corner
    walsh = walsh * np.where(where.sum(axis=1) % 2 == 0, 1.0, -1.0)[:, None]
    basis = np.kron(np.eye(dims), walsh)
    transformed = basis @ stiffness(dims, poisson) @ basis.T / count**2
    slots = np.array([[p ^ (1 << (dims - 1 - a)) for a in range(dims)] for p in range(count)], np.int64)
    rows = slots + np.arange(dims) * count
    blocks = np.stack([transformed[np.ix_(r, r)] for r in rows])
    return slots, blocks
