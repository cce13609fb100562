"""topology_optimisation: the solver against direct solutions, exact fields and published compliances."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg
from scipy.sparse import linalg as sparse_linalg

from applications.topology_optimisation import elements, families, multigrid, problems
from applications.topology_optimisation.filters import ConeFilter
from applications.topology_optimisation.operator import Stiffness
from applications.topology_optimisation.simp import Analysis, Settings, optimality_criteria, optimise

SHAPES = [(4, 6), (3, 5), (4, 2, 4), (3, 2, 5)]


def dense(shape: tuple[int, ...], modulus: np.ndarray) -> np.ndarray:
    """The slow twin: every element's matrix added into a full one, by loops."""
    dims, nodes = len(shape), tuple(n + 1 for n in shape)
    count = int(np.prod(nodes))
    total = np.zeros((dims * count, dims * count))
    for cell in itertools.product(*map(range, shape)):
        ids = [int(np.ravel_multi_index(tuple(np.add(cell, c)), nodes)) for c in elements.corners(dims)]
        dofs = np.concatenate([a * count + np.array(ids) for a in range(dims)])
        total[np.ix_(dofs, dofs)] += modulus[cell] * elements.stiffness(dims)
    return total


def free_of(shape: tuple[int, ...]) -> np.ndarray:
    free = np.ones((len(shape), *(n + 1 for n in shape)))
    free[:, 0] = 0
    free[-1, -1, 0] = 0
    return free


@pytest.mark.parametrize("dims", [2, 3])
def test_an_element_resists_strains_and_nothing_else(dims: int) -> None:
    """Rigid motions cost nothing; constant strains cost exactly strain . C . strain (the patch of one element)."""
    k, where = elements.stiffness(dims), elements.corners(dims).astype(float)
    assert np.linalg.matrix_rank(k, tol=1e-12) == k.shape[0] - (3 if dims == 2 else 6)
    rng = np.random.default_rng(0)
    slope = rng.normal(size=(dims, dims))
    u = (where @ slope.T).T.ravel()  # u = slope x
    pairs = [(0, 1)] if dims == 2 else [(0, 1), (1, 2), (0, 2)]
    strain = np.array([*(slope[a, a] for a in range(dims)), *(slope[a, b] + slope[b, a] for a, b in pairs)])
    assert u @ k @ u == pytest.approx(strain @ elements.elasticity(dims) @ strain, rel=1e-12)
    spin = slope - slope.T
    assert np.abs(k @ (where @ spin.T).T.ravel()).max() < 1e-12


def test_the_square_element_is_that_of_the_published_codes() -> None:
    """Sigmund 2001, appendix: k(1) = 1/2 - nu/6 and so on, over 1 - nu^2."""
    nu = elements.POISSON
    first = (1 / 2 - nu / 6, 1 / 8 + nu / 8, -1 / 4 - nu / 12, -1 / 8 + 3 * nu / 8)
    second = (-1 / 4 + nu / 12, -1 / 8 - nu / 8, nu / 6, 1 / 8 - 3 * nu / 8)
    published = sorted(v / (1 - nu**2) for v in (*first, *second))
    np.testing.assert_allclose(sorted(elements.stiffness(2)[0]), published, rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_operator_is_the_dense_matrix(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    modulus, free = rng.random(shape) + 1e-3, free_of(shape)
    stiffness = Stiffness(shape, free)
    stiffness.update(modulus)
    held = free.ravel() == 0
    full = dense(shape, modulus)
    u = rng.normal(size=free.shape)
    energy = u.ravel() @ full @ u.ravel()
    full[held], full[:, held] = 0, 0
    full[held, held] = 1
    np.testing.assert_allclose(stiffness(u).ravel(), full @ u.ravel(), atol=1e-12)
    np.testing.assert_allclose(stiffness.diagonal.ravel(), np.diag(full), atol=1e-12)
    assert np.sum(modulus * stiffness.energy(u)) == pytest.approx(energy)
    np.testing.assert_allclose(multigrid.assembled(shape, modulus, free).toarray(), full, atol=1e-12)


@pytest.mark.parametrize("dims", [2, 3])
def test_patch_a_linear_displacement_is_reproduced_exactly(dims: int) -> None:
    """Held on the whole boundary to u = A x, a uniform body follows inside: the forces there vanish."""
    shape = (4,) * dims
    rng = np.random.default_rng(2)
    slope = rng.normal(size=(dims, dims))
    u = np.tensordot(slope, np.indices([n + 1 for n in shape]).astype(float), axes=1)
    stiffness = Stiffness(shape, np.ones_like(u))
    stiffness.update(np.ones(shape))
    inside = (slice(None), *[slice(1, -1)] * dims)
    assert np.abs(stiffness(u)[inside]).max() < 1e-12
    strains = stiffness.strains(u)
    np.testing.assert_allclose(strains[0], slope[0, 0], rtol=1e-12)
    np.testing.assert_allclose(strains[dims], slope[0, 1] + slope[1, 0], rtol=1e-12)


@pytest.mark.parametrize("shape", [(24, 16), (15, 9), (8, 8, 8), (16, 8, 12), (5, 7, 3)])
def test_multigrid_solution_is_the_direct_one(shape: tuple[int, ...]) -> None:
    """Moduli over nine decades; held and free parts, grids that halve and grids that do not."""
    rng = np.random.default_rng(3)
    modulus, free = rng.random(shape) ** 3 + 1e-9, free_of(shape)
    force = np.zeros_like(free)
    force[1, -1, -2:] = 1
    stiffness, cycle = Stiffness(shape, free), multigrid.Multigrid(shape, free)
    stiffness.update(modulus)
    cycle.update(modulus)
    found = multigrid.solve(stiffness, cycle, force, tolerance=1e-9)
    assert found.residual <= 1e-9
    expected = sparse_linalg.spsolve(multigrid.assembled(shape, modulus, free).tocsc(), force.ravel())
    np.testing.assert_allclose(found.u.ravel(), expected, atol=1e-6 * np.abs(expected).max())
    again = multigrid.solve(stiffness, cycle, force, start=found.u, tolerance=1e-8)
    assert again.iterations == 0


def test_coarse_grids_are_the_galerkin_products() -> None:
    """P^T K P with the held part left out, formed as dense matrices."""
    shape = (8, 8, 4)
    rng = np.random.default_rng(4)
    modulus, free = rng.random(shape) + 0.1, free_of(shape)
    cycle = multigrid.Multigrid(shape, free)
    cycle.update(modulus)
    level = cycle.levels[0]
    coarse = (3, *(n // 2 + 1 for n in shape))
    unit = np.eye(int(np.prod(coarse)))
    p = np.stack([(free * multigrid.interpolate(e.reshape(coarse))).ravel() for e in unit], axis=1)
    np.testing.assert_allclose(level.matrix.toarray(), p.T @ dense(shape, modulus) @ p, atol=2e-6)
    a, b = rng.normal(size=free.shape) * free, rng.normal(size=coarse)
    assert np.vdot(multigrid.restrict(a), b) == pytest.approx(np.vdot(a, multigrid.interpolate(b)))


def test_the_cycle_is_symmetric_and_positive() -> None:
    shape = (8, 8, 8)
    rng = np.random.default_rng(5)
    free = free_of(shape)
    cycle = multigrid.Multigrid(shape, free)
    cycle.update(np.where(rng.random(shape) > 0.5, 1.0, 1e-2))  # single precision hides more in rounding
    a, b = rng.normal(size=(2, *free.shape)) * free
    left, right = np.vdot(a, cycle(b)), np.vdot(cycle(a), b)
    assert left == pytest.approx(right, rel=1e-3)
    assert np.vdot(a, cycle(a)) > 0


def test_iterations_do_not_grow_with_the_grid() -> None:
    counts = []
    for n in (8, 16):
        problem = problems.cantilever((n,) * 3, 0.5)
        analysis = Analysis(problem, tolerance=1e-6)
        analysis(np.full(problem.shape, 0.5))
        assert analysis.solution is not None
        counts.append(analysis.solution.iterations)
    assert max(counts) <= 12, counts


@given(
    shape=st.sampled_from([(7, 5), (4, 6, 5)]),
    radius=st.floats(1.0, 3.5),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=15, deadline=None)
def test_filter_is_the_weighted_mean_of_the_neighbourhood(shape: tuple[int, ...], radius: float, seed: int) -> None:
    x = np.random.default_rng(seed).random(shape)
    cone = ConeFilter(shape, radius)
    cells = list(itertools.product(*map(range, shape)))
    distance = np.linalg.norm(np.array(cells)[:, None] - np.array(cells)[None], axis=2)
    h = np.maximum(0, radius - distance)
    np.testing.assert_allclose(cone.density(x).ravel(), h @ x.ravel() / h.sum(axis=1), atol=1e-10)
    np.testing.assert_allclose(cone.density_transposed(x).ravel(), h.T @ (x.ravel() / h.sum(axis=1)), atol=1e-10)


@pytest.mark.parametrize("shape", [(6, 4), (4, 4, 4)])
def test_compliance_gradient_is_that_of_differences(shape: tuple[int, ...]) -> None:
    problem = problems.cantilever(shape, 0.4)
    rng = np.random.default_rng(6)
    density = 0.2 + 0.6 * rng.random(shape)
    analysis = Analysis(problem, tolerance=1e-12)
    value, gradient = analysis(density)
    dofs = np.where(~problem.fixed.ravel())[0]
    k = dense(shape, analysis.modulus(density, 3.0))[np.ix_(dofs, dofs)]
    f = problem.force.ravel()[dofs].astype(float)
    assert value == pytest.approx(f @ linalg.solve(k, f, assume_a="pos"), rel=1e-8)
    direction = rng.normal(size=shape)
    high, low = (analysis(density + e * direction)[0] for e in (1e-5, -1e-5))
    assert np.sum(gradient * direction) == pytest.approx((high - low) / 2e-5, rel=1e-5)


def test_optimality_criteria_keep_volume_bounds_and_moves() -> None:
    rng = np.random.default_rng(7)
    x, gradient = rng.random((6, 6)), -rng.random((6, 6)) * 100
    weights = 0.5 + rng.random((6, 6))
    target = float(np.vdot(weights, x)) / x.size
    found = optimality_criteria(x, gradient, weights, target, 0.2)
    assert np.vdot(weights, found) == pytest.approx(target * x.size, rel=1e-6)
    assert np.abs(found - x).max() <= 0.2 + 1e-12
    assert found.min() >= 0
    assert found.max() <= 1


MBB, CANTILEVER = problems.mbb_beam((60, 20)), problems.cantilever((60, 20), 0.5)


@pytest.mark.parametrize(
    ("problem", "kind", "published"),
    [
        pytest.param(MBB, "sensitivity", 216.81, id="MBB, Andreassen et al. 2011"),
        pytest.param(MBB, "density", 233.71, id="MBB, topoptlab"),
        pytest.param(CANTILEVER, "sensitivity", 208.44, id="cantilever, topoptlab"),
    ],
)
def test_benchmark_has_the_published_compliance(problem: problems.Problem, kind: str, published: float) -> None:
    """60 x 20 elements, half of them material. topoptlab: an independent program, whose tests state these values (S. Hiemer)."""
    design = optimise(problem, Settings(filter=kind, radius=2.4, limit=400, tolerance=1e-8))
    assert design.compliance == pytest.approx(published, rel=0.001)
    assert design.density.mean() == pytest.approx(0.5, abs=1e-3)


def test_a_symmetric_problem_has_a_symmetric_design() -> None:
    shape = (8, 8, 8)
    problem = problems.cantilever(shape, 0.3)
    design = optimise(problem, Settings(limit=12, tolerance=1e-7))
    np.testing.assert_allclose(design.density, design.density[:, :, ::-1], atol=1e-4)


def test_a_design_beats_the_uniform_one_and_its_history_falls() -> None:
    problem = families.draw("bridge", np.random.default_rng(0)).problem(8)
    design = optimise(problem, Settings(limit=15, tolerance=1e-4))
    values = [s.compliance for s in design.steps]
    assert design.compliance < 0.5 * values[0]
    assert all(b < 1.02 * a for a, b in itertools.pairwise(values))
    ended = optimise(problem, Settings(limit=15), on_step=lambda number, step, density: number == 3)
    assert len(ended.steps) == 3


def test_continuation_raises_the_penalty_before_it_ends() -> None:
    problem = problems.cantilever((12, 8), 0.5)
    design = optimise(problem, Settings(penalty_start=1.0, penalty_step=0.5, limit=60, change=0.05))
    assert [s.penalty for s in design.steps[:6]] == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    assert len(design.steps) > 5


def test_a_coarse_grid_that_rounding_made_indefinite_is_solved_all_the_same() -> None:
    """Pieces without support in single precision: eigenvalues of 0, and some a little below."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((40, 40)))
    for lowest in (0.0, -1e-9, -1e-7):
        values = np.concatenate([np.full(6, lowest), rng.uniform(0.1, 1, 34)])
        matrix = basis @ np.diag(values) @ basis.T
        stiff = basis[:, 6:] @ rng.standard_normal(34)  # a load that the supported part carries
        found = linalg.cho_solve(multigrid.positive_factor(matrix), matrix @ stiff)
        np.testing.assert_allclose(basis[:, 6:].T @ found, basis[:, 6:].T @ stiff, rtol=1e-2)
    with pytest.raises(linalg.LinAlgError, match="positive definite"):
        multigrid.positive_factor(-np.eye(3))
