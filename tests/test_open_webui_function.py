"""The Open WebUI Function, called as Open WebUI calls it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pydantic
import pytest

from trimtab.plugins.params import GuidanceParams, request_params

FILE = Path(__file__).parents[1] / "deploy" / "open_webui_function.py"
DEFAULTS = GuidanceParams((0.0, 0.0), beta=2.0)


@pytest.fixture
def function():
    """The filter of the file, which stands alone and is loaded from its text."""
    spec = importlib.util.spec_from_file_location("function", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Filter()


def asked(function, administrator, user, **body):
    """The body that reaches the server; `user` is None where nobody is known."""
    function.valves = function.Valves(**administrator)
    known = None if user is None else {"id": "1", "valves": function.UserValves(**user)}
    return function.inlet({"model": "m", "messages": [], **body}, __user__=known)


@pytest.mark.parametrize(
    ("administrator", "user", "weights", "beta"),
    [
        ({"mavis_weights": "calm=1"}, {}, (1.0, 0.0), 2.0),
        ({"mavis_weights": "calm=1", "mavis_beta": 4}, {"mavis_beta": 0.5}, (1.0, 0.0), 0.5),
        ({"mavis_weights": "calm=1"}, {"mavis_weights": '{"bold": -1}'}, (0.0, -1.0), 2.0),
        ({"mavis_weights": "calm=1"}, {"mavis_beta": 0}, (1.0, 0.0), 0.0),
        ({"mavis_weights": "bold=1"}, None, (0.0, 1.0), 2.0),
    ],
)
def test_a_users_valves_go_before_the_administrators(function, administrator, user, weights, beta):
    body = asked(function, administrator, user)
    params = request_params(body.pop("vllm_xargs"), ["calm", "bold"], DEFAULTS, 128)
    assert (params.weights, params.beta) == (weights, beta)
    assert body == {"model": "m", "messages": []}


def test_nothing_is_added_where_nothing_is_asked_for(function):
    assert asked(function, {}, {}) == {"model": "m", "messages": []}
    assert function.inlet({"model": "m"}) == {"model": "m"}


def test_what_the_body_has_already_stays(function):
    theirs = {"mavis_beta": 1.5, "other": 1}
    body = asked(function, {"mavis_beta": 4, "mavis_weights": "calm=1"}, {}, vllm_xargs=theirs)
    assert body["vllm_xargs"] == {**theirs, "mavis_weights": "calm=1"}


def test_a_negative_strength_is_refused_where_it_is_set(function):
    for valves in (function.Valves, function.UserValves):
        with pytest.raises(pydantic.ValidationError, match="mavis_beta"):
            valves(mavis_beta=-1)
