"""Operator learning and equations: solvers against exact solutions, files, the gradient-enhanced recipe."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from paperzoo.data import burgers, darcy, navier_stokes
from paperzoo.data.arrays import cached_arrays, read_array, read_mat
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError
from paperzoo.papers.science.fno.model import fno1d, fno2d
from paperzoo.papers.science.fno.recipe import PRESETS as FNO_PRESETS
from paperzoo.papers.science.gpinn.recipe import GPINN, Config, sweep
from paperzoo.papers.science.gpinn.technique import FullyConnected, GradientEnhancedLoss
from paperzoo.tasks.operator_learning import OperatorRecipe, open_pairs, relative_l2


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERZOO_CACHE", str(tmp_path / "cache"))


# -- solvers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("viscosity", [0.1, 0.01])
def test_burgers_solver_agrees_with_cole_hopf(viscosity):
    initial = burgers.random_functions(3, 256, seed=1)
    exact = np.stack([burgers.cole_hopf(u, viscosity, 1.0) for u in initial])
    found = burgers.solve_burgers(initial, viscosity)
    assert np.linalg.norm(found - exact) < 1e-6 * np.linalg.norm(exact)


def test_burgers_solver_is_of_fourth_order():
    initial = burgers.random_functions(1, 64, seed=2)
    exact = burgers.cole_hopf(initial[0], 0.1, 1.0)
    coarse, fine = (np.abs(burgers.solve_burgers(initial, 0.1, steps=n)[0] - exact).max() for n in (400, 800))
    assert coarse / fine > 8


def test_random_functions_do_not_depend_on_the_grid_but_for_its_band():
    fine, coarse = (burgers.random_functions(2, n, seed=3) for n in (512, 256))
    kept = np.fft.rfft(fine)[:, :128] / 512
    np.testing.assert_allclose(kept, np.fft.rfft(coarse)[:, :128] / 256, atol=1e-12)


def test_random_functions_have_the_stated_covariance():
    functions = burgers.random_functions(2000, 64, seed=4)
    k = 2 * np.pi * np.arange(1, 32)
    expected = (2 * 625 / (k**2 + 25) ** 2).sum()
    assert functions.var() == pytest.approx(expected, rel=0.05)
    assert abs(functions.mean(axis=1)).max() < 1e-12


def test_darcy_solver_converges_at_second_order():
    errors = []
    for n in (21, 41):
        x, y = np.meshgrid(*[np.linspace(0, 1, n)] * 2, indexing="ij")
        u = np.sin(np.pi * x) * np.sin(2 * np.pi * y)
        u_x = np.pi * np.cos(np.pi * x) * np.sin(2 * np.pi * y)
        u_y = 2 * np.pi * np.sin(np.pi * x) * np.cos(2 * np.pi * y)
        a = 1 + x + y**2
        errors.append(np.abs(darcy.solve_darcy(a, 5 * np.pi**2 * a * u - u_x - 2 * y * u_y) - u).max())
    assert 3.8 < errors[0] / errors[1] < 4.2


def test_darcy_pairs_are_thinned_and_zero_on_the_edges():
    permeability, pressure = darcy.darcy_pairs(2, 8, seed=0, reference=15)
    assert permeability.shape == pressure.shape == (2, 1, 8, 8)
    assert set(permeability.unique().tolist()) == {3.0, 12.0}
    assert float(pressure[..., 0, :].abs().max()) == 0.0 and float(pressure.min()) >= 0.0
    with pytest.raises(PaperZooError, match="reference - 1"):
        darcy.darcy_pairs(2, 9, seed=0, reference=15)


def test_navier_stokes_solver_keeps_the_taylor_green_vortex():
    start = navier_stokes.taylor_green(16, 0.01, 0.0)
    found = navier_stokes.solve_vorticity(start[None], 0.01, np.array([0.1, 0.2]), 1e-3, np.zeros((16, 16)))
    np.testing.assert_allclose(found[0, ..., 1], navier_stokes.taylor_green(16, 0.01, 0.2), atol=1e-5)


def test_navier_stokes_pairs_continue_the_input():
    inputs, outputs = navier_stokes.navier_stokes_pairs(1, 8, 1e-2, seed=0, reference=8, horizon=12)
    assert inputs.shape == (1, 10, 8, 8, 2) and outputs.shape == (1, 1, 8, 8, 2)
    assert torch.equal(inputs[..., 0], inputs[..., 1]) and bool(outputs.isfinite().all())


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_cached_set_is_made_once_and_again_when_damaged(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"a": np.arange(3)}

    assert cached_arrays("x", make)["a"].tolist() == cached_arrays("x", make)["a"].tolist() == [0, 1, 2]
    assert len(calls) == 1
    file = tmp_path / "cache" / "x.npz"
    file.write_bytes(file.read_bytes()[:40])
    assert cached_arrays("x", make)["a"].tolist() == [0, 1, 2] and len(calls) == 2
    assert [p.name for p in file.parent.iterdir()] == ["x.npz"]


def matlab_5(path, fields):
    import scipy.io

    scipy.io.savemat(path, fields)


def matlab_73(path, fields):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, values in fields.items():
            file[name] = values.T
    with open(path, "r+b") as file:  # the header that MATLAB puts before the HDF5 content
        file.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")


@pytest.mark.parametrize("write", [matlab_5, matlab_73])
def test_pairs_are_read_from_both_kinds_of_matlab_files(tmp_path, write):
    values = np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32)
    path = tmp_path / "burgers_data_R10.mat"
    write(path, {"a": values, "u": 2 * values})
    config = replace(FNO_PRESETS["embedded"], data=str(path), train_samples=4, test_samples=2)
    inputs, outputs = open_pairs(config, 16)
    np.testing.assert_array_equal(inputs[:, 0].numpy(), values[:, ::2])
    np.testing.assert_array_equal(outputs[:, 0].numpy(), 2 * values[:, ::2])
    with pytest.raises(DataError, match="no field 'b'; it has a, u"):
        read_mat(path, ("b",))
    with pytest.raises(DataError, match="cannot be taken evenly"):
        open_pairs(config, 12)
    with pytest.raises(DataError, match="holds 6 pairs"):
        open_pairs(replace(config, train_samples=5), 16)


def test_files_that_are_none_are_refused_in_one_line(tmp_path):
    broken = tmp_path / "broken.mat"
    broken.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="not a MATLAB file"):
        read_mat(broken, ("a",))
    with pytest.raises(DataError, match="ending is not known"):
        read_array(broken)
    with pytest.raises(DataError, match="no such file"):
        read_array(tmp_path / "missing.npy")
    with pytest.raises(DataError, match="not a data set"):
        open_pairs(replace(FNO_PRESETS["embedded"], data="burgrs"), 16)


# -- operators ---------------------------------------------------------------------------------------------------------


def test_relative_l2_is_one_for_zero_and_averages_over_samples():
    truth = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]])
    torch.testing.assert_close(relative_l2(torch.zeros(2, 1, 2), truth), torch.ones(2))
    torch.testing.assert_close(relative_l2(truth * 1.5, truth), torch.full((2,), 0.5))


def test_one_network_runs_on_many_grids_and_names_those_too_small():
    network = fno1d(modes=5, width=4)
    assert network(torch.randn(2, 1, 8)).shape == (2, 1, 8)
    assert network(torch.randn(2, 1, 33)).shape == (2, 1, 33)
    with pytest.raises(ValueError, match="7 points along axis 0; 5 modes need at least 8"):
        network(torch.randn(2, 1, 7))
    with pytest.raises(ValueError, match=r"must be \(B, 1, n1, n2\)"):
        fno2d(modes=2, width=4)(torch.randn(2, 3, 8, 8))


SMALL = replace(
    FNO_PRESETS["embedded"],
    resolution=16,
    test_resolutions=(32,),
    reference=32,
    train_samples=8,
    test_samples=4,
    modes=3,
    width=4,
    batch_size=4,
)


def operator_recipe(config=SMALL) -> OperatorRecipe:
    runtime = Runtime(0)
    runtime.begin()
    return OperatorRecipe(config, runtime)


def test_operator_recipe_learns_and_predicts_on_every_grid(tmp_path):
    recipe = operator_recipe()
    before = recipe.evaluate()
    for _ in range(20):
        recipe.runtime.begin()
        recipe.runtime.update(recipe.optimizer, recipe.step(recipe.batch())["loss"])
        recipe.runtime.finish()
    after = recipe.evaluate()
    assert after["relative_l2"] < before["relative_l2"] and after.keys() == {"relative_l2", "relative_l2_32"}
    function = np.sin(2 * np.pi * np.arange(64) / 64)
    np.save(tmp_path / "f.npy", function)
    one, stack, file = recipe.predict([function, np.stack([function[::2]] * 3)[:, None], tmp_path / "f.npy"])
    assert one.values.shape == (64,) and stack.values.shape == (3, 1, 32)
    np.testing.assert_array_equal(one.values, file.values)
    with pytest.raises(PaperZooError, match="need at least"):
        recipe.predict([function[:3]])
    assert recipe.draw(function, one).width > 100
    assert set(recipe.figures()) == {"Test functions", "Resolution"}


def test_two_and_three_dimensional_problems_run_through_the_same_recipe():
    flow = replace(
        SMALL, model="fno2d", data="darcy", resolution=8, reference=15, test_resolutions=(15,), normalise="scalar"
    )
    recipe = operator_recipe(flow)
    assert recipe.step(recipe.batch())["loss"].requires_grad and recipe.evaluate()["relative_l2_15"] > 0
    vortices = replace(
        SMALL,
        model="fno3d",
        data="navier_stokes",
        resolution=8,
        reference=8,
        test_resolutions=(),
        viscosity=1e-2,
        train_samples=2,
        test_samples=1,
        batch_size=1,
    )
    recipe = operator_recipe(vortices)
    assert recipe.step(recipe.batch())["loss"].requires_grad
    assert recipe.predict([recipe.test_pairs(8)[0][0]])[0].values.shape == (1, 1, 8, 8, 10)


# -- equations ---------------------------------------------------------------------------------------------------------

TINY = Config(points=5, width=4, depth=1, steps=3, test_points=20)


def equation_recipe(config: Config = TINY, seed: int = 0) -> GPINN:
    runtime = Runtime(seed)
    runtime.begin()
    return GPINN(config, runtime)


def run(recipe: GPINN, steps: int) -> list[dict]:
    values = []
    for _ in range(steps):
        recipe.runtime.begin()
        values.append(recipe.step(None))
        recipe.runtime.finish()
    return values


def test_without_weight_the_loss_is_that_of_a_plain_network():
    torch.manual_seed(0)
    network, x = FullyConnected(1, 1, 4, 1), torch.rand(6, 1)
    residual = lambda x, y: y - x**2  # noqa: E731
    plain, enhanced = GradientEnhancedLoss([0.0]), GradientEnhancedLoss([2.0])
    x.requires_grad_(True)
    f = residual(x, network(x))
    slope = torch.autograd.grad(f.sum(), x)[0]
    torch.testing.assert_close(plain(network, residual, x), f.square().mean())
    torch.testing.assert_close(enhanced(network, residual, x), f.square().mean() + 2 * slope.square().mean())
    with pytest.raises(ValueError, match="1 weights for points with 2"):
        plain(network, residual, torch.rand(6, 2))


def test_the_ranks_losses_average_to_the_loss_over_all_points():
    recipe = equation_recipe(replace(TINY, problem="brinkman_viscosity", points=5))
    points = recipe.collocation(0)
    whole = recipe.objective(points)
    parts = []
    for rank in range(3):
        recipe.runtime.rank, recipe.runtime.world = rank, 3
        parts.append(recipe.objective(points))
    recipe.runtime.rank, recipe.runtime.world = 0, 1
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


REFINED = replace(
    TINY,
    problem="burgers",
    points=6,
    steps=13,
    lbfgs_steps=2,
    lbfgs_iterations=3,
    refine_rounds=2,
    refine_steps=4,
    refine_points=3,
    candidates=50,
)


def test_refinement_adds_points_in_the_domain_at_the_start_of_each_round():
    recipe = equation_recipe(REFINED)
    values = run(recipe, 13)
    assert [i for i, v in enumerate(values) if "mean_residual" in v] == [5, 9]
    assert recipe.collocation(2).shape == (12, 2)
    added = recipe.added.points
    assert len(added.unique(dim=0)) == 6
    assert bool(((added[:, 0].abs() <= 1) & (added[:, 1] >= 0) & (added[:, 1] <= 1)).all())


@pytest.mark.parametrize("at", [4, 5, 7, 8, 9])
def test_refinement_and_lbfgs_resume_bit_for_bit(tmp_path, at):
    from paperzoo.engine.checkpoint import read_checkpoint, restore, save_checkpoint

    first = equation_recipe(REFINED)
    run(first, at)
    save_checkpoint(tmp_path / "checkpoint.pt", first, {})
    run(first, 13 - at)
    stored = read_checkpoint(tmp_path / "checkpoint.pt")
    second = equation_recipe(REFINED, seed=1)
    second.runtime.seed = 0
    restore(second, stored["recipe"])
    second.runtime.load_state_dict(stored["runtime"])
    run(second, 13 - at)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert torch.equal(first.added.points, second.added.points)


@pytest.mark.parametrize(
    "problem", ["function", "diffusion_reaction", "reaction_rate", "brinkman_viscosity_permeability"]
)
def test_every_problem_trains_evaluates_predicts_and_draws(problem):
    recipe = equation_recipe(replace(TINY, problem=problem))
    first, *_, last = (v["training_loss"] for v in run(recipe, 3))
    assert float(last) < float(first)
    metrics = recipe.evaluate()
    assert all(np.isfinite(v) for v in metrics.values()) and "relative_l2" in metrics
    if problem == "brinkman_viscosity_permeability":
        assert {"relative_error_effective_viscosity", "relative_error_permeability"} <= metrics.keys()
    if problem == "reaction_rate":
        assert "relative_l2_k" in metrics
    points = recipe.problem.points(4).numpy()
    with torch.inference_mode():  # as a server would call it
        result = recipe.predict([points])[0]
    assert result.values.shape == (4, len(recipe.problem.outputs)) and result.residual.shape == (4,)
    assert recipe.draw(points, result).width > 100 and recipe.figures()["Solution"].width > 100


def test_points_outside_the_domain_and_of_the_wrong_shape_are_refused():
    recipe = equation_recipe(TINY)
    assert recipe.predict([[0.0, 1.0], 2.0])[0].values.shape == (2, 1)
    with pytest.raises(PaperZooError, match="outside the problem's domain"):
        recipe.predict([[0.0, 4.0]])
    with pytest.raises(PaperZooError, match=r"must be \(N, 1\), columns x"):
        recipe.predict([np.zeros((3, 2))])
    with pytest.raises(PaperZooError, match="array of coordinates"):
        recipe.predict([object()])


def test_a_schedule_without_room_for_the_first_stage_is_refused():
    with pytest.raises(PaperZooError, match="must exceed refine_rounds"):
        equation_recipe(replace(REFINED, steps=8))


def test_the_sweep_has_a_row_for_every_count_weight_and_seed():
    rows = sweep(replace(TINY, steps=2), points=(4, 5), seeds=(0, 1))
    assert [(r["points"], r["gradient_weight"], r["seed"]) for r in rows][:3] == [
        (4, 0.01, 0),
        (4, 0.01, 1),
        (4, 0.0, 0),
    ]
    assert len(rows) == 8
