"""What servers and requests may say: every form of it, and a clear refusal of the rest."""

import pytest

from trimtab.plugins.params import GuidanceConfig, GuidanceParams, request_params

OBJECTIVES = ("helpful", "harmless")
DEFAULTS = GuidanceParams(weights=(1.0, 0.0), beta=2.0, top_k=40)


def params(**extra_args):
    return request_params(extra_args, OBJECTIVES, DEFAULTS, max_top_k=128)


@pytest.mark.parametrize(
    "weights",
    [
        {"harmless": 0.5, "helpful": -1},
        '{"helpful": -1, "harmless": 0.5}',
        "helpful=-1,harmless=0.5",
        " harmless = 0.5 , helpful = -1 ",
        [-1, 0.5],
        ["-1", "0.5"],
        "[-1, 0.5]",
    ],
)
def test_every_form_of_weights_means_the_same(weights):
    assert params(mavis_weights=weights).weights == (-1.0, 0.5)


def test_a_request_that_says_nothing_gets_the_defaults():
    assert params() is DEFAULTS
    assert params(other_plugin="x") is DEFAULTS
    assert request_params(None, OBJECTIVES, DEFAULTS, 128) is DEFAULTS


def test_weights_replace_the_defaults_and_absent_objectives_are_zero():
    given = params(mavis_weights="harmless=2", mavis_beta="0.5", mavis_top_k=7.0)
    assert given == GuidanceParams(weights=(0.0, 2.0), beta=0.5, top_k=7)


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"mavis_weights": "salty=1"}, "mavis_weights: unknown objective 'salty'.*helpful"),
        ({"mavis_weights": "helpful=much"}, r"mavis_weights\['helpful'\] must be a number"),
        ({"mavis_weights": "helpful"}, "mavis_weights must be a JSON object"),
        ({"mavis_weights": "helpful=1,helpful=2"}, "mavis_weights names an objective twice"),
        ({"mavis_weights": '{"helpful": '}, "mavis_weights is not valid JSON"),
        ({"mavis_weights": '{"helpful": NaN}'}, r"mavis_weights\['helpful'\] must be finite"),
        ({"mavis_weights": [1]}, "mavis_weights has 1 numbers for 2 objectives"),
        ({"mavis_weights": [1, "inf"]}, r"mavis_weights\[1\] must be finite"),
        ({"mavis_weights": 3}, "mavis_weights must be a JSON object"),
        ({"mavis_weights": [1, True]}, r"mavis_weights\[1\] must be a number"),
        ({"mavis_beta": -1}, "mavis_beta must not be negative, got -1"),
        ({"mavis_beta": "nan"}, "mavis_beta must be finite"),
        ({"mavis_beta": "strong"}, "mavis_beta must be a number, got 'strong'"),
        ({"mavis_top_k": 0}, "mavis_top_k must be an integer from 1 to 128, got 0"),
        ({"mavis_top_k": 129}, "mavis_top_k must be an integer from 1 to 128"),
        ({"mavis_top_k": 2.5}, "mavis_top_k must be an integer from 1 to 128"),
        ({"mavis_kl_budget": 0}, "mavis_kl_budget must be positive"),
        ({"mavis_kl_budget": float("inf")}, "mavis_kl_budget must be finite"),
        ({"mavis_weight": "helpful=1"}, "unknown argument 'mavis_weight'; known: mavis_weights"),
    ],
)
def test_a_bad_argument_is_refused_by_name(extra_args, message):
    with pytest.raises(ValueError, match=message):
        params(**extra_args)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "--additional-config"),
        ({}, "value_models must be"),
        ({"value_models": []}, "value_models must be"),
        ({"value_models": ["m"], "betta": 1}, "unknown key 'betta'.*beta"),
        ({"value_models": ["m"], "dtype": "int8"}, "dtype must be one of"),
        ({"value_models": ["m"], "rerank": -1}, "rerank must be a number of candidates"),
        ({"value_models": ["m"], "rerank": 2.5}, "rerank must be a number of candidates"),
        ({"value_models": ["m"], "weights": [1]}, "weights must be an object"),
        ({"value_models": ["m"], "weights": {"salty": 1}}, "unknown objective 'salty'"),
        ({"value_models": ["m"], "beta": -2}, "beta must not be negative"),
        ({"value_models": ["m"], "top_k": 500}, "top_k 500 is above max_top_k 128"),
        ({"value_models": ["m"], "kv_cache_memory_gib": 0}, "kv_cache_memory_gib must be positive"),
    ],
)
def test_a_bad_server_config_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        GuidanceConfig.from_dict(config).default_params(OBJECTIVES, 40)


def test_value_models_are_a_list_or_named():
    assert GuidanceConfig.from_dict({"value_models": "m"}).value_models == ((None, "m"),)
    named = GuidanceConfig.from_dict({"value_models": {"kind": "m", "brief": "n"}})
    assert named.value_models == (("kind", "m"), ("brief", "n"))


def test_only_a_weight_and_a_strength_guide():
    assert DEFAULTS.guides
    assert not GuidanceParams(weights=(0.0, 0.0)).guides
    assert not GuidanceParams(weights=(1.0, 0.0), beta=0.0).guides
