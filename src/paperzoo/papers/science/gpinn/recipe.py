"""Gradient-enhanced physics-informed networks: no data, only an equation and points to test it at.

A step is one update by Adam or, at the end of a stage, a block of L-BFGS iterations, over all collocation points. With
`refine_rounds` the first stage is followed by stages that each begin by adding the points where the residual is largest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from paperzoo.data.arrays import read_array
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.papers.science.gpinn.problems import PROBLEMS, Solution
from paperzoo.papers.science.gpinn.technique import FullyConnected, GradientEnhancedLoss, gradient, refine

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Name = Literal[tuple(PROBLEMS)]


@dataclass(frozen=True)
class Config:
    """A problem of section 3 and how it is solved; the defaults are those of section 3.2.1 (Poisson in one dimension)."""

    problem: Name = "poisson"
    points: Count = 15  # collocation points
    gradient_weight: Weight = 0.01  # w of eq. (3), for every coordinate; 0 is a plain physics-informed network
    observation_weight: Weight = 1.0  # of the measured values, in inverse problems
    width: Count = 20
    depth: Count = 3  # hidden layers
    initialisation: Literal["uniform", "normal"] = "uniform"  # Glorot's
    steps: Count = 20_000
    lbfgs_steps: Natural = 0  # how many steps at the end of each stage are L-BFGS
    lbfgs_iterations: Count = 20  # in one such step
    learning_rate: Positive = 1e-3  # of Adam
    refine_rounds: Natural = 0
    refine_steps: Natural = 0  # in each round
    refine_points: Natural = 0  # added in each round
    candidates: Count = 100_000  # random points among which they are found
    test_points: Count = 1000  # along each axis


@dataclass(frozen=True)
class Values:
    """The answer for one set of points: coordinates (N, d), outputs (N, m) with their names, |residual| (N,)."""

    points: np.ndarray
    values: np.ndarray
    outputs: tuple[str, ...]
    residual: np.ndarray


class GPINN(Recipe):
    config: Config
    monitor = ("relative_l2", "min")

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        self.problem = PROBLEMS[config.problem]()
        self.first_stage = config.steps - config.refine_rounds * config.refine_steps
        if self.first_stage < 1:
            refining = config.refine_rounds * config.refine_steps
            raise PaperZooError(
                f"steps is {config.steps}; it must exceed refine_rounds * refine_steps, which is {refining}"
            )
        if config.refine_rounds and min(config.refine_points, config.refine_steps) < 1:
            raise PaperZooError("with refine_rounds, refine_points and refine_steps must be 1 or more")
        if config.refine_points > config.candidates:
            raise PaperZooError(
                f"refine_points is {config.refine_points}; it must not exceed candidates ({config.candidates})"
            )
        self.facts = self.facts or {"coordinates": self.problem.coordinates, "outputs": self.problem.outputs}
        axes = len(self.problem.coordinates)
        normal = config.initialisation == "normal"
        networks = [FullyConnected(axes, 1, config.width, config.depth, normal) for _ in self.problem.outputs]
        self.model = runtime.place(Solution(self.problem, networks))
        self.added = runtime.place(Added(config.refine_rounds * config.refine_points, axes))
        self.loss = GradientEnhancedLoss([config.gradient_weight] * axes)
        self.adam = torch.optim.Adam(self.model.parameters(), config.learning_rate)
        self.lbfgs = torch.optim.LBFGS(
            self.model.parameters(),
            max_iter=config.lbfgs_iterations,
            history_size=50,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        self.start = self.problem.points(config.points).float()
        measured = self.problem.observations()
        self.measured = None if measured is None else (measured.float(), self.problem.exact(measured)[:, :1].float())

    # -- learning ------------------------------------------------------------------------------------------------

    def stage(self, step: int) -> tuple[int, int, int]:
        """(round, step within it, steps of it); round 0 comes before any refinement."""
        if step < self.first_stage:
            return 0, step, self.first_stage
        past, length = step - self.first_stage, self.config.refine_steps
        return past // length + 1, past % length, length

    def collocation(self, round_: int) -> Tensor:
        """The points of a round, (N, d): the first ones, and all that were added until then."""
        return torch.cat([self.start.to(self.added.points), self.added.points[: round_ * self.config.refine_points]])

    def objective(self, points: Tensor) -> Tensor:
        """This rank's part of the loss; its average over the ranks is the loss over all points."""
        mine, importance = self.share(points)
        loss = self.loss(self.model, self.model.residual, mine, importance)
        if self.measured is not None:
            places, truth = (self.share(values.to(points)) for values in self.measured)
            error = (self.model(places[0])[:, :1] - truth[0]).square().sum(1)
            loss = loss + self.config.observation_weight * (places[1] * error).sum()
        return loss

    def share(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's rows and their importance, such that averaging over ranks averages over all rows.

        Rows that do not divide evenly are filled up with a repeated one of importance 0.
        """
        world, count = self.runtime.world, len(rows)
        missing = -count % world
        importance = torch.cat([rows.new_full((count,), world / count), rows.new_zeros(missing)])
        filled = torch.cat([rows, rows[-1:].expand(missing, -1)])
        return self.runtime.shard(filled), self.runtime.shard(importance)

    def step(self, batch: None) -> dict:
        round_, place, length = self.stage(self.runtime.step)
        self.model.train()
        values: dict[str, Any] = {}
        with torch.autocast(self.runtime.device.type, enabled=False):  # third derivatives need the precision
            if place == 0 and round_ > 0:
                values["mean_residual"] = self.add_points(round_)
                self.adam.state.clear()  # the released scripts start each round with a new optimizer
            points = self.collocation(round_)
            turn = max(0, length - self.config.lbfgs_steps)
            if place < turn:
                loss = self.objective(points)
                self.runtime.update(self.adam, loss)
            else:
                if place == turn:
                    self.lbfgs.state.clear()
                loss = self.runtime.minimise(self.lbfgs, lambda: self.objective(points))
        unknowns = {name: value.detach() for name, value in self.model.unknowns().items()}
        return {"training_loss": loss.detach(), **unknowns, **values}

    def add_points(self, round_: int) -> float:
        """Residual-based adaptive refinement: the worst of many random points join. The same on every rank."""
        config, problem = self.config, self.problem
        low, high = torch.tensor(problem.low), torch.tensor(problem.high)
        generator = self.runtime.rng("candidates", per_rank=False)
        candidates = low + (high - low) * torch.rand(config.candidates, len(low), generator=generator)
        candidates = candidates.to(self.added.points)
        worst, mean = refine(self.model, self.model.residual, candidates, config.refine_points)
        rows = slice((round_ - 1) * config.refine_points, round_ * config.refine_points)
        self.added.points[rows] = worst
        return mean

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.enable_grad()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Relative L2 errors on a grid, of the solution, of its derivatives and of what an inverse problem infers."""
        self.model.eval()
        count = (
            self.config.test_points
            if len(self.problem.coordinates) == 1
            else max(2, round(self.config.test_points ** (2 / 3)))
        )
        points = self.problem.grid(count).to(self.runtime.device)
        truth = self.problem.exact(points)
        outputs, slopes, residual = self.fields(points.float())
        metrics = {"relative_l2": relative(outputs[:, 0], truth[:, 0])}
        true_slopes = self.problem.exact_gradient(points)
        if true_slopes is not None:
            for i, name in enumerate(self.problem.coordinates):
                metrics[f"relative_l2_du_d{name}"] = relative(slopes[:, i], true_slopes[:, i])
        for i, name in enumerate(self.problem.outputs[1:], 1):
            metrics[f"relative_l2_{name}"] = relative(outputs[:, i], truth[:, i])
        for name, value in self.model.unknowns().items():
            metrics[f"relative_error_{name}"] = abs(float(value.detach()) / self.problem.unknowns[name] - 1)
        metrics["mean_residual"] = float(residual.mean())
        return metrics

    def fields(self, points: Tensor, chunk: int = 20_000) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs (N, m), the first output's derivatives (N, d) and |residual| (N,), without a graph."""
        parts = []
        for part in points.split(chunk):
            part = part.detach().clone().requires_grad_(True)
            outputs = self.model(part)
            slopes = gradient(outputs[:, :1], part)
            parts.append((outputs.detach(), slopes.detach(), self.model.residual(part, outputs).detach().abs().sum(1)))
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))

    @torch.inference_mode(False)
    @torch.enable_grad()
    def predict(self, inputs: list) -> list[Values]:
        """Each input is a set of points: one point, an array (N, d), or in one dimension (N,); or a .npy, .csv or .txt file of them."""
        self.model.eval()
        return [self.predict_one(value) for value in inputs]

    def predict_one(self, value: Any) -> Values:
        axes = len(self.problem.coordinates)
        try:
            points = np.asarray(read_array(value) if isinstance(value, str | Path) else value, dtype=np.float32)
        except (TypeError, ValueError):
            raise PaperZooError(
                f"an input is a {type(value).__name__}; it must be an array of coordinates or a file with one"
            ) from None
        shape = points.shape
        points = points.reshape(-1, 1) if axes == 1 and points.ndim < 2 else np.atleast_2d(points)
        if points.ndim != 2 or points.shape[1] != axes:
            raise PaperZooError(
                f"the points have shape {shape}; they must be (N, {axes}), columns {', '.join(self.problem.coordinates)}"
            )
        low, high = np.float32(self.problem.low), np.float32(self.problem.high)
        if not bool(np.all((points >= low - 1e-5) & (points <= high + 1e-5))):
            raise PaperZooError(
                f"some points lie outside the problem's domain, from {self.problem.low} to {self.problem.high}"
            )
        outputs, _, residual = self.fields(torch.tensor(points, device=self.runtime.device))
        return Values(points, outputs.cpu().numpy(), self.problem.outputs, residual.cpu().numpy())

    def example(self) -> tuple[Tensor]:
        return (self.problem.points(max(2, self.config.points))[:2].float(),)

    def draw(self, value: Any, result: Values) -> Image.Image:
        """The predicted outputs over the points: lines in one dimension, colours in two."""
        from paperzoo.engine.pictures import new_figure, to_picture

        figure, plot = new_figure()
        if result.points.shape[1] == 1:
            order = result.points[:, 0].argsort()
            for name, column in zip(result.outputs, result.values.T, strict=True):
                plot.plot(result.points[order, 0], column[order], label=name, marker="." if len(order) < 50 else None)
            plot.set_xlabel("x")
            plot.legend(fontsize=8)
        else:
            figure.colorbar(plot.scatter(result.points[:, 1], result.points[:, 0], c=result.values[:, 0], s=6), ax=plot)
            plot.set(xlabel="t", ylabel="x", title=result.outputs[0])
        return to_picture(figure)

    def figures(self) -> dict[str, Image.Image]:
        """The solution and its derivative against the truth, and the residual, with the collocation points."""
        round_ = self.stage(min(self.runtime.step, self.config.steps - 1))[0]
        points = self.collocation(round_).cpu().numpy()
        if len(self.problem.coordinates) == 1:
            return {"Solution": self.curves(points)}
        return {"Solution": self.maps(points)}

    @torch.inference_mode(False)
    @torch.enable_grad()
    def curves(self, points: np.ndarray) -> Image.Image:
        from paperzoo.engine.pictures import to_picture

        grid = self.problem.grid(400).to(self.runtime.device)
        truth, true_slopes = self.problem.exact(grid).cpu(), self.problem.exact_gradient(grid)
        outputs, slopes, residual = (v.cpu() for v in self.fields(grid.float()))
        shown = [(name, truth[:, i], outputs[:, i]) for i, name in enumerate(self.problem.outputs)]
        shown += [("u'", true_slopes[:, 0].cpu(), slopes[:, 0]), ("|residual|", None, residual)]
        figure, plots = several(len(shown))
        for plot, (name, true, found) in zip(plots, shown, strict=True):
            if true is not None:
                plot.plot(grid[:, 0].cpu(), true, color="black", label="exact")
            plot.plot(grid[:, 0].cpu(), found, "r--", label="network")
            plot.plot(points[:, 0], np.interp(points[:, 0], grid[:, 0].cpu(), found), "k.", markersize=5)
            plot.set(title=name, xlabel="x")
            plot.grid(alpha=0.3)
        plots[0].legend(fontsize=8)
        return to_picture(figure)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def maps(self, points: np.ndarray) -> Image.Image:
        from paperzoo.engine.pictures import to_picture

        grid = self.problem.grid(101).to(self.runtime.device)
        truth = self.problem.exact(grid)[:, 0].cpu()
        outputs, _, residual = (v.cpu() for v in self.fields(grid.float()))
        (x0, t0), (x1, t1) = self.problem.low, self.problem.high
        shown = {"network": outputs[:, 0], "|error|": (outputs[:, 0] - truth).abs(), "|residual| and points": residual}
        figure, plots = several(3)
        for plot, (name, values) in zip(plots, shown.items(), strict=True):
            image = plot.imshow(values.reshape(101, 101), origin="lower", extent=(t0, t1, x0, x1), aspect="auto")
            figure.colorbar(image, ax=plot)
            plot.set(title=name, xlabel="t", ylabel="x")
        plots[2].plot(points[:, 1], points[:, 0], "r.", markersize=2)
        return to_picture(figure)


class Added(nn.Module):
    """The points that refinement added, (rounds * points, d); a buffer, so that they are in every checkpoint."""

    def __init__(self, count: int, axes: int) -> None:
        super().__init__()
        self.register_buffer("points", torch.zeros(count, axes))


def relative(found: Tensor, truth: Tensor) -> float:
    """||found - truth|| / ||truth||."""
    return float((found - truth).norm() / truth.norm())


def several(count: int) -> tuple[Any, list[Any]]:
    """A figure with `count` axes side by side."""
    from paperzoo.engine.pictures import new_figure

    figure, first = new_figure(3.6 * count, 2.8)
    first.remove()
    figure.subplots_adjust(wspace=0.3)
    return figure, [figure.add_subplot(1, count, i + 1) for i in range(count)]


def sweep(config: Config, points: tuple[int, ...], seeds: tuple[int, ...] = (0,)) -> list[dict[str, float]]:
    """The errors against the number of collocation points, with and without the gradient (fig. 2): one row a run."""
    rows = []
    for count in points:
        for weight in (config.gradient_weight, 0.0):
            for seed in seeds:
                runtime = Runtime(seed)
                runtime.begin()
                recipe = GPINN(replace(config, points=count, gradient_weight=weight), runtime)
                while runtime.step < config.steps:
                    runtime.begin()
                    recipe.step(None)
                    runtime.finish()
                rows.append({"points": count, "gradient_weight": weight, "seed": seed, **recipe.evaluate()})
    return rows


RECIPE = GPINN
PRESETS = {
    "embedded": Config(points=12, steps=415, lbfgs_steps=15),
    "published": Config(),  # sec. 3.2.1, figs. 2 and 3: Poisson
    # the other experiments, by section, with the weights and iterations of the released scripts
    "function": Config(problem="function", steps=10_000),  # 3.1
    "diffusion_reaction": Config(  # 3.2.2, figs. 4 and 5
        problem="diffusion_reaction", points=50, gradient_weight=0.1, learning_rate=1e-4, steps=100_000
    ),
    "viscosity": Config(problem="brinkman_viscosity", points=10, gradient_weight=0.1, steps=50_000),  # 3.3.1, fig. 6
    "viscosity_permeability": Config(  # 3.3.1, fig. 7
        problem="brinkman_viscosity_permeability", points=10, gradient_weight=0.1, steps=50_000
    ),
    "reaction_rate": Config(problem="reaction_rate", points=10, learning_rate=1e-4, steps=200_000),  # 3.3.2
    "burgers": Config(  # 3.4.1, figs. 10 and 11: 10 points are added, 40 times
        problem="burgers",
        points=1500,
        gradient_weight=1e-4,
        width=32,
        initialisation="normal",
        steps=20_100 + 40 * 10_100,
        lbfgs_steps=100,
        lbfgs_iterations=150,  # the released scripts allow L-BFGS 15,000 iterations
        refine_rounds=40,
        refine_steps=10_100,
        refine_points=10,
    ),
    "allen_cahn": Config(  # 3.4.2: 30 points are added, 100 times
        problem="allen_cahn",
        points=500,
        gradient_weight=1e-4,
        width=64,
        depth=4,
        initialisation="normal",
        steps=20_100 + 100 * 10_100,
        lbfgs_steps=100,
        lbfgs_iterations=150,
        refine_rounds=100,
        refine_steps=10_100,
        refine_points=30,
    ),
}
BASELINE = (GPINN, replace(PRESETS["embedded"], gradient_weight=0.0))
