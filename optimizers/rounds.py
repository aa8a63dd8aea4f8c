"""What the optimizer keeps of a round in progress and of the step that it tries."""

from __future__ import annotations

import dataclasses
import typing as tp

import numpy as np

from . import estimates

FloatArray = np.ndarray


class Open:
    """The round in progress: what was asked for around a base point, and what was told.

    Attributes:
        point: the base point, ``[d]``.
        measurements: the perturbations.
        base: losses told at the base point.
        neighbours: steps down and up that perturbations take of integers, or None.
        losses: losses told at perturbations, by their place among the measurements.
        places: places of the perturbations that may still be told, by number.
        beyond: the loss told beyond a wall, or None.
    """

    def __init__(self, number: int, measurements: estimates.Measurements) -> None:
        self.number = number
        self.measurements = measurements
        self.point = measurements.base
        self.base: list[Loss] = []
        self.losses: dict[int, Loss] = {}
        self.places: dict[int, int] = {}
        self.uids: dict[int, str] = {}
        self.asked = 0
        self.base_asked = 0
        self.reference_asked = False
        self.reference_wanted = False
        self.reference: Loss | None = None
        self.beyond_asked = False
        self.beyond: Loss | None = None
        self.mixing: FloatArray | None = None
        self.neighbours: tuple[FloatArray, FloatArray] | None = None
        self.slopes: FloatArray | None = None  # what is expected at the base point, and how much
        self.rise = 0.0  # more than at the iterate it is expected to cost

    def told(self, repeats: bool) -> int:
        """Answers so far, repeats of the base point counted or not."""
        return (len(self.base) if repeats else bool(self.base)) + len(self.losses)


class Loss(tp.NamedTuple):
    loss: float  # NaN: failed
    violation: float


@dataclasses.dataclass
class Value:
    """The cost at a point: what was measured, and its standard error."""

    loss: float
    violation: float
    error: float


@dataclasses.dataclass
class Plan:
    """A step being tried: ``step`` from the iterate times ``factor``; choices switch as a whole."""

    step: FloatArray
    switch: FloatArray
    slope: float
    quadratic: float
    switch_gain: float
    factor: float = 1.0
    probes: list[tuple[float, float, Loss]] = dataclasses.field(default_factory=list)
    settled: bool = False
    measured: bool = False  # where it leads

    def moved(self, factor: float) -> FloatArray:
        return factor * self.step + (self.switch if factor >= 1 else 0.0)

    def predicted(self, factor: float) -> float:
        """The decrease that the model predicts."""
        gain = -factor * self.slope - 0.5 * factor**2 * self.quadratic
        return gain + (self.switch_gain if factor >= 1 else 0.0)
