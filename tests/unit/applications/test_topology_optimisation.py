"""topology_optimisation: problems and files that are refused, the data set made in pieces, networks, losses, metrics."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from applications.topology_optimisation import (
    APPLICATION,
    augment,
    data,
    dataset,
    families,
    floor,
    generator,
    metrics,
    pictures,
    pipeline,
    problems,
)
from applications.topology_optimisation import loss as losses
from applications.topology_optimisation.model import CosineBlock, cosines, fill, node_fields
from fl_core.contracts.errors import ConfigError, DataError, EnvironmentFault
from fl_core.learning.torch_arrays import predict
from fl_core.learning.windows import Windows
from hpc_trainer.processes import join
from hpc_trainer.trainer import Trainer, TrainingData
from tests.helpers import ROOT, eventually

SMALL = ["data.size=8", "data.clients=2", "data.problems_per_client=2", "data.iterations=4"]
CONFIG = APPLICATION.configure(SMALL)


@pytest.fixture(scope="module")
def designs() -> data.Designs:
    return generator.generate(CONFIG, 0)


def arrays_of(example: data.Example) -> dict[str, Any]:
    p = example.problem
    return {
        "density": example.density.copy(), "force": p.force.copy(), "fixed": p.fixed.copy(),
        "volume_fraction": np.float64(p.volume_fraction), "client": np.array(example.client),
    }  # fmt: skip


def break_density(value: float) -> Any:
    def change(a: dict[str, Any]) -> None:
        a["density"][1, 2, 3] = value

    return change


def put(name: str, value: Any) -> Any:
    def change(a: dict[str, Any]) -> None:
        a[name] = value(a[name]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (break_density(np.nan), "density is not finite at cell (1, 2, 3)"),
        (break_density(1.5), "density is 1.5 at cell (1, 2, 3)"),
        (put("density", lambda d: d[0]), "expected floats on a grid of three axes"),
        (put("force", lambda f: np.stack([f, f])), "force holds 2 load cases"),
        (put("force", lambda f: f[:, :-1]), "force is float32[3, 8, 9, 9], expected"),
        (put("force", lambda f: f * 0), "nothing loads the free nodes"),
        (put("force", lambda f: f * np.inf), "force is not finite at component"),
        (put("fixed", lambda f: f.astype(float)), "fixed is float64"),
        (put("fixed", lambda f: f & False), "the supports let the whole body move"),
        (put("volume_fraction", np.float64(0.9)), "volume_fraction is 0.9"),
        (put("volume_fraction", np.float64(2)), "volume_fraction is 2.0, expected 0.01 to 0.99"),
        (put("volume_fraction", np.ones(2)), "volume_fraction is float64[2]"),
        (put("client", np.array("../up")), "client"),
    ],
)
def test_a_bad_file_is_refused_by_name_and_cell(change: Any, words: str, designs: data.Designs, tmp_path: Path) -> None:
    content = arrays_of(designs.items[0])
    with np.errstate(invalid="ignore"):
        change(content)
    file = tmp_path / "part.npz"
    np.savez(file, **content)
    with pytest.raises(DataError) as refused:
        data.read(tmp_path)
    assert words in str(refused.value)
    assert "part.npz" in str(refused.value)


def test_a_truncated_file_and_an_empty_folder_are_refused(designs: data.Designs, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.npz file"):
        data.read(tmp_path)
    (tmp_path / "cut.npz").write_bytes(designs.items[0].to_bytes()[:-200])
    with pytest.raises(DataError, match=r"cut\.npz: not a readable npz file"):
        data.read(tmp_path)


def test_another_size_is_refused_with_those_there(designs: data.Designs) -> None:
    with pytest.raises(DataError, match=r"no problem on a grid of \[16, 16, 16\]; there are \[\[8, 8, 8\]\]"):
        designs.examples(APPLICATION.configure())
    with pytest.raises(ConfigError, match="multiple of 8"):
        APPLICATION.configure(["data.size=12"])


def test_one_held_line_is_a_hinge() -> None:
    fixed = np.zeros((3, 4, 4, 4), bool)
    fixed[:, 0, 0, :] = True
    assert problems.rank(fixed) == 5
    fixed[0, 3, 3, 0] = True
    assert problems.rank(fixed) == 6


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_makes_problems_of_every_grid(family: str) -> None:
    for seed in range(5):
        spec = families.draw(family, np.random.default_rng(seed))
        wholes = [spec.problem(n) for n in (8, 16, 32)]
        for p in wholes:
            np.testing.assert_allclose(np.linalg.norm(p.force.sum(axis=(1, 2, 3))), 1, rtol=1e-4)


def test_fine_grids_start_from_the_coarse_design(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "COARSEST_START", 8)
    spec = generator.spec_of(0, 1, 0)
    fine, coarse = (generator.solved(spec, n, 4, "company-0001", "x") for n in (16, 8))
    blocks = fine.density.reshape(8, 2, 8, 2, 8, 2).mean(axis=(1, 3, 5))
    assert np.corrcoef(blocks.ravel(), coarse.density.ravel())[0, 1] > 0.8
    assert fine.density.mean() == pytest.approx(spec.volume_fraction, abs=2e-3)


DATASET = ["-m", "applications.topology_optimisation.dataset"]


def test_a_killed_data_set_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    options = ["--size", "8", "--clients", "2", "--problems", "3", "--iterations", "3"]
    command = [sys.executable, *DATASET, str(tmp_path / "set"), *options]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    eventually(lambda: len(list((tmp_path / "set").glob("*.npz"))) >= 2 or running.poll() is not None, 60)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "set").glob("*.npz")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "6 designs of 8^3" in done.stdout
    found = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "set").glob("*.npz")}
    assert len(found) == 6
    assert all(found[name] == at for name, at in kept.items())
    assert len(APPLICATION.read(tmp_path / "set").client_ids()) == 2


def test_known_coarse_designs_are_not_solved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "COARSEST_START", 8)
    options = ["--clients", "1", "--problems", "1", "--iterations", "4"]
    assert dataset.main([str(tmp_path / "coarse"), "--size", "8", *options]) == 0
    fine = ["--size", "16", "--coarse", str(tmp_path / "coarse"), *options]
    assert dataset.main([str(tmp_path / "fine"), *fine]) == 0
    assert dataset.main([str(tmp_path / "alone"), "--size", "16", *options]) == 0
    kept, alone, coarse = (APPLICATION.read(tmp_path / d).items[0].load() for d in ("fine", "alone", "coarse"))
    np.testing.assert_allclose(kept.density, alone.density, atol=1e-5)
    assert kept.seconds > coarse.seconds  # what the coarse design took is not forgotten
    (file,) = (tmp_path / "coarse").iterdir()
    file.rename(file.with_name("company-0000-1-00000-8.npz"))
    with pytest.raises(DataError, match="another problem"):
        dataset.main([str(tmp_path / "other"), "--seed", "1", *fine])


def test_streamed_designs_are_the_ones_in_memory_and_train_the_same(designs: data.Designs, tmp_path: Path) -> None:
    designs.write(tmp_path / "d")
    losses_of = []
    for memory in (0, 100):
        settings = [
            *SMALL,
            f"data.in_memory_mb={memory}",
            "model.compliance_weight=0.1",
            "model.width=4",
            "model.depth=1",
        ]
        config = APPLICATION.configure([*settings, "pretrain.epochs=1", "pretrain.batch_size=2", "data.judged=4"])
        examples = APPLICATION.read(tmp_path / "d").examples(config)
        streamed = [
            isinstance(a, Windows) for a in (examples.inputs["force"], examples.inputs["response"], examples.targets)
        ]
        assert streamed == [memory == 0] * 3
        part = examples.take([3, 1])
        whole = designs.examples(APPLICATION.configure([*settings[:4], *settings[5:]])).take([3, 1])
        for name, array in whole.inputs.items():
            np.testing.assert_array_equal(part.inputs[name], array)
        np.testing.assert_array_equal(part.targets, whole.targets)
        assert (
            metrics.metrics(config, {"density": pipeline.target_density(part.targets)}, part)["compliance_error"] < 0.01
        )
        sets = TrainingData(train=examples, validation=part, clients=examples.clients())
        trainer = Trainer(APPLICATION, config, sets, processes=join(), out=tmp_path / str(memory), seed=0)
        trainer.run()
        losses_of.append(trainer.losses)
    assert losses_of[0] == losses_of[1]


def test_designs_that_fit_neither_memory_nor_disk(designs: data.Designs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/full")
    with pytest.raises(EnvironmentFault, match="TMPDIR"):
        designs.examples(APPLICATION.configure([*SMALL, "data.in_memory_mb=0"]))


def test_node_fields_are_means_over_each_cells_nodes() -> None:
    rng = np.random.default_rng(0)
    force, fixed = rng.normal(size=(2, 3, 5, 5, 5)), rng.random((2, 3, 5, 5, 5)) < 0.3
    size = np.sqrt((force**2).sum(axis=1, keepdims=True))
    nodes = np.concatenate([force, size, fixed], axis=1)
    found = node_fields(torch.from_numpy(force), torch.from_numpy(fixed), torch.tensor([0.2, 0.4])).numpy()
    mean = sum(nodes[:, :, i : i + 4, j : j + 4, k : k + 4] for i, j, k in np.ndindex(2, 2, 2)) / 8
    np.testing.assert_allclose(found[:, :7], 2 * mean, atol=1e-6)
    np.testing.assert_allclose(found[:, 7], np.broadcast_to([[[[0.2]]], [[[0.4]]]], (2, 4, 4, 4)), atol=1e-7)


def test_any_logits_are_filled_up_to_the_volume() -> None:
    """However far from zero, and on whichever grid."""
    for seed, (scale, offset, side) in enumerate(
        ((1.0, 0.0, 8), (8.0, -90.0, 16), (30.0, 150.0, 16), (200.0, 0.0, 48))
    ):
        torch.manual_seed(seed)
        fraction = torch.tensor([0.1, 0.286, 0.6])
        density = fill(offset + scale * torch.randn(3, side, side, side), fraction)
        torch.testing.assert_close(density.double().mean(dim=(1, 2, 3)), fraction.double(), rtol=1e-4, atol=0)


def test_density_fills_exactly_the_volume_and_its_gradient_knows() -> None:
    torch.manual_seed(0)
    logits = (4 * torch.randn(3, 4, 4, 4, dtype=torch.float64)).requires_grad_()
    fraction = torch.tensor([0.1, 0.35, 0.9], dtype=torch.float64)
    density = fill(logits, fraction)
    np.testing.assert_allclose(density.mean(dim=(1, 2, 3)).detach(), fraction, atol=1e-5)
    weights = torch.rand_like(density)
    (gradient,) = torch.autograd.grad((weights * density).sum(), logits)
    step = torch.randn_like(logits)
    with torch.no_grad():
        high, low = ((weights * fill(logits + e * step, fraction)).sum() for e in (1e-4, -1e-4))
    assert float((gradient * step).sum()) == pytest.approx(float(high - low) / 2e-4, rel=1e-3)


def test_cosines_are_orthonormal_and_a_block_sees_the_whole_box() -> None:
    table = cosines(8, 5, torch.zeros(1, dtype=torch.float64))
    np.testing.assert_allclose(table.T @ table, np.eye(5), atol=1e-12)
    assert torch.equal(cosines(2, 4, torch.zeros(1))[:, 2:], torch.zeros(2, 2))
    block = CosineBlock(4, 3, "none").double()
    x = torch.zeros(1, 4, 8, 8, 8, dtype=torch.float64)
    far = x.clone()
    far[:, :, 0, 0, 0] = 1
    assert (block(far) - block(x))[0, :, -1, -1, -1].abs().max() > 1e-6


@pytest.mark.parametrize("architecture", ["unet", "fourier"])
@pytest.mark.parametrize("response", ["none", "coarse", "full"])
def test_the_same_weights_serve_every_grid(architecture: str, response: str) -> None:
    chosen = [f"model.architecture={architecture}", f"data.response={response}", "data.iterations=1"]
    made = [APPLICATION.configure([*SMALL, *chosen, f"data.size={n}", "data.clients=1"]) for n in (8, 16)]
    models = [APPLICATION.build_model(c) for c in made]
    models[1].load_state_dict(models[0].state_dict())
    for config, model in zip(made, models, strict=True):
        examples = generator.generate(config, 0).examples(config)
        outputs = predict(model, APPLICATION, config, examples)
        assert metrics.metrics(dataclasses.replace(config), outputs, examples)["volume_error"] < 1e-5


def test_the_large_preset_has_over_a_hundred_million_parameters() -> None:
    config = APPLICATION.configure(preset="large")
    with torch.device("meta"):
        model = APPLICATION.build_model(config)
        shapes = [s.shape for s in APPLICATION.inputs(config)]
        values = [torch.zeros(1, *s[1:]) for s in shapes]
    count = sum(p.numel() for p in model.parameters())
    assert 1e8 < count < 6e8
    assert model(*values).shape == (1, *(config.data.size,) * 3)
    assert 16 * count < 10 * 2**30, "weights, gradients and AdamW's moments fit 10 GiB"


def test_compliance_loss_has_the_adjoint_gradient() -> None:
    config = APPLICATION.configure([*SMALL, "model.compliance_weight=1.0"])
    examples = generator.generate(config, 0).examples(config).take([0, 3])
    targets = torch.from_numpy(examples.targets)
    assert targets.shape == (2, 7, 9, 9, 9)
    torch.manual_seed(0)
    density = (0.3 + 0.4 * torch.rand(2, 8, 8, 8, dtype=torch.float64)).requires_grad_()
    found = losses.problems(targets)
    value = losses.LogCompliance.apply(density, found)
    for i, problem in enumerate(found):
        expected = metrics.compliance(problem, density[i].detach().numpy())
        assert float(value[i].detach()) == pytest.approx(np.log(expected), rel=1e-4)
    (gradient,) = torch.autograd.grad(value.sum(), density)
    step = torch.randn_like(density)
    with torch.no_grad():
        high, low = (losses.LogCompliance.apply(density + e * step, found).sum() for e in (1e-3, -1e-3))
    assert float((gradient * step).sum()) == pytest.approx(float(high - low) / 2e-3, rel=1e-2)
    both, supervised = (losses.loss(density.detach(), targets, c)[0] for c in (config, CONFIG))
    assert float(both - supervised) == pytest.approx(float(value.detach().sum()))


def test_the_response_is_the_analysis_of_the_solid_box(designs: data.Designs) -> None:
    problem = pipeline.scaled(designs.items[0].problem)
    full, half = pipeline.response(problem, 8), pipeline.response(problem, 4)
    assert full.shape == (7, 8, 8, 8)
    means = full[0].reshape(4, 2, 4, 2, 4, 2).mean(axis=(1, 3, 5))
    assert np.corrcoef(means.ravel(), half[0].ravel())[0, 1] > 0.9
    louder = dataclasses.replace(problem, force=problem.force * 40)
    np.testing.assert_allclose(pipeline.response(pipeline.scaled(louder), 8), full, atol=1e-4)


def test_metrics_of_the_truth_and_of_worse_designs(designs: data.Designs) -> None:
    examples = designs.examples(CONFIG)
    truth = pipeline.target_density(examples.targets)
    perfect = metrics.metrics(CONFIG, {"density": truth}, examples)
    assert perfect["compliance_error"] == pytest.approx(0, abs=5e-3)
    assert perfect["volume_error"] < 2e-3
    assert perfect["density_error"] == 0
    fraction = examples.inputs["volume_fraction"].reshape(-1, 1, 1, 1)
    grey = metrics.metrics(CONFIG, {"density": np.broadcast_to(fraction, truth.shape)}, examples)
    assert grey["compliance_error"] > 0.3
    assert grey["binarity"] < perfect["binarity"]
    gone = metrics.metrics(CONFIG, {"density": np.full(truth.shape, 1e-3)}, examples)
    assert gone["failed"] == 1
    none = metrics.metrics(APPLICATION.configure([*SMALL, "data.judged=0"]), {"density": truth}, examples)
    assert "compliance_error" not in none


def test_upright_symmetries_leave_the_ground_where_it_is() -> None:
    ground = np.zeros((4, 4, 4))
    ground[..., 0] = 1
    upright = augment.GROUPS["upright"]
    assert len(set(upright)) == 8
    assert all(np.array_equal(augment.moved(ground, s), ground) for s in upright)
    assert sum(np.array_equal(augment.moved(ground, s), ground) for s in augment.GROUPS["cube"]) == 8


@pytest.mark.parametrize("symmetry", augment.GROUPS["cube"][::7])
def test_a_moved_problem_has_the_moved_response_and_design(symmetry: augment.Symmetry, designs: data.Designs) -> None:
    """The moved inputs are those of the moved problem, analysed afresh; the moved design is as stiff."""
    example = designs.items[1]
    problem = pipeline.scaled(example.problem)
    moved = problems.Problem(
        shape=problem.shape,
        force=augment.moved_vector(problem.force, symmetry),
        fixed=augment.moved_vector(problem.fixed, symmetry, signed=False),
        volume_fraction=problem.volume_fraction,
    )
    fresh = pipeline.response(moved, 8)
    turned = augment._moved_response(pipeline.response(problem, 8), symmetry)
    assert np.corrcoef(turned.ravel(), fresh.ravel())[0, 1] > 0.999  # both are solved to 1 % only
    density = example.density.astype(np.float64)
    stiff, same = metrics.compliance(problem, density), metrics.compliance(moved, augment.moved(density, symmetry))
    assert same == pytest.approx(stiff, rel=1e-3)


def test_symmetries_move_packed_targets_with_their_problem(designs: data.Designs) -> None:
    config = APPLICATION.configure([*SMALL, "data.symmetry=cube"])
    examples = designs.examples(config)
    keys = np.arange(len(examples), dtype=np.uint64) * np.uint64(2**60 + 12345)
    packed = pipeline.packed_targets(examples.targets, dict(examples.inputs))
    moved = augment.targets(packed, keys, config)
    inputs = augment.inputs(dict(examples.inputs), keys, config)
    np.testing.assert_array_equal(pipeline.target_density(moved), augment.targets(examples.targets, keys, config))
    np.testing.assert_array_equal(moved[:, 1:4], inputs["force"])
    np.testing.assert_array_equal(moved[:, 4:7], inputs["fixed"])


def test_the_floor_is_the_nearest_design_at_the_wanted_volume(designs: data.Designs) -> None:
    examples = designs.examples(CONFIG)
    same = APPLICATION.floor_function()(CONFIG, examples, examples, seed=0)["nearest known design"]["density"]
    np.testing.assert_allclose(same, pipeline.target_density(examples.targets), atol=5e-3)
    other = floor.filled(examples.targets[0], 0.6)
    assert other.mean() == pytest.approx(0.6, abs=1e-6)


def test_the_surface_of_a_ball_is_that_of_a_ball() -> None:
    at = np.indices((24,) * 3) - 11.5
    faces, normals = pictures.surface(np.clip(8.5 - np.sqrt((at**2).sum(axis=0)), 0, 1))
    area = np.linalg.norm(np.cross(faces[:, 1] - faces[:, 0], faces[:, 2] - faces[:, 0]), axis=1).sum() / 2
    assert area == pytest.approx(4 * np.pi * 8**2, rel=0.08)
    assert (((faces.mean(axis=1) - 12) * normals).sum(axis=1) > 0).all()
    assert pictures.structures({"ball": np.ones((4, 4, 4)), "nothing": np.zeros((4, 4, 4))}, "t").startswith(b"\x89PNG")


def test_solid_designs_are_compared_without_grey(designs: data.Designs) -> None:
    examples = designs.examples(CONFIG)
    truth = pipeline.target_density(examples.targets)[0].astype(np.float64)
    assert metrics.solid(truth, 0.25).sum() == 128
    sharper = floor.filled(np.clip(truth, 0.2, 0.8) ** 3, float(examples.inputs["volume_fraction"][0]))
    problem = pipeline.problem_of(dict(examples.inputs), 0)
    ours, theirs = (metrics.solid_compliance(problem, d) for d in (sharper, truth))
    assert ours == pytest.approx(theirs, rel=1e-6), "the same order of cells"


def test_designs_are_sharper_outside_training(designs: data.Designs) -> None:
    config = APPLICATION.configure([*SMALL, "model.sharpness=4.0"])
    examples = designs.examples(config)
    found = [
        pipeline.binarity(predict(APPLICATION.build_model(c), APPLICATION, c, examples)["density"]).mean()
        for c in (APPLICATION.configure([*SMALL, "model.sharpness=1.0"]), config)
    ]
    assert found[1] > found[0]


def test_floating_counts_pieces_without_support() -> None:
    fixed = np.zeros((3, 7, 7, 7), bool)
    fixed[:, 0] = True
    density = np.zeros((6, 6, 6))
    density[:3, 2, 2] = 1
    assert metrics.floating(density, fixed) == 0
    density[4:, 4, 4] = 1
    assert metrics.floating(density, fixed) == pytest.approx(2 / 5)
    assert metrics.floating(density * 0, fixed) == 0


def test_a_known_compliance_is_used_and_an_unknown_one_computed(designs: data.Designs) -> None:
    unknown = data.Designs(tuple(dataclasses.replace(e, compliance=0.0) for e in designs.items))
    truth = pipeline.target_density(designs.examples(CONFIG).targets)
    a, b = (metrics.metrics(CONFIG, {"density": truth * 0.9}, d.examples(CONFIG)) for d in (designs, unknown))
    assert a["compliance_error"] == pytest.approx(b["compliance_error"], rel=0.02)
