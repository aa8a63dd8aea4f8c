"""The standardised space of a parametrization: names, bounds and levels of its coordinates.

Nevergrad gives every parametrization a vector of real numbers, unit 1 the standard deviation of a
mutation. Here is what that vector does not tell: which knob a coordinate belongs to, where it ends,
and which coordinates only count at certain values: integers, booleans, choices.
"""

from __future__ import annotations

import nevergrad as ng
import numpy as np
from nevergrad.parametrization import _datalayers, _layering

FloatArray = np.ndarray

# A category is chosen by raising its weight by this much: any other is drawn once in 10^7 times.
_CHOSEN = 16.0


def _leaves(parameter: ng.p.Parameter, path: str = "") -> list[tuple[str, ng.p.Parameter]]:
    """The parameters that own coordinates, with their names, in standardised order."""
    if isinstance(parameter, ng.p.Instrumentation):
        args, kwargs = parameter[0], parameter[1]
        return _leaves(args, path) + _leaves(kwargs, path)
    if isinstance(parameter, ng.p.Container):
        content = parameter._content
        found = []
        for key in sorted(content):  # the order in which containers concatenate their data
            found += _leaves(content[key], f"{path}.{key}" if path else str(key))
        return found
    return [(path, parameter)] if parameter.dimension else []


def coordinate_name(parametrization: ng.p.Parameter, coordinate: int) -> str:
    """The name of a coordinate of the standardised space: ``"pool"``, ``"cpu[3]"``, ``"net.a[0]"``.

    Args:
        parametrization: the optimizer's parametrization.
        coordinate: a position in its standardised data.

    Raises:
        IndexError: for a position outside the standardised data.
    """
    offset = coordinate
    for name, leaf in _leaves(parametrization):
        if 0 <= offset < leaf.dimension:
            shape = leaf._value.shape if isinstance(leaf, ng.p.Data) else (leaf.dimension,)
            if leaf.dimension == 1 and name:
                return name
            return (
                f"{name or 'x'}[{','.join(str(int(k)) for k in np.unravel_index(offset, shape))}]"
            )
        offset -= leaf.dimension
    raise IndexError(f"coordinate is {coordinate}: expected 0 to {parametrization.dimension - 1}")


def standardized_bounds(
    parametrization: ng.p.Parameter,
) -> tuple[FloatArray | None, FloatArray | None]:
    """Lower and upper bounds of every coordinate in standardised space, ``[d]`` each.

    ``None`` where no coordinate has one. Bounds by ``arctan``, ``tanh`` or ``gaussian`` transforms
    leave the standardised space unbounded, and so do bounds behind another operation: there the
    parametrization itself keeps values inside.
    """
    lower, upper = [], []
    for _, leaf in _leaves(parametrization):
        low, high = np.full(leaf.dimension, -np.inf), np.full(leaf.dimension, np.inf)
        if isinstance(leaf, ng.p.Data):
            operations = _datalayers.Operation.filter_from(leaf)
            layer = operations[0] if operations else None
            method = getattr(layer, "_method", "constraint")
            if (
                isinstance(layer, _datalayers.BoundLayer)
                and not isinstance(layer, _datalayers.Modulo)
                and method in ("bouncing", "clipping", "constraint")
            ):
                for bound, out in zip(layer.bounds, (low, high)):
                    if bound is not None:
                        whole = np.broadcast_to(bound, leaf._value.shape)
                        out[:] = leaf._to_reduced_space(whole - leaf._value)
        lower.append(low)
        upper.append(high)
    lows, highs = np.concatenate(lower), np.concatenate(upper)
    return (
        lows if np.isfinite(lows).any() else None,
        highs if np.isfinite(highs).any() else None,
    )


class Levels:
    """The coordinates that count only at levels: integers, booleans, ordered and plain choices.

    An integer moves from level to level. A choice owns one coordinate (a weight) per category and
    moves from category to category, the weight of the chosen one being high.

    Attributes:
        positions: ``[n] int64`` sorted coordinates with levels, the weights of choices included.
        integers: ``[n] bool``: which of them are integers and not weights.
    """

    def __init__(self, parametrization: ng.p.Parameter) -> None:
        self._integers: list[tuple[slice, ng.p.Data, FloatArray, FloatArray]] = []
        self._choices: list[FloatArray] = []  # per choice the places of its weights, among ours
        self._weights: list[FloatArray] = []  # and those weights at the initial point
        positions: list[np.ndarray] = []
        integers: list[np.ndarray] = []
        offset = 0
        for _, leaf in _leaves(parametrization):
            part = slice(offset, offset + leaf.dimension)
            offset = part.stop
            layers = _layering.Int.filter_from(leaf) if isinstance(leaf, ng.p.Data) else []
            if not layers:
                continue
            assert isinstance(leaf, ng.p.Data)
            place = int(sum(p.size for p in positions))
            positions.append(np.arange(part.start, part.stop))
            weights = isinstance(layers[-1], _datalayers.SoftmaxSampling)
            integers.append(np.full(leaf.dimension, not weights))
            if weights:
                places = place + np.arange(leaf.dimension)
                self._choices += list(places.reshape(-1, layers[-1].arity))
                self._weights += list(np.reshape(leaf._value, (-1, layers[-1].arity)))
            else:
                self._integers.append((part, leaf, *_range(leaf, layers[-1])))
        self.positions = np.concatenate(positions) if positions else np.zeros(0, dtype=np.int64)
        self.integers = np.concatenate(integers) if integers else np.zeros(0, dtype=bool)
        lower, upper = standardized_bounds(parametrization)
        self._lower = np.full(offset, -np.inf) if lower is None else lower
        self._upper = np.full(offset, np.inf) if upper is None else upper

    def __bool__(self) -> bool:
        return bool(self.positions.size)

    def snap(self, x: FloatArray) -> FloatArray:
        """``x`` (``[d]``) with every such coordinate at the middle of its level."""
        x = x.copy()
        for part, leaf, _, _ in self._integers:
            x[part] = _coordinates(leaf, _value(leaf, x[part]))
        for places, initial in zip(self._choices, self._weights):
            weights = initial + x[self.positions[places]]
            x[self.positions[places]] = 0.0
            x[self.positions[places[int(np.argmax(weights))]]] = _CHOSEN
        return x

    def neighbours(self, x: FloatArray, lengths: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Steps (``[n]``, zero or below and zero or above) to another level of each integer.

        Args:
            x: ``[d]``, snapped.
            lengths: ``[n]``, how far: to the level that lies there, but one level at least.
        """
        down, up = np.zeros(self.positions.size), np.zeros(self.positions.size)
        for part, leaf, least, most in self._integers:
            start = int(np.searchsorted(self.positions, part.start))
            here = slice(start, start + leaf.dimension)
            value = _value(leaf, x[part])
            for sign, out in ((-1, down), (1, up)):
                to = np.clip(x[part] + sign * lengths[here], self._lower[part], self._upper[part])
                far = _value(leaf, to)
                far = np.where(sign * (far - value) > 1, far, value + sign)
                out[here] = _coordinates(leaf, np.clip(far, least, most)) - x[part]
        return down, up

    def draw(
        self,
        rng: np.random.RandomState,
        x: FloatArray,
        down: FloatArray,
        up: FloatArray,
        share: float,
    ) -> FloatArray:
        """Random steps to other levels, ``[n]``; about ``share`` of the knobs take one."""
        moved = rng.random_sample(self.positions.size) < share
        above = rng.random_sample(self.positions.size) < 0.5
        above = np.where((down == 0) | (up == 0), up > 0, above)
        step = np.where(above, up, down) * moved
        for places in self._choices:
            if rng.random_sample() < share and places.size > 1:
                now = int(np.argmax(x[self.positions[places]]))
                other = (now + 1 + rng.randint(places.size - 1)) % places.size
                step[places[now]], step[places[other]] = -_CHOSEN, _CHOSEN
        return step

    def thin(self, rng: np.random.RandomState, jumps: FloatArray, share: float) -> FloatArray:
        """Jumps (``[n]``) of which each knob keeps its own with probability ``share``."""
        kept = rng.random_sample(jumps.size) < share
        for places in self._choices:
            kept[places] = kept[places[0]]
        return jumps * kept

    def reached(self, x: FloatArray, jumps: FloatArray) -> list[tuple[int, float]]:
        """Where jumps (``[n]``) from ``x`` lead: of every knob that moves, its place and level."""
        moved = np.flatnonzero((jumps > 0) | (jumps < 0) & self.integers)
        return [(int(k), round(float(x[self.positions[k]] + jumps[k]), 4)) for k in moved]

    def without(self, jumps: FloatArray, place: int) -> FloatArray:
        """Jumps (``[n]``) without that of the knob at a place, all weights of a choice included."""
        jumps = jumps.copy()
        jumps[place] = 0.0
        for places in self._choices:
            if place in places:
                jumps[places] = 0.0
        return jumps

    def categories(self, x: FloatArray) -> list[tuple[int, FloatArray]]:
        """Of every choice, the coordinate of the chosen category and those of all (``[k]``)."""
        found = []
        for places in self._choices:
            coordinates = self.positions[places]
            found.append((int(coordinates[np.argmax(x[coordinates])]), coordinates))
        return found

    def switch(self, now: int, other: int) -> tuple[np.ndarray, FloatArray]:
        """Coordinates and steps of a switch between two categories, by their coordinates."""
        return np.array([now, other]), np.array([-_CHOSEN, _CHOSEN])


def _value(leaf: ng.p.Data, x: FloatArray) -> np.ndarray:
    child = leaf.spawn_child()
    child.set_standardized_data(x, reference=leaf)
    return np.asarray(child.value)


def _coordinates(leaf: ng.p.Data, value: np.ndarray) -> FloatArray:
    child = leaf.spawn_child()
    child.value = value if isinstance(leaf, ng.p.Array) else value.item()
    return np.asarray(child.get_standardized_data(reference=leaf), dtype=float)


def _range(leaf: ng.p.Data, layer: _layering.Int) -> tuple[FloatArray, FloatArray]:
    """Lowest and highest level of every integer of a leaf, in its shape."""
    shape = np.shape(leaf.value)
    if layer.arity is not None:
        return np.zeros(shape, dtype=np.int64), np.full(shape, layer.arity - 1)
    ends = []
    for bound, away, rounding in zip(leaf.bounds, (-(2**62), 2**62), (np.ceil, np.floor)):
        whole = np.full(np.size(leaf.value), away, dtype=np.int64)
        if bound is not None:
            whole[:] = rounding(np.ravel(bound))
        ends.append(whole.reshape(shape))
    return ends[0], ends[1]
