import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.trainers.policies import OBJECTIVES, PROMPTS, WEIGHTS
from trimtab.trainers import PairwiseJudge, Policy, Response, judge_points, sweep
from trimtab.trainers.evaluation.judge import verdict


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
