"""Peers of CONGO that Nevergrad does not have: Optuna's CMA-ES and TPE, and TuRBO on BoTorch.

Each is asked for points and told their costs, as an optimizer of Nevergrad is, but sees the knobs
as its own users would declare them: with their ranges, levels and logarithms. A knob without bounds
has a range of five mutations to each side of its start. All measure the start first and recommend
the best point measured.
"""

from __future__ import annotations

import math
import typing as tp

import cmaes
import nevergrad as ng
import numpy as np
import optuna
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from gpytorch.constraints import Interval
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood

_FREE_RANGE = 5.0  # mutations to each side


class Knobs:
    """The knobs of an array, or of a dictionary of scalars and choices, by name.

    Attributes:
        distributions: what Optuna draws each from; a choice is drawn by its number.
        start: where they stand.
        unit: the start as a point of the unit cube, ``[d] float64``.
    """

    def __init__(self, parametrization: ng.p.Parameter) -> None:
        self.distributions: dict[str, optuna.distributions.BaseDistribution] = {}
        self.start: dict[str, float] = {}
        self._choices: dict[str, tp.Sequence[tp.Any]] = {}
        self._array = isinstance(parametrization, ng.p.Array)
        if self._array:
            for i, x in enumerate(parametrization.value.ravel()):
                self._add(f"x{i:03d}", parametrization, float(x))
            self._scale()
            return
        for name, knob in parametrization.items():
            if isinstance(knob, ng.p.Choice):
                self._choices[name] = knob.choices.value
                last = len(self._choices[name]) - 1
                self.distributions[name] = optuna.distributions.IntDistribution(0, last)
                self.start[name] = self._choices[name].index(knob.value)
            else:
                self._add(name, knob, knob.value)
        self._scale()

    def _add(self, name: str, knob: tp.Any, start: float) -> None:
        low, high = (None if b is None else float(np.ravel(b)[0]) for b in knob.bounds)
        if low is None or high is None:
            far = _FREE_RANGE * float(np.ravel(knob.sigma.value)[0])
            low, high = start - far, start + far
        self.start[name] = start
        if knob.integer:
            self.distributions[name] = optuna.distributions.IntDistribution(int(low), int(high))
        else:
            log = isinstance(knob, ng.p.Log)
            self.distributions[name] = optuna.distributions.FloatDistribution(low, high, log=log)

    def _scale(self) -> None:
        drawn = self.distributions.values()
        self._log = np.array([getattr(d, "log", False) for d in drawn])
        self._whole = [isinstance(d, optuna.distributions.IntDistribution) for d in drawn]
        low, high, start = np.array(
            [(d.low, d.high, s) for d, s in zip(drawn, self.start.values())], dtype=float
        ).T
        for ends in (low, high, start):
            ends[self._log] = np.log(ends[self._log])
        self._low, self._span = low, high - low
        self.unit = (start - low) / self._span

    def at(self, unit: np.ndarray) -> tp.Any:
        """The value at a point of the unit cube, integers rounded."""
        x = self._low + unit * self._span
        x[self._log] = np.exp(x[self._log])
        if self._array:
            return x
        rounded = [round(v) if whole else float(v) for v, whole in zip(x, self._whole)]
        return self.value(dict(zip(self.distributions, rounded)))

    def value(self, named: dict[str, float]) -> tp.Any:
        """What a cost is asked of."""
        if self._array:
            return np.array(list(named.values()))
        return {
            name: self._choices[name][int(x)] if name in self._choices else x
            for name, x in named.items()
        }


class Point(tp.NamedTuple):
    value: tp.Any
    asked: tp.Any = None  # what it is told by


class TPE:
    """Optuna's TPE as it is by default."""

    def __init__(self, parametrization: ng.p.Parameter, workers: int, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._knobs = Knobs(parametrization)
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        self._study.enqueue_trial(self._knobs.start)

    def ask(self) -> Point:
        trial = self._study.ask(self._knobs.distributions)
        return Point(self._knobs.value(trial.params), trial)

    def tell(self, point: Point, loss: float) -> None:
        self._study.tell(point.asked, loss)

    def recommend(self) -> Point:
        return Point(self._knobs.value(self._study.best_params))


class _InCube:
    """A method that proposes points of the unit cube; failed evaluations are left out."""

    def __init__(self, parametrization: ng.p.Parameter, workers: int, seed: int) -> None:
        self.knobs, self.workers, self.seed = Knobs(parametrization), workers, seed
        self.best, self.least = self.knobs.unit, math.inf
        self._waiting: list[np.ndarray] = [self.knobs.unit]
        self.begin()

    def begin(self) -> None:
        raise NotImplementedError

    def propose(self) -> list[np.ndarray]:
        raise NotImplementedError

    def learn(self, unit: np.ndarray, loss: float) -> None:
        raise NotImplementedError

    def ask(self) -> Point:
        if not self._waiting:
            self._waiting = self.propose()
        unit = self._waiting.pop(0)
        return Point(self.knobs.at(unit), unit)

    def tell(self, point: Point, loss: float) -> None:
        if math.isnan(loss):
            return
        if loss < self.least:
            self.best, self.least = point.asked, loss
        self.learn(point.asked, loss)

    def recommend(self) -> Point:
        return Point(self.knobs.at(self.best))


class OptunaCMA(_InCube):
    """Optuna's CMA-ES by its package ``cmaes``, from the same start, length and bounds.

    Optuna's own bookkeeping takes 20 ms and more an evaluation at 200 knobs.
    """

    def begin(self) -> None:
        d = len(self.knobs.unit)
        self._cma = cmaes.CMA(
            mean=self.knobs.unit,
            sigma=1 / 6,
            bounds=np.tile([0.0, 1.0], (d, 1)),
            seed=self.seed,
            n_max_resampling=10 * d,
        )
        self._told: list[tuple[np.ndarray, float]] = []

    def propose(self) -> list[np.ndarray]:
        return [self._cma.ask()]

    def learn(self, unit: np.ndarray, loss: float) -> None:
        self._told.append((unit, loss))
        if len(self._told) == self._cma.population_size:
            self._cma.tell(self._told)
            self._told = []


class TuRBO(_InCube):
    """TuRBO-1 (Eriksson et al., NeurIPS 2019, arXiv 1910.01739) on BoTorch's Gaussian process.

    Thompson sampling in a box around the best point, as long in a variable as its length scale is
    beside the others'; twice as long after 3 batches that gained, half after ``d / workers`` that
    did not, and begun anew when it has shrunk to nothing. Two points a knob come first.
    """

    def begin(self) -> None:
        self._sobol = torch.quasirandom.SobolEngine(
            len(self.knobs.unit), scramble=True, seed=self.seed
        )
        self._rng = np.random.default_rng(self.seed)
        self._restart()

    def _restart(self) -> None:
        batches = math.ceil(2 * len(self.knobs.unit) / self.workers)
        self._waiting += list(self._draw(batches * self.workers - len(self._waiting)))
        self._x: list[np.ndarray] = []
        self._y: list[float] = []
        self._length, self._least = 0.8, math.inf
        self._gained = self._failed = 0

    def _draw(self, n: int) -> np.ndarray:
        return self._sobol.draw(n).numpy().astype(float)

    def learn(self, unit: np.ndarray, loss: float) -> None:
        self._x.append(unit)
        self._y.append(loss)

    def propose(self) -> list[np.ndarray]:
        least, d = min(self._y), len(self.knobs.unit)
        if self._least < math.inf:
            if least < self._least - 1e-3 * abs(self._least):
                self._gained, self._failed = self._gained + 1, 0
            else:
                self._gained, self._failed = 0, self._failed + 1
            if self._gained == 3:
                self._length, self._gained = min(2 * self._length, 1.6), 0
            elif self._failed == math.ceil(max(4, d) / self.workers):
                self._length, self._failed = self._length / 2, 0
            if self._length < 0.5**7:
                self._restart()
                waiting, self._waiting = self._waiting, []
                return waiting
        self._least = least
        return self._thompson()

    def _thompson(self) -> list[np.ndarray]:
        """For each worker the best of 1,000 candidates in one draw of the process."""
        x, y, d = np.array(self._x), np.array(self._y), len(self.knobs.unit)
        kernel = MaternKernel(nu=2.5, ard_num_dims=d, lengthscale_constraint=Interval(0.005, 4.0))
        model = SingleTaskGP(
            torch.tensor(x),
            torch.tensor((y.mean() - y) / (y.std() or 1.0))[:, None],
            likelihood=GaussianLikelihood(noise_constraint=Interval(1e-6, 1.0)),
            covar_module=ScaleKernel(kernel),
            outcome_transform=None,
        )
        fit_gpytorch_mll(
            ExactMarginalLogLikelihood(model.likelihood, model),
            optimizer_kwargs={"options": {"maxiter": 50}},
        )
        sides = kernel.lengthscale.detach().numpy().ravel()
        sides = self._length * sides / np.exp(np.log(sides).mean())
        best = x[y.argmin()]
        low, high = np.clip(best - sides / 2, 0, 1), np.clip(best + sides / 2, 0, 1)
        moved = self._rng.random((1000, d)) < 20 / d
        moved[np.arange(1000), self._rng.integers(d, size=1000)] = True
        candidates = np.where(moved, low + (high - low) * self._draw(1000), best)
        torch.manual_seed(int(self._rng.integers(1 << 31)))
        with torch.no_grad():
            drawn = model.posterior(torch.tensor(candidates)).rsample(torch.Size([self.workers]))
        chosen: list[int] = []
        for values in drawn[..., 0].numpy():
            values[chosen] = -np.inf
            chosen.append(int(values.argmax()))
        return [candidates[i] for i in chosen]
