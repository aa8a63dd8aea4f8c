"""A wrong configuration is refused with its field, its value and what to do; all faults at once."""

import copy

import pytest
import yaml

pytest.importorskip("pydantic")
from trimtab.optimizers.tune.config import ConfigError, load

KNOB = {
    "name": "pool",
    "type": "int",
    "low": 1,
    "high": 64,
    "start": 8,
    "command": ["set", "{value}"],
}
GOOD = {"knobs": [KNOB], "cost": {"command": ["cost"]}, "settle": 1, "window": 2.5}
TARGET = {
    "kind": "Deployment",
    "namespace": "shop",
    "name": "web",
    "field": "cpu",
    "container": "web",
}


def written(tmp_path, content):
    path = tmp_path / "tune.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def changed(path, value):
    """The good configuration with one place changed; a value of None removes it."""
    content = copy.deepcopy(GOOD)
    place = content
    for key in path[:-1]:
        place = place[key] if isinstance(place, list) else place.setdefault(key, {})
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return content


def test_minimal_file_loads_with_paths_beside_it(tmp_path):
    config = load(written(tmp_path, GOOD))
    assert config.knobs[0].start == 8 and config.window == 2.5
    assert config.state == str(tmp_path / "tune.state.jsonl")


@pytest.mark.parametrize(
    "path, value, expected",
    [
        (["knob"], [], ["knob is []", "did you mean 'knobs'"]),
        (["knobs", 0, "hihg"], 3, ["knobs[0].hihg is 3", "did you mean 'high'"]),
        (["limits", "max_chnage"], 0.1, ["limits.max_chnage is 0.1", "did you mean 'max_change'"]),
        (["zzz"], 1, ["zzz is 1", "expected one of after, audit, cost"]),
        (["cost"], None, ["cost: missing"]),
        (["knobs", 0, "start"], None, ["knobs[0].start: missing"]),
        (["settle"], "1s", ["settle is '1s'", "a valid number"]),
        (["settle"], -1, ["settle is -1", "greater than or equal to 0"]),
        (["window"], True, ["window is True", "a valid number"]),
        (["evaluations"], 0, ["evaluations is 0", "greater than or equal to 1"]),
        (["knobs"], [], ["knobs is []", "at least 1 item"]),
        (["knobs"], [KNOB, KNOB], ["knobs has ['pool'] twice"]),
        (["knobs", 0, "name"], "a b", ["knobs[0].name is 'a b'", "pattern"]),
        (["knobs", 0, "type"], "flaot", ["knobs[0].type is 'flaot'", "'float', 'int'"]),
        (["knobs", 0, "start"], 65, ["(pool)", "start is 65", "whole number from 1 to 64"]),
        (["knobs", 0, "start"], 8.5, ["start is 8.5", "whole number"]),
        (["knobs", 0, "start"], True, ["start is True", "whole number"]),
        (["knobs", 0, "low"], 64, ["low is 64.0 and high is 64.0", "low below high"]),
        (["knobs", 0, "low"], float("-inf"), ["knobs[0].low is -inf", "finite"]),
        (["knobs", 0, "choices"], ["a", "b"], ["choices is ['a', 'b'] for type 'int'"]),
        (["knobs", 0, "command"], ["set"], ["command has no {value}"]),
        (["knobs", 0, "command"], "set {value}", ["knobs[0].command is 'set {value}'", "list"]),
        (["knobs", 0, "command"], None, ["has none of command, http, kubernetes"]),
        (["knobs", 0, "kubernetes"], TARGET, ["has ['command', 'kubernetes']", "exactly one"]),
        (
            ["knobs", 0],
            {**KNOB, "scale": "log", "low": 0},
            ["low is 0.0 with scale 'log'", "above 0"],
        ),
        (
            ["knobs", 0],
            {"name": "b", "type": "bool", "start": 1, "command": ["{value}"]},
            ["start is 1", "true or false"],
        ),
        (
            ["knobs", 0],
            {"name": "b", "type": "bool", "start": True, "low": 0, "command": ["{value}"]},
            ["low, high and scale are for numbers"],
        ),
        (
            ["knobs", 0],
            {"name": "c", "type": "choice", "start": "a", "choices": ["a"], "command": ["{value}"]},
            ["choices is ['a']", "two or more"],
        ),
        (
            ["knobs", 0],
            {
                "name": "c",
                "type": "choice",
                "start": "d",
                "choices": ["a", "b"],
                "command": ["{value}"],
            },
            ["start is 'd'", "one of ['a', 'b']"],
        ),
        (
            ["knobs", 0],
            {
                "name": "c",
                "type": "choice",
                "start": "a",
                "choices": [True, "b"],
                "command": ["{value}"],
            },
            ["choices[0] is True", "quote them"],
        ),
        (["cost"], {"promql": "up"}, ["promql is 'up' without a server", "add prometheus"]),
        (["cost"], {"command": ["x"], "value": "a"}, ["value is 'a' without http"]),
        (["cost"], {}, ["cost: has none of promql, command, http"]),
        (["cost", "comand"], ["x"], ["cost.comand", "did you mean 'command'"]),
        (["cost", "command"], [], ["cost.command is []", "at least 1 item"]),
        (["prometheus"], {"url": "localhost:9090"}, ["prometheus.url is 'localhost:9090'"]),
        (["after"], {}, ["after: has none of command, http"]),
        (["limits", "max_change"], 1.5, ["limits.max_change is 1.5", "less than or equal to 1"]),
        (["limits", "max_regression"], "10", ["limits.max_regression is '10'", "'10%'"]),
        (["limits", "max_regression"], "0%", ["limits.max_regression is '0%'"]),
        (["limits", "max_regression"], -1, ["limits.max_regression is -1"]),
        (["limits", "slo"], {"command": ["x"]}, ["limits.slo.bound: missing"]),
        (["limits", "slo"], {"command": ["x"], "bound": 1, "every": 0}, ["limits.slo.every is 0"]),
        (["metrics"], {"port": 70000}, ["metrics.port is 70000", "65535"]),
        (["audit"], "tune.state.jsonl", ["state and audit are both 'tune.state.jsonl'"]),
        (["optimizer"], {"num_measurements": 1}, ["optimizer.num_measurements is 1"]),
        (["optimizer"], {"learning_rate": 1}, ["optimizer.learning_rate is 1", "unknown key"]),
    ],
)
def test_fault_names_field_value_and_remedy(tmp_path, path, value, expected):
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, changed(path, value)))
    for text in expected:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"kind": "Pod"}, "knobs[0].kubernetes.kind is 'Pod'"),
        ({"container": None}, "container is None for field 'cpu'"),
        ({"field": "replicas"}, "container is 'web' for field 'replicas'"),
        ({"field": "env"}, "variable is None for field 'env'"),
        ({"variable": "X"}, "variable is 'X' for field 'cpu'"),
        ({"field": "env", "variable": "X", "resource": "limits"}, "resource is 'limits'"),
        ({"resource": "limit"}, "knobs[0].kubernetes.resource is 'limit'"),
    ],
)
def test_fault_of_a_kubernetes_knob(tmp_path, change, expected):
    target = {k: v for k, v in {**TARGET, **change}.items() if v is not None}
    knob = {"name": "cpu", "type": "float", "low": 0.1, "high": 4, "start": 1, "kubernetes": target}
    with pytest.raises(ConfigError, match=r".") as caught:
        load(written(tmp_path, {**GOOD, "knobs": [knob]}))
    assert expected in str(caught.value)


def test_kubernetes_knob_of_the_wrong_type_or_below_the_least(tmp_path):
    target = {"kind": "Deployment", "namespace": "shop", "name": "web", "field": "replicas"}
    knob = {"name": "n", "type": "float", "low": 1, "high": 4, "start": 1, "kubernetes": target}
    with pytest.raises(ConfigError, match="type is 'float' for field 'replicas'"):
        load(written(tmp_path, {**GOOD, "knobs": [knob]}))
    with pytest.raises(ConfigError, match="low is -1: replicas is at least 0"):
        load(written(tmp_path, {**GOOD, "knobs": [{**knob, "type": "int", "low": -1}]}))


def test_all_faults_are_told_at_once(tmp_path):
    content = changed(["settle"], "x")
    content["window"] = -1
    content["knobs"][0]["start"] = 0
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, content))
    assert [f"{tmp_path}/tune.yaml: " in line for line in str(caught.value).splitlines()] == [
        True
    ] * 3


@pytest.mark.parametrize(
    "content, expected",
    [
        ("knobs: [", "not YAML"),
        ("- 1", "holds [1]"),
        ("", "holds None"),
        ("settle: 1\nsettle: 2\n", "key 'settle' stands there twice"),
        ("settle: !!map 1\n", "expected a mapping node"),
    ],
)
def test_file_that_is_no_configuration(tmp_path, content, expected):
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, content))
    assert expected in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(tmp_path / "none.yaml")


def test_headers_come_from_the_environment(tmp_path, monkeypatch):
    server = {"url": "http://localhost:9090", "headers": {"Authorization": "Bearer ${TUNE_TOKEN}"}}
    content = {**GOOD, "prometheus": server, "cost": {"promql": "up"}}
    monkeypatch.delenv("TUNE_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="set that environment variable"):
        load(written(tmp_path, content))
    monkeypatch.setenv("TUNE_TOKEN", "secret")
    config = load(written(tmp_path, content))
    assert config.prometheus.headers == {"Authorization": "Bearer secret"}
    fingerprint = config.fingerprint
    monkeypatch.setenv("TUNE_TOKEN", "another")
    assert load(written(tmp_path, content)).fingerprint == fingerprint


def test_fingerprint_is_of_what_costs_depend_on(tmp_path):
    first = load(written(tmp_path, GOOD)).fingerprint
    same = [(["knobs", 0, "start"], 9), (["knobs", 0, "command"], ["other", "{value}"]),
            (["evaluations"], 500), (["settle"], 9)]  # fmt: skip
    others = [(["knobs", 0, "high"], 65), (["cost"], {"command": ["other"]}), (["seed"], 1),
              (["limits", "max_change"], 0.5), (["optimizer"], {"delta": 0.2})]  # fmt: skip
    for path, value in same:
        assert load(written(tmp_path, changed(path, value))).fingerprint == first
    for path, value in others:
        assert load(written(tmp_path, changed(path, value))).fingerprint != first
