import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.trainers.policies import ASKED, OBJECTIVES, evaluated
from trimtab.trainers import distinct_n, evaluate, hypervolume
from trimtab.trainers.evaluation.fronts import at_kl

coordinates = st.floats(-1, 3, width=32)
point_sets = st.tuples(st.integers(1, 5), st.integers(1, 4)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=coordinates)
)


def by_inclusion_and_exclusion(points, reference):
    corners = np.maximum(points - reference, 0)
    return sum(
        (-1) ** (size + 1) * corners[list(chosen)].min(0).prod()
        for size in range(1, len(corners) + 1)
        for chosen in itertools.combinations(range(len(corners)), size)
    )


@settings(deadline=None)
@given(point_sets)
def test_hypervolume_is_the_volume_of_the_union(points):
    reference = np.zeros(points.shape[1])
    expected = by_inclusion_and_exclusion(points, reference)
    assert hypervolume(points, reference) == pytest.approx(expected, abs=1e-9)


def test_hypervolume_by_monte_carlo():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 1, (12, 4))
    inside = (rng.uniform(0, 1, (200_000, 1, 4)) < points).all(-1).any(-1).mean()
    assert hypervolume(points, np.zeros(4)) == pytest.approx(inside, abs=0.005)


def test_hypervolume_of_many_sets_at_once():
    sets = np.random.default_rng(1).normal(size=(3, 4, 6, 3))
    reference = np.array([-1.0, -0.5, 0.0])
    expected = [[hypervolume(s, reference) for s in row] for row in sets]
    assert np.allclose(hypervolume(sets, reference), expected)
    assert hypervolume(np.zeros((2, 0, 3)), reference).tolist() == [0.0, 0.0]


def test_hypervolume_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match=r"got the shapes \[2, 3\] and \[2\]"):
        hypervolume(np.zeros((2, 3)), np.zeros(2))
    with pytest.raises(ValueError, match="NaN"):
        hypervolume(np.full((1, 2), np.nan), np.zeros(2))


def test_distinct_n_by_hand():
    assert distinct_n(["The cat, the dog.", "A cat"], 1) == 4 / 6  # the cat dog a
    assert distinct_n(["the cat the cat", "the cat"], 2) == 2 / 4  # the cat, cat the
    assert distinct_n(["one"], 2) == 0


def test_at_kl_is_linear_interpolation_that_stops_at_the_strongest():
    rng = np.random.default_rng(0)
    kls = rng.uniform(1, 9, (5, 3))
    gains = rng.normal(size=(5, 3, 2))
    for kl in (0.0, 0.5, 4.0, 20.0):
        for i in range(5):
            order = np.argsort(kls[i])
            expected = [
                np.interp(kl, [0, *kls[i][order]], [0, *gains[i][order, j]]) for j in (0, 1)
            ]
            assert np.allclose(at_kl(kls, gains, kl)[i], expected)


@pytest.fixture
def result(tmp_path):
    return evaluated(tmp_path)


def test_gains_are_exact_where_the_noise_is_shared(result):
    result, points = result
    for name in OBJECTIVES:
        std = points[0].rewards[name].std()
        assert result["unguided"][name]["std"] == pytest.approx(std)
        # Noise is shared within a seed, the baseline is the mean of both.
        for entry, point in zip(result["points"], points):
            seeds = [r.mean() for r in point.rewards[name]]
            expected = (np.median(seeds) - points[0].rewards[name].mean()) / std
            assert entry["gain"][name]["value"] == pytest.approx(expected)
            assert entry["gain"][name]["low"] <= expected <= entry["gain"][name]["high"]


def test_hypervolumes_of_methods_and_at_equal_kl(result):
    result, points = result
    (plane,) = result["planes"]
    assert plane["objectives"] == list(OBJECTIVES) and plane["unguided"] == 1.0
    scale = [result["unguided"][o] for o in OBJECTIVES]

    def front(method, strength, seed):
        rows = [p for p in points if (p.method, p.strength) == (method, strength)]
        return np.array(
            [
                [
                    (p.rewards[o][seed].mean() - s["mean"]) / s["std"]
                    for o, s in zip(OBJECTIVES, scale)
                ]
                for p in rows
            ]
        )

    def volume(*fronts):
        return np.median([by_inclusion_and_exclusion(f, np.full(2, -1.0)) for f in fronts])

    (far,) = plane["other_references"]
    assert (far["reference"], far["unguided"], far["matched"]) == (-3.0, 9.0, [])
    fronts = [front("weak", 1, s) + 3 for s in (0, 1)]
    expected = np.median([by_inclusion_and_exclusion(f, np.zeros(2)) for f in fronts])
    assert far["hypervolume"][0]["value"] == pytest.approx(expected)
    found = {(row["method"], row["strength"]): row for row in plane["hypervolume"]}
    assert found["weak", 1]["value"] == pytest.approx(
        volume(front("weak", 1, 0), front("weak", 1, 1))
    )
    assert found["strong", 1.0]["value"] == pytest.approx(volume(front("strong", 1.0, 0)))
    assert found["weak", 1]["points"] == 3
    matched = {(row["method"], row["kl"]): row["value"] for row in plane["matched"]}
    halfway = [(front("weak", 1, s) + front("weak", 2, s)) / 2 for s in (0, 1)]  # KL 2 and 8
    assert matched["weak", 5.0] == pytest.approx(volume(*halfway))
    assert matched["weak", 20.0] == pytest.approx(found["weak", 2]["value"])
    assert matched["strong", 5.0] == pytest.approx(found["strong", 1.0]["value"])  # its bound is 4
    lead = found["strong", 1.0]["value"] - found["weak", 1]["value"]
    assert found["weak", 1]["behind"]["value"] == pytest.approx(lead)
    assert found["strong", 1.0]["behind"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    both = [np.concatenate([front("weak", 1, s), front("weak", 2, s)]) for s in (0, 1)]
    whole = {row["method"]: row for row in plane["fronts"]}
    assert whole["weak"]["value"] == pytest.approx(volume(*both))
    assert whole["weak"]["points"] == 6
    strong = found["strong", 1.0]["value"]
    assert whole["weak"]["behind"]["value"] == pytest.approx(strong - whole["weak"]["value"])
    assert found["weak", 1]["behind_front"]["value"] == pytest.approx(lead)
    joint = [(p.method, p.strength, g) for p, g in zip(points[1:], result["points"][1:])]
    corners = np.array([[g["gain"][o]["value"] for o in OBJECTIVES] for _, _, g in joint])
    on_front = np.array(
        [not ((corners >= one).all(1) & (corners > one).any(1)).any() for one in corners]
    )
    for (method, strength), row in found.items():
        own = [(m, s) == (method, strength) for m, s, _ in joint]
        assert row["on_joint_front"] == on_front[own].sum()


def test_kl_comes_from_the_best_source_there_is(result):
    entries = {(e["method"], e["strength"]): e for e in result[0]["points"]}
    assert entries["weak", 2]["kl_kind"] == "exact" and entries["weak", 2]["kl"]["value"] == 8.0
    strong = entries["strong", 1.0]
    assert strong["kl_kind"] == "bound" and strong["kl"]["value"] == 4.0
    assert strong["log_ratio"] is None and strong["cost"] == 3.0


def test_judges_that_disagree_are_named(result):
    agrees = {
        (row["objective"], row["method"], row["strength"]): row["agrees"]
        for row in result[0]["judges"]
    }
    assert agrees["blue", "weak", 2] is True
    assert agrees["red", "weak", 2] is False


def test_hypervolumes_by_the_judges_are_those_of_their_scores(result):
    result, points = result
    judged = [dataclasses.replace(p, rewards=p.judged, judged={}) for p in points]
    expected = evaluate(judged, **ASKED)
    assert result["judged_planes"] == expected["planes"] != result["planes"]
    assert expected["judged_planes"] == []


def test_what_is_compared_must_be_there(result):
    with pytest.raises(ValueError, match="got 'weak' with 6"):
        evaluate(result[1], baseline="weak")
    with pytest.raises(ValueError, match=r"`against` must be .* got \('strong', 3\)"):
        evaluate(result[1], against=("strong", 3))
    with pytest.raises(ValueError, match="`planes` names 'green'"):
        evaluate(result[1], planes=[("red", "green")])
