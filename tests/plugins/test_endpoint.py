"""Requests that ask for guidance where vLLM does not hear it, and what a server says of itself."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from trimtab.plugins.endpoint import MAVISEndpoint
from trimtab.plugins.vllm import _serving

CHAT = "/v1/chat/completions"


def client(config):
    """A server that answers with the body that it was sent."""
    app = FastAPI()

    @app.post(CHAT)
    async def echo(request: Request):
        return json.loads(await request.body())

    endpoint = MAVISEndpoint()
    endpoint.attach_router(app)
    if config is not None:
        endpoint.serving = _serving(json.dumps(config))
        model_config = SimpleNamespace(logprobs_mode="raw_logprobs")
        endpoint.vllm_config = SimpleNamespace(model_config=model_config)
    return TestClient(app)


@pytest.fixture(scope="module")
def config(value_model):
    return {"value_models": [str(value_model)], "beta": 2.0, "max_top_k": 64}


@pytest.fixture(scope="module")
def names(config):
    return _serving(json.dumps(config)).objectives


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"mavis_weights": "a=1"}, "'mavis_weights' is ignored at the top level"),
        ({"mavis-beta": 2}, "'mavis-beta' is ignored at the top level"),
        ({"extra_body": {"mavis_weights": "a=1"}}, "'mavis_weights' is ignored in 'extra_body'"),
        (
            {"extra_body": {"vllm_xargs": {"mavis_weights": "a=1"}}},
            "'mavis_weights' is ignored in 'extra_body'",
        ),
        ({"extra_args": {"mavis_beta": 1}}, "'mavis_beta' is ignored in 'extra_args'"),
        ({"weights": {"NAME": 1}}, "'weights' is ignored, it is called 'mavis_weights'"),
        ({"vllm_xargs": {"weights": "NAME=1"}}, "'weights' is ignored, it is called"),
        ({"vllm_xargs": {"weights": '{"NAME": 1}'}}, "'weights' is ignored, it is called"),
    ],
)
def test_guidance_asked_for_in_the_wrong_place_is_refused(config, names, body, message):
    body = json.loads(json.dumps(body).replace("NAME", names[0]))
    answer = client(config).post(CHAT, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)
    assert '"vllm_xargs"' in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "mavis_weights and weights: NAME=1"}]},
        {"weights": "mine", "extra_body": {"weights": [1, 2]}},  # another's
        {"vllm_xargs": {"weights": {"theirs": 1}}},
        {"metadata": {"mavis_weights": "a=1"}},
    ],
)
def test_other_requests_reach_the_server_whole(config, names, body):
    body = json.loads(json.dumps(body).replace("NAME", names[0]))
    answer = client(config).post(CHAT, json=body)
    assert (answer.status_code, answer.json()) == (200, body)
    assert "x-mavis" not in answer.headers
    assert client(None).post(CHAT, json={"mavis_beta": 1}).status_code == 200  # not ours to refuse


def test_what_is_not_json_is_left_to_the_server(config):
    app = client(config)
    with pytest.raises(json.JSONDecodeError):
        app.post(CHAT, content=b'{"mavis_weights"')
    with pytest.raises(RecursionError):
        app.post(CHAT, content=b'{"mavis_weights":' + b"[" * 100_000)


def test_an_answer_says_what_it_was_guided_by(config, names):
    def told(default, xargs):
        answer = client({**config, **default}).post(CHAT, json={"vllm_xargs": xargs})
        return json.loads(answer.headers.get("x-mavis", "null"))

    weights = {"mavis_weights": f"{names[0]}=0.5"}
    assert told({}, {**weights, "mavis_beta": "3", "mavis_kl_budget": 0.1}) == {
        "weights": {names[0]: 0.5}, "beta": 3.0, "top_k": 40, "kl_budget": 0.1,
    }  # fmt: skip
    by_default = {"weights": {names[0]: 1.0}, "top_k": 7}
    assert told(by_default, {}) == {**by_default, "beta": 2.0}
    assert told(by_default, {"mavis_beta": 0}) is None
    assert told({}, {}) is None
    assert told({}, {**weights, "mavis_beta": "none"}) is None  # which the processor refuses


def test_the_objectives_are_listed(config, names):
    found = client(config).get("/v1/mavis/objectives").json()
    assert [each["name"] for each in found["objectives"]] == list(names)
    assert found["objectives"][0]["value_model"] == config["value_models"][0]
    assert found["defaults"]["beta"] == 2.0 and found["max_top_k"] == 64
    assert {"trimtab", "vllm"} <= found["versions"].keys()
    assert found["logprobs_mode"] == "raw_logprobs"
    none = client(None).get("/v1/mavis/objectives")
    assert none.status_code == 404 and "has no guidance" in none.json()["error"]["message"]
