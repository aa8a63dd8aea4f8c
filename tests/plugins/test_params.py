"""What servers and requests may say: every form of it, and a clear refusal of the rest."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.plugins.params import (
    ARGUMENTS,
    GuidanceConfig,
    GuidanceParams,
    check_objective_name,
    parse_weights,
    read_request,
    request_params,
)

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


NESTED = json.loads("[" * 500 + "]" * 500)


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"mavis_weights": "salty=1"}, "mavis_weights: unknown objective 'salty'.*helpful"),
        ({"mavis_weights": {1: 2, "a": 3}}, "mavis_weights: unknown objective 1"),
        ({"mavis_weights": "helpful=much"}, r"mavis_weights\['helpful'\] must be a number"),
        ({"mavis_weights": "helpful"}, "mavis_weights must be a JSON object"),
        ({"mavis_weights": "=1"}, "mavis_weights must be a JSON object"),
        ({"mavis_weights": ""}, "mavis_weights must be a JSON object"),
        ({"mavis_weights": "helpful=1,helpful=2"}, "mavis_weights cannot be read .*named twice"),
        ({"mavis_weights": '{"helpful": 1, "helpful": 2}'}, "mavis_weights .*named twice"),
        ({"mavis_weights": '{"helpful": '}, "mavis_weights cannot be read .*got '{\"helpful\": '"),
        ({"mavis_weights": "[" * 100_000}, "mavis_weights cannot be read .*recursion"),
        ({"mavis_weights": "[1" + "0" * 5000 + ", 1]"}, "mavis_weights cannot be read"),
        ({"mavis_weights": '{"helpful": NaN}'}, r"mavis_weights\['helpful'\] must be a number"),
        ({"mavis_weights": '{"helpful": 1e39}'}, r"mavis_weights\['helpful'\] .*-1e\+06 to 1e\+06"),
        ({"mavis_weights": [1]}, "mavis_weights has 1 numbers for 2 objectives"),
        ({"mavis_weights": [1, "inf"]}, r"mavis_weights\[1\] must be a number"),
        ({"mavis_weights": [1, 10**400]}, r"mavis_weights\[1\] must be a number"),
        ({"mavis_weights": [1, 10**5000]}, r"mavis_weights\[1\] .*cannot be shown"),
        ({"mavis_weights": [1, NESTED]}, r"mavis_weights\[1\] must be a number"),
        ({"mavis_weights": 3}, "mavis_weights must be a JSON object"),
        ({"mavis_weights": None}, "mavis_weights must be a JSON object"),
        ({"mavis_weights": b"helpful=1"}, "mavis_weights must be a JSON object"),
        ({"mavis_weights": [1, True]}, r"mavis_weights\[1\] must be a number"),
        ({"mavis_beta": -1}, r"mavis_beta must be a number from 0 to 1e\+06, got -1"),
        ({"mavis_beta": 1e300}, r"mavis_beta must be a number from 0 to 1e\+06, got 1e\+300"),
        ({"mavis_beta": 10**400}, "mavis_beta must be a number"),
        ({"mavis_beta": "nan"}, "mavis_beta must be a number"),
        ({"mavis_beta": "strong"}, "mavis_beta must be a number from .*, got 'strong'"),
        ({"mavis_beta": True}, "mavis_beta must be a number"),
        ({"mavis_beta": [1]}, "mavis_beta must be a number"),
        ({"mavis_beta": 1e6}, r"mavis_beta times the sum of \|weights\| must be at most 1e\+06"),
        ({"mavis_weights": [1e6, 0]}, r"mavis_beta times the sum .* got 2e\+06"),
        ({"mavis_top_k": 0}, "mavis_top_k must be an integer from 1 to 128, got 0"),
        ({"mavis_top_k": 129}, "mavis_top_k must be an integer from 1 to 128"),
        ({"mavis_top_k": 2.5}, "mavis_top_k must be an integer from 1 to 128"),
        ({"mavis_top_k": math.nan}, "mavis_top_k must be an integer from 1 to 128"),
        ({"mavis_kl_budget": 0}, "mavis_kl_budget must be a number from 1e-06 .*nats"),
        ({"mavis_kl_budget": 1e-50}, "mavis_kl_budget must be a number"),
        ({"mavis_kl_budget": math.inf}, "mavis_kl_budget must be a number"),
        ({"mavis_value_of": -1}, "mavis_value_of must be an integer from 0"),
        ({"mavis_value_of": "last"}, "mavis_value_of must be an integer from 0 .*, got 'last'"),
        ({"mavis_value_of": 3, "mavis_weights": "helpful=0"}, "mavis_value_of needs weights"),
    ],
)
def test_a_bad_argument_is_refused_by_name(extra_args, message):
    extra_args = {"mavis_weights": [2.0, 0.0], **extra_args}
    with pytest.raises(ValueError, match=message):
        params(**extra_args)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("mavis_weight", "mavis_weights"),
        ("mavis-beta", "mavis_beta"),
        ("MAVIS_beta", "mavis_beta"),
        ("mavisbeta", "mavis_beta"),
        ("mavisBeta", "mavis_beta"),
        (" mavis_beta", "mavis_beta"),
        ("mavis.kl.budget", "mavis_kl_budget"),
        ("mavis_topk", "mavis_top_k"),
        ("mavis", "known: mavis_weights, mavis_beta"),
        ("mavis_" + "x" * 100_000, "known: mavis_weights, mavis_beta"),
    ],
)
def test_what_is_spelt_like_an_argument_is_refused_with_the_right_name(key, meant):
    with pytest.raises(ValueError, match=f"unknown argument .*{meant}"):
        params(**{key: 1})


@pytest.mark.parametrize(
    "key", ["beta", "mavistique_beta", "temperature", 3, None, ("mavis_beta",)]
)
def test_arguments_of_others_are_not_ours(key):
    assert request_params({key: "x"}, OBJECTIVES, DEFAULTS, 128) is DEFAULTS


def test_arguments_are_an_object():
    with pytest.raises(ValueError, match="extra_args must be an object"):
        request_params(["mavis_beta"], OBJECTIVES, DEFAULTS, 128)


def test_what_needs_no_server_is_checked_without_one():
    assert read_request({"mavis_weights": "any=2", "mavis_top_k": 5000}) == {
        "weights": {"any": 2.0},
        "top_k": 5000,
    }
    for wrong in ({"mavis_beta": "x"}, {"mavis_weights": "any=x"}, {"mavis-beta": 1}):
        with pytest.raises(ValueError, match=r"mavis.beta|mavis_weights"):
            read_request(wrong)


@pytest.mark.parametrize(
    "extra_args",
    [
        {"mavis_beta": "9" * 100_000},
        {"mavis_weights": "x" * 100_000},
        {"mavis_weights": {"x" * 100_000: 1}},
        {"mavis_weights": ["x" * 100_000, 1]},
        {"mavis_top_k": [1] * 100_000},
        {"mavis_" + "x" * 100_000: 1},
    ],
)
def test_a_refused_value_is_quoted_short(extra_args):
    with pytest.raises(ValueError) as caught:
        params(**extra_args)
    assert len(str(caught.value)) < 400


def test_parameters_are_plain_numbers_whatever_they_were_given_as():
    given = GuidanceParams((np.float32(1), 2), beta=np.int64(3), top_k=np.int64(5))
    assert given == GuidanceParams((1.0, 2.0), beta=3.0, top_k=5)
    assert {type(x) for x in (*given.weights, given.beta)} == {float} and type(given.top_k) is int
    with pytest.raises(ValueError, match="beta must be a number"):
        GuidanceParams((1.0,), beta="4")


JUNK = [
    "4", "", "x" * 1000, True, None, [], [1], {}, {"a": 1}, -1, math.nan, math.inf, 1e39, 1e300,
    10**400, 10**5000, NESTED,
]  # fmt: skip
CONFIGS = [
    ({"beta": -2}, "beta"),
    ({"weights": {"helpful": 1e6}, "beta": 2}, "beta times the sum"),
    ({"weights": {"salty": 1}}, "weights: unknown objective 'salty'"),
    ({"top_k": 500}, "top_k 500 is above max_top_k 128"),
    ({"top_k": 0}, "top_k"),
    ({"top_k": 2.5}, "top_k"),
    ({"max_top_k": 0}, "max_top_k"),
    ({"max_top_k": 2.5}, "max_top_k"),
    ({"kl_budget": 0}, "kl_budget must be .*leave it out for no limit"),
    ({"prune_eps": 1.5}, "prune_eps"),
    ({"prune_eps": "0.1"}, "prune_eps"),
    ({"kv_cache_memory_gib": 0}, "kv_cache_memory_gib"),
    ({"dtype": "int8"}, "dtype must be one of"),
    ({"betta": 1}, "unknown key 'betta'.*beta"),
    ({"rerank": 8}, "unknown key 'rerank'"),
    ({"x" * 100_000: 1}, "unknown key 'xxx"),
    *[
        ({name: junk}, name)
        for name, also in (
            ("beta", ()),
            ("kl_budget", (None,)),
            ("prune_eps", ()),
            ("kv_cache_memory_gib", ()),
            ("top_k", (None,)),
            ("max_top_k", ()),
            ("dtype", (None,)),
            ("weights", ({},)),
        )
        for junk in JUNK
        if junk not in also
    ],
    *[({"weights": {"helpful": junk}}, r"weights\['helpful'\]") for junk in JUNK if junk != -1],
    *[
        ({"value_models": junk}, "value_models")
        for junk in (None, "", [], {}, 3, True, [1], [""], [None], {"a": 1}, {"a": ""}, [["m"]])
    ],
    *[
        ({"value_models": {name: "m"}}, "value_models has the objective")
        for name in ("", " ", "a=b", "a,b", "a/b", "a b", "..", "{a", "a\n", "a" * 101, "\ud800", 1)
    ],
]


@pytest.mark.parametrize(("config", "message"), CONFIGS)
def test_a_bad_server_config_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message) as caught:
        config = GuidanceConfig.from_dict({"value_models": ["m"], **config})
        config.default_params(OBJECTIVES, 40)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("config", [None, [], "x", 3])
def test_a_server_without_config_is_told_how_to_give_one(config):
    with pytest.raises(ValueError, match="--additional-config"):
        GuidanceConfig.from_dict(config)
    with pytest.raises(ValueError, match="value_models must be"):
        GuidanceConfig.from_dict({})


NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([1e6, 1e38, 1e39, -1e300, 5e-324, 10**400, 2**64, "1e400", "-0", "٣"]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), NUMBERS.map(str))
NAMES = st.one_of(st.sampled_from(OBJECTIVES), st.text(max_size=4))
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(NAMES, inner, max_size=3),
        st.dictionaries(NAMES, inner, max_size=3).map(lambda x: json.dumps(x)),
        st.lists(st.tuples(NAMES, inner), max_size=3).map(
            lambda pairs: ",".join(f"{name}={value}" for name, value in pairs)
        ),
    ),
    max_leaves=6,
)


def assert_finite(found: GuidanceParams) -> None:
    """Also what they are multiplied to, in the precision that they are used in."""
    with np.errstate(all="raise", under="ignore"):
        weights, beta = np.array(found.weights, dtype=np.float32), np.float32(found.beta)
        assert np.isfinite(beta * np.abs(weights).sum() * np.float32(1e30))
        assert beta >= 0 and found.top_k == int(np.float32(found.top_k)) >= 1
        if found.kl_budget is not None:
            assert 0 < np.float32(found.kl_budget) < np.inf


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.one_of(
            st.sampled_from([f"mavis_{name}" for name in ARGUMENTS]),
            st.text(max_size=12),
            st.integers(),
        ),
        JSON,
        max_size=3,
    )
)
def test_any_request_is_finite_or_refused(extra_args):
    try:
        found = request_params(extra_args, OBJECTIVES, DEFAULTS, 128)
    except ValueError:
        return
    assert_finite(found)
    assert found.top_k <= 128


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(list(GuidanceConfig.__dataclass_fields__)[1:]), JSON, max_size=3
    ),
    st.one_of(st.just(["m"]), JSON),
)
def test_any_server_config_is_finite_or_refused(config, value_models):
    try:
        config = GuidanceConfig.from_dict({**config, "value_models": value_models})
        found = config.default_params(OBJECTIVES, 40)
    except ValueError:
        return
    assert_finite(found)
    assert 0 <= config.prune_eps <= 1 and int(config.kv_cache_memory_gib * 2**30) > 0


@given(st.text(max_size=6), st.floats(-1e6, 1e6))
@settings(deadline=None)
def test_an_objective_that_is_accepted_can_be_addressed(name, weight):
    try:
        check_objective_name("it", name)
    except ValueError:
        return
    assert parse_weights(f"{name}={weight}", [name]) == (weight,)
    assert parse_weights(json.dumps({name: weight}), [name]) == (weight,)


def test_value_models_are_a_list_or_named():
    assert GuidanceConfig.from_dict({"value_models": "m"}).value_models == ((None, "m"),)
    named = GuidanceConfig.from_dict({"value_models": {"kind": "m", "brief": "n"}})
    assert named.value_models == (("kind", "m"), ("brief", "n"))


def test_only_a_weight_and_a_strength_guide():
    assert DEFAULTS.guides
    assert not GuidanceParams(weights=(0.0, 0.0)).guides
    assert not GuidanceParams(weights=(1.0, 0.0), beta=0.0).guides
