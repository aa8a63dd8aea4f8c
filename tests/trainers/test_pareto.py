import dataclasses
import itertools
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trimtab.trainers import (
    PairwiseJudge,
    Policy,
    Response,
    distinct_n,
    evaluate,
    hypervolume,
    judge_points,
    simplex_weights,
    sweep,
    write_report,
)
from trimtab.trainers.pareto import at_kl, verdict

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


@pytest.mark.parametrize(("objectives", "steps"), [(1, 3), (2, 4), (3, 3), (4, 2)])
def test_weights_cover_the_simplex(objectives, steps):
    weights = simplex_weights(objectives, steps)
    parts = itertools.product(range(steps + 1), repeat=objectives)
    expected = {tuple(np.array(p) / steps) for p in parts if sum(p) == steps}
    assert len(weights) == len(expected) and set(map(tuple, weights)) == expected
    assert weights[0].tolist() == [1.0] + [0.0] * (objectives - 1)
    assert weights[-1].tolist() == [0.0] * (objectives - 1) + [1.0]
    with pytest.raises(ValueError, match="steps=0"):
        simplex_weights(objectives, 0)


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


# A world whose rewards can be read off the text: "red 0.5 blue 1.5".
OBJECTIVES = ("red", "blue")
PROMPTS = [f"prompt {i}" for i in range(6)]


def red(completions, **kwargs):
    return [float(re.search(r"red (\S+)", text)[1]) for text in completions]


def blue(completions, **kwargs):
    return [float(re.search(r"blue (\S+)", text)[1]) for text in completions]


def against_red(completions, **kwargs):
    return [-value for value in red(completions)]


REWARDS = {"red": red, "blue": blue}
R = (1.0, 3.0)
WEIGHTS = [{"red": 1.0}, {"red": 0.5, "blue": 0.5}, {"blue": 1.0}]


def noise(i, seed, offset):
    return float(np.random.default_rng([i, seed, offset]).normal())


def respond_with(gain, kl=None, calls=None):
    def respond(prompts, weights, seed):
        if calls is not None:
            calls[tuple(weights.items()), seed] += 1
        responses = []
        for i in range(len(prompts)):
            # The same noise for every method: differences between them are exact.
            r = noise(i, seed, 0) + gain * weights.get("red", 0.0)
            b = noise(i, seed, 1) + gain * weights.get("blue", 0.0)
            responses.append(Response(f"red {r} blue {b}", [1, 2, 3], log_ratio=kl, kl=kl))
        return responses

    return respond


def policies(calls=None):
    return [
        Policy("unguided", respond_with(0.0, 0.0, calls), weights=[{}]),
        Policy("weak", respond_with(1.0, 2.0, calls), strength=1),
        Policy("weak", respond_with(2.0, 8.0, calls), strength=2),
        Policy("strong", respond_with(2.0, calls=calls), kl_bound=4.0, seeds=1),
    ]


def test_a_sweep_asks_once_and_goes_on_where_it_stopped(tmp_path):
    calls = Counter()
    full = sweep(policies(calls), PROMPTS, WEIGHTS, REWARDS, tmp_path, seeds=2)
    assert len(full) == 1 + 3 * 3
    assert [len(point.responses) for point in full] == [2] + [2] * 6 + [1] * 3
    total = calls.total()
    assert total == 2 + 2 * 6 + 3

    def broken(prompts, weights, seed):
        raise KeyboardInterrupt

    stopped = [*policies(calls)[:2], Policy("strong", broken)]
    with pytest.raises(KeyboardInterrupt):
        sweep(stopped, PROMPTS, WEIGHTS, REWARDS, tmp_path / "other", seeds=2)
    again = sweep(policies(calls), PROMPTS, WEIGHTS, REWARDS, tmp_path / "other", seeds=2)
    assert calls.total() == total + total  # nothing twice, nothing left out
    for one, other in zip(full, again):
        texts = [[r.text for r in row] for row in one.responses]
        assert texts == [[r.text for r in row] for row in other.responses]
        for name in OBJECTIVES:
            assert np.array_equal(one.rewards[name], other.rewards[name])
            assert np.array_equal(one.rewards[name], [REWARDS[name](row) for row in texts])


def test_a_changed_reward_function_scores_stored_responses_again(tmp_path):
    calls = Counter()
    sweep(policies(calls), PROMPTS, WEIGHTS, REWARDS, tmp_path, seeds=1)
    total = calls.total()
    (point, *_) = sweep(
        policies(calls), PROMPTS, WEIGHTS, {"red": against_red, "blue": blue}, tmp_path, seeds=1
    )
    assert calls.total() == total
    texts = [r.text for r in point.responses[0]]
    assert point.rewards["red"].tolist() == [against_red(texts)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "`prompts` is empty"),
        ({"seeds": 0}, "`seeds` must be at least 1, got 0"),
        ({"weights": [{"green": 1.0}]}, "name 'green'; the objectives are"),
        ({"judges": {"green": red}}, "`judges` has 'green'"),
        ({"policies": policies()[1:2] * 2}, "twice: give another `method`"),
        ({"policies": [Policy("short", lambda p, w, s: [])]}, "returned 0 responses for 6 prompts"),
    ],
)
def test_a_sweep_refuses_what_it_cannot_run(change, message, tmp_path):
    given = {
        "policies": policies(),
        "prompts": PROMPTS,
        "weights": WEIGHTS,
        "reward_funcs": REWARDS,
        "seeds": 1,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        sweep(**given, folder=tmp_path)


@pytest.fixture
def result(tmp_path):
    points = sweep(
        policies(), PROMPTS, WEIGHTS, REWARDS, tmp_path, seeds=2,
        judges={"red": against_red, "blue": blue},
    )  # fmt: skip
    return evaluate(
        points, kl_budgets=[5.0, 20.0], against=("strong", 1.0), draws=200, references=R
    ), points


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
    expected = evaluate(
        judged, kl_budgets=[5.0, 20.0], against=("strong", 1.0), draws=200, references=R
    )
    assert result["judged_planes"] == expected["planes"] != result["planes"]
    assert expected["judged_planes"] == []


def test_what_is_compared_must_be_there(result):
    with pytest.raises(ValueError, match="got 'weak' with 6"):
        evaluate(result[1], baseline="weak")
    with pytest.raises(ValueError, match=r"`against` must be .* got \('strong', 3\)"):
        evaluate(result[1], against=("strong", 3))
    with pytest.raises(ValueError, match="`planes` names 'green'"):
        evaluate(result[1], planes=[("red", "green")])


def test_a_plane_without_what_is_compared_against_is_reported(tmp_path):
    mixed = Policy("mixed", respond_with(1.0), weights=[{"red": 0.5, "blue": 0.5}])
    points = sweep([*policies()[:2], mixed], PROMPTS, WEIGHTS, REWARDS, tmp_path, seeds=2)
    result = evaluate(points, [("red",)], against=("mixed", mixed.strength), draws=20)
    write_report(result, tmp_path / "front")
    red, both = (tmp_path / "front.md").read_text().split("## Hypervolume: ")[1:3]
    assert "ahead by" not in red and "ahead by" in both


def test_reports_hold_every_point_and_need_no_network(result, tmp_path):
    result, _ = result
    files = write_report(result, tmp_path / "out" / "front", intro="# Title\n\n")
    assert files[1].read_text().startswith("# Title\n\n6 prompts;")
    assert [file.name for file in files] == [f"front.{e}" for e in ("json", "md", "png", "html")]
    written = json.loads(files[0].read_text(), parse_constant=pytest.fail)  # no NaN
    assert len(written["points"]) == 10
    table = files[1].read_text().split("## Points")[1]
    assert len(re.findall(r"^\| (?:unguided|weak|strong) \|", table, re.M)) == 10
    assert "**no**" in files[1].read_text()
    assert files[2].read_bytes().startswith(b"\x89PNG")
    page = files[3].read_text()
    assert not re.search(r"https?://|src=|href=", page)
    data = re.search(r"const data = (.*);\n", page)[1].replace("<\\/", "</")
    assert len(json.loads(data)["points"]) == 10


class FakeJudge(BaseHTTPRequestHandler):
    """An OpenAI-compatible server whose answers a function of the question decides."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        if self.server.failures:
            self.server.failures -= 1
            self.send_response(503)
            self.end_headers()
            return
        reply = self.server.answer(body["messages"][0]["content"])
        message = {"role": "assistant", "content": reply}
        payload = json.dumps(
            {
                "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            }
        ).encode()  # fmt: skip
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


@pytest.fixture
def judge_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeJudge)
    server.asked, server.failures = [], 0
    server.answer = lambda question: "tie"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def prefers_good(question):
    a, b = re.search(r"Answer A:\n(.*)\n\nAnswer B:\n(.*)\n\nWhich", question).groups()
    return "A" if "good" in a else "B" if "good" in b else "tie"


def make_judge(server, tmp_path, **kwargs):
    return PairwiseJudge(
        f"http://127.0.0.1:{server.server_port}/v1", "judge", tmp_path / "answers.jsonl", **kwargs
    )


def test_a_judge_counts_wins_that_hold_in_both_orders(judge_server, tmp_path):
    judge_server.answer = prefers_good
    judge = make_judge(judge_server, tmp_path)
    prompts = ["one", [{"role": "user", "content": "two"}], "three"]
    wins = judge.compare("is better", prompts, ["good", "bad", "bad"], ["bad", "good", "worse"])
    assert wins.tolist() == [1.0, 0.0, 0.5]
    assert len(judge_server.asked) == 6
    questions = [body["messages"][0]["content"] for body in judge_server.asked]
    assert sum("Prompt:\ntwo\n" in question for question in questions) == 2
    assert all(body["temperature"] == 0 for body in judge_server.asked)


def test_a_preference_for_a_place_is_a_tie(judge_server, tmp_path):
    judge_server.answer = lambda question: "Answer A."
    judge = make_judge(judge_server, tmp_path)
    assert (
        judge.compare("is better", ["p"] * 3, ["x", "y", "z"], ["u", "v", "w"]).tolist()
        == [0.5] * 3
    )


def test_answers_are_kept_and_failures_tried_again(judge_server, tmp_path):
    judge_server.answer = prefers_good
    judge_server.failures = 2
    judge = make_judge(judge_server, tmp_path, concurrency=1)
    assert judge.compare("is better", ["p"], ["good"], ["bad"]).tolist() == [1.0]
    assert len(judge_server.asked) == 4
    with judge.cache.open("a") as file:
        file.write('{"question": "cut o')  # as an interruption leaves it
    again = make_judge(judge_server, tmp_path)
    assert again.compare("is better", ["p"], ["good"], ["bad"]).tolist() == [1.0]
    assert len(judge_server.asked) == 4
    again.compare("is better", ["p"], ["good"], ["worse"])
    assert len(judge_server.asked) == 6
    assert len([json.loads(line) for line in judge.cache.read_text().splitlines()]) == 4


def test_win_rates_of_points(judge_server, tmp_path):
    def respond(word):
        return lambda prompts, weights, seed: [Response(word, [1]) for _ in prompts]

    def constant(completions, **kwargs):
        return [0.0] * len(completions)

    asked = [
        Policy("unguided", respond("bad"), weights=[{}]),
        Policy("ours", respond("good"), weights=WEIGHTS[:2]),
    ]
    functions = dict.fromkeys(OBJECTIVES, constant)
    points = sweep(asked, PROMPTS, WEIGHTS, functions, tmp_path / "points", seeds=1)
    judge_server.answer = prefers_good
    judge = make_judge(judge_server, tmp_path)
    (row,) = judge_points(judge, {"red": "is redder"}, points, PROMPTS)
    assert (row["method"], row["objective"], row["value"]) == ("ours", "red", 1.0)
    with pytest.raises(ValueError, match="no point: 'base'"):
        judge_points(judge, {}, points, PROMPTS, baseline="base")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("A", "A"),
        ("**B**", "B"),
        ("Answer A.", "A"),
        ("A or B", "tie"),
        ("tie", "tie"),
        ("", "tie"),
    ],
)
def test_verdicts(reply, expected):
    assert verdict(reply) == expected


def test_a_judge_needs_pairs(tmp_path):
    judge = PairwiseJudge("http://127.0.0.1:9/v1", "judge", tmp_path / "answers.jsonl")
    with pytest.raises(ValueError, match="got 2, 1 and 2"):
        judge.compare("is better", ["a", "b"], ["x"], ["y", "z"])
    with pytest.raises(ValueError, match="`concurrency` must be at least 1, got 0"):
        PairwiseJudge("http://127.0.0.1:9/v1", "judge", tmp_path / "a", concurrency=0)
