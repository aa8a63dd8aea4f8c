"""Responses that are there already: from a file to a steered response."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from trimtab.plugins.value_model import MAVISValueModel
from trimtab.trainers import MAVISTrainer, read_rollouts, write_rollouts
from trimtab.trainers.head_training import (
    centred_advantages,
    efficiency_sums,
    fit_values,
    head_loss,
    lambda_returns,
    pairs_loss,
)
from trimtab.trainers.hidden_states import collate_rows, tree_rows
from trimtab.trainers.packing import DataCollatorForTrees, TreeDataset
from trimtab.trainers.preferences import UTILITY_STD, pair_loss
from trimtab.trainers.rewards import reward_statistics
from trimtab.trainers.samplers import prompt_log_probs
from trimtab.trainers.trees import MARGIN, Node, Tree

from .conftest import END, ROOT, VOCABULARY, WORDS, guided_texts, make_tokenizer
from .test_head_training import FIELDS, goodness
from .test_mavis_trainer import config, prompts, redness

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} "
    "{% else %}<assistant> {{ m['content'] }} <end> <end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def response(rng):
    """Not the base model's: every word is as likely as any other."""
    return "".join(f" {word}" for word in rng.choice(WORDS, size=rng.integers(2, 12)))


def scored(count, offset=0, seed=0, each=6):
    """Rows with a prompt, a response, how good it is and, of two in three, how bad."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt in prompts(count, offset)["prompt"]:
        for _ in range(each):
            completion = response(rng)
            good = goodness([completion])[0]
            bad = None if len(rows) % 3 == 0 else -good
            rows.append({"prompt": prompt, "completion": completion, "good": good, "bad": bad})
    return rows


def from_file(folder, rows):
    """As a user has it."""
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Dataset.from_json(str(path), cache_dir=str(folder / "cache"))


def trainer(base_model, folder, data, eval_dataset=None, processing_class=None, **fields):
    return MAVISTrainer(
        base_model,
        config(folder, **fields),
        train_dataset=data,
        eval_dataset=eval_dataset,
        processing_class=processing_class,
    )


def mean_goodness(base_model, folder, tokenizer, weights):
    """Of responses that a value model guides."""
    return np.mean(goodness(guided_texts(base_model, folder, tokenizer, weights)))


def mean_goodness_in_vllm(base_model, folder):
    """Of responses that vLLM samples without guidance, towards "good" and away from it."""
    program = f"""
        import json
        import numpy as np
        from vllm import LLM, SamplingParams
        from tests.trainers.conftest import make_tokenizer
        from tests.trainers.test_head_training import goodness
        llm = LLM(
            {str(base_model)!r}, dtype="float32", enforce_eager=True, max_model_len=64, seed=0,
            logits_processors=["trimtab.plugins.vllm:MAVISLogitsProcessor"],
            additional_config={{"mavis": {{"value_models": [{str(folder)!r}], "beta": 4}}}},
        )
        prompt = {{"prompt_token_ids": make_tokenizer()("a b").input_ids}}
        found = []
        for weight in (0, 1, -1):
            asked = {{"mavis_weights": {{"good": weight}}}} if weight else {{}}
            params = SamplingParams(max_tokens=12, top_k=18, extra_args=asked)
            outputs = llm.generate([prompt] * 200, params, use_tqdm=False)
            found.append(np.mean(goodness([output.outputs[0].text for output in outputs])))
        print("means", json.dumps(found))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.split("means ")[1])


@pytest.fixture
def warnings():
    """What is warned of, by whatever logger."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    loggers = [
        transformers_logging.get_logger(f"trimtab.trainers.{name}")
        for name in ("collection", "data", "sources")
    ]
    for logger in loggers:
        logger.addHandler(handler)
    yield found
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.mark.parametrize("head_type", ["hidden", "state"])
def test_scores_in_a_file_train_values_that_guide(base_model, tokenizer, tmp_path, head_type):
    fields = {"hidden": FIELDS, "state": {"num_train_epochs": 8, "top_k": 18}}[head_type]
    held_out = Dataset.from_list(scored(20, 5, seed=1))
    fields = {**fields, "head_type": head_type}
    made = trainer(base_model, tmp_path, from_file(tmp_path, scored(60)), held_out, **fields)
    made.train()
    made.save_model()
    assert made.objectives == ["good", "bad"]
    plain = mean_goodness(base_model, tmp_path, tokenizer, {})
    assert mean_goodness(base_model, tmp_path, tokenizer, {"good": 1.0}) > plain + 0.3
    assert mean_goodness(base_model, tmp_path, tokenizer, {"bad": 1.0}) < plain - 0.3
    if head_type == "hidden" and importlib.util.find_spec("vllm"):
        unguided, towards, away = mean_goodness_in_vllm(base_model, tmp_path)
        assert towards > unguided + 0.3 and away < unguided - 0.3
    saved = MAVISValueModel.load(str(tmp_path)).config
    assert saved.provenance["rollouts"]["source"] == "data"
    assert saved.provenance["rollouts"]["responses"] == 360
    card = (tmp_path / "README.md").read_text()
    assert "mean score in the data" in card
    assert ("which it is for the base model's own responses alone" in card) is (
        head_type == "hidden"
    )


def test_labels_of_unpaired_preferences_are_an_objective(base_model, tokenizer, tmp_path):
    """Truth values, as TRL has them."""
    rows = [
        {"prompt": row["prompt"], "completion": row["completion"], "label": row["good"] > 0}
        for row in scored(60)
    ]
    made = trainer(base_model, tmp_path, from_file(tmp_path, rows), **{**FIELDS, "layers": 1})
    made.train()
    made.save_model()
    assert made.objectives == ["label"]
    share = np.mean([row["label"] for row in rows])
    assert made.value_config.reward_mean == pytest.approx([share])
    plain = mean_goodness(base_model, tmp_path, tokenizer, {})
    assert mean_goodness(base_model, tmp_path, tokenizer, {"label": 1.0}) > plain + 0.3


def test_responses_to_a_prompt_are_a_tree_of_depth_one(base_model, tokenizer, tmp_path, warnings):
    rows = [
        {"prompt": "a b", "completion": " good red", "x": 1.0, "y": None, "note": "n"},
        {"prompt": "c d", "completion": " bad", "x": None, "y": 1.0, "note": "n"},
        {"prompt": "a b", "completion": " red <end>", "x": 3.0, "note": "n"},
        {"prompt": "c d", "completion": " a b c d e f", "x": 5.0, "note": "n"},
    ]
    made = trainer(
        base_model, tmp_path, Dataset.from_list(rows), max_completion_length=4, leaf_fraction=0.0
    )
    assert "['note'] hold no numbers" in warnings[0]
    assert "1 of the 4 responses of `train_dataset` are longer than" in warnings[1]
    made.collect_rollouts()
    assert any("need not be the base model's" in message for message in warnings)
    first, second = read_rollouts(tmp_path / "rollouts" / "train")
    assert [tree.prompt_index for tree in (first, second)] == [0, 1]
    ids = lambda text: tokenizer(text).input_ids  # noqa: E731
    assert [node.tokens for node in first.nodes] == [ids("a b"), ids("good red <end>"),
                                                     ids("red <end>")]  # fmt: skip
    assert second.nodes[2].tokens == ids("a b c d")  # cut: without an end
    assert all(node.leaf and node.parent == 0 for node in (*first.nodes[1:], *second.nodes[1:]))
    np.testing.assert_array_equal(first.rewards["x"], [np.nan, 1, 3])
    np.testing.assert_array_equal(second.rewards["x"], [np.nan, np.nan, 5])
    assert made.value_config.reward_mean == [3.5, 1.0]  # of the prompts' means, 2 and 5
    assert made.value_config.reward_std == pytest.approx([2**0.5, 1.0])  # of 1 and 3
    labels = [sequence["labels"] for sequence in made.train_dataset.sequences]
    assert sum((~np.isnan(label)).sum() for label in labels) == 1 + 3 + 2 + 1 + 4 + 1 + 2


def test_conversations_end_where_the_model_would_end_them(base_model, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    row = {
        "prompt": [{"role": "user", "content": "a b"}],
        "completion": [{"role": "assistant", "content": "good"}],
        "x": 1.0,
    }
    made = trainer(base_model, tmp_path, Dataset.from_list([row]), processing_class=tokenizer)
    (tree,) = made._sources.responses["train"].trees
    texts = [tokenizer.decode(node.tokens) for node in tree.nodes]
    assert texts == ["<user> a b <assistant>", "good <end>"]


def test_single_responses_have_the_deviation_of_all(base_model, tmp_path):
    rows = [row for row in scored(8, each=1) if row["good"] is not None]
    made = trainer(base_model, tmp_path, Dataset.from_list(rows).select_columns(
        ["prompt", "completion", "good"]), **FIELDS)  # fmt: skip
    made.collect_rollouts()
    expected = np.std([row["good"] for row in rows])
    assert made.value_config.reward_std == pytest.approx([expected])
    assert made.value_config.provenance["reward_std"] == "of all responses"


ROW = {"prompt": "a b", "completion": " good", "x": 1.0}
TURN = {"role": "assistant", "content": "good"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, {**ROW, "completion": "good"}], "row 1 of `train_dataset`, 'completion': the tokens "
         "of the prompt are not those .* Move the space between them to the beginning of the"),
        ([{**ROW, "completion": " <end> good"}], "row 0 of .*'good' follows the end-of-sequence"),
        ([{**ROW, "x": float("inf")}], "row 0 of `train_dataset` has an infinite 'x'"),
        ([{**ROW, "y": float("nan")}], "has no score in its column 'y'"),
        ([{**ROW, "x": "1"}], "no column of numbers to learn from"),
        ([{**ROW, "prompt": [TURN]}], "must both be strings or both lists of messages"),
        ([{**ROW, "prompt": [TURN], "completion": [TURN, TURN]}], "the response has 2 messages"),
        ([ROW, {**ROW, "completion": None}], "row 1 of .* must both be strings or both lists"),
        ([ROW, {**ROW, "prompt": None}], "row 1 of `train_dataset` has no prompt, but None"),
        ([{**ROW, "prompt": ""}], "row 0 of `train_dataset` has a prompt of 0 tokens"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_learnt_from_are_named(base_model, tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        trainer(base_model, tmp_path, Dataset.from_list(rows))


def test_what_data_cannot_do_is_refused(base_model, tmp_path):
    data = Dataset.from_list(scored(4))
    with pytest.raises(ValueError, match="num_iterations=2 needs `reward_funcs`"):
        trainer(base_model, tmp_path, data, num_iterations=2, top_k=7)
    with pytest.raises(ValueError, match="`eval_dataset` has no column 'bad'"):
        trainer(base_model, tmp_path, data, data.remove_columns("bad"))
    with pytest.raises(
        ValueError, match="'y' is known of responses to 0 prompts to learn from and to 1"
    ):
        rows = [{**row, "y": 1.0 if i == 0 else None} for i, row in enumerate(scored(10))]
        trainer(base_model, tmp_path, Dataset.from_list(rows), **FIELDS).collect_rollouts()


def test_sampled_rollouts_are_not_replaced_by_data(base_model, tmp_path):
    made = MAVISTrainer(base_model, config(tmp_path), {"goodness": goodness}, prompts(2))
    made.collect_rollouts()
    with pytest.raises(ValueError, match=r"holds rollouts that were sampled.*`rollout_dir`"):
        trainer(base_model, tmp_path, Dataset.from_list(scored(4))).collect_rollouts()
    trainer(base_model, tmp_path / "data", Dataset.from_list(scored(4))).collect_rollouts()
    with pytest.raises(ValueError, match="were made with other settings"):
        MAVISTrainer(
            base_model, config(tmp_path / "data"), {"goodness": goodness}, prompts(4)
        ).collect_rollouts()


def edited(rows):
    return [{**row, "good": row["good"] + (i == 7)} for i, row in enumerate(rows)]


def with_more(rows):
    return [*rows, {**rows[0], "completion": " red red"}]


def with_fewer(rows):
    return rows[:-12]


@pytest.mark.parametrize("change", [edited, with_more, with_fewer])
def test_changed_data_is_trained_on_anew(base_model, tmp_path, change):
    """As in an empty folder; hidden states of responses that are the same are read once."""
    fields = {**FIELDS, "num_train_epochs": 1, "rollout_batch_size": 2}
    rows = scored(12)
    trainer(base_model, tmp_path / "run", Dataset.from_list(rows), **fields).train()
    folder = tmp_path / "run" / "rollouts" / "train"
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("trees-*.hidden.*")}
    assert len(before) == 6
    again = trainer(base_model, tmp_path / "run", Dataset.from_list(change(rows)), **fields)
    again.train()
    alone = trainer(base_model, tmp_path / "alone", Dataset.from_list(change(rows)), **fields)
    alone.train()
    assert again.value_config.reward_mean == alone.value_config.reward_mean
    torch.testing.assert_close(again.model.state_dict(), alone.model.state_dict(), rtol=0, atol=0)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("trees-*.hidden.*")}
    read = {edited: set(), with_more: {"trees-00000.hidden.safetensors"}, with_fewer: set()}
    assert {name for name in after if after[name] != before[name]} == read[change]
    assert len(after) == 6 - (change is with_fewer)
    with pytest.raises(ValueError, match=r"cannot be resumed: .*rollouts/"):
        trainer(base_model, tmp_path / "run", Dataset.from_list(rows), **fields).train(
            resume_from_checkpoint=True
        )


def random_trees(count=10, unknown=0.4, seed=0):
    """Flat trees, of two objectives of which the second is not always known."""
    rng = np.random.default_rng(seed)
    trees = []
    for i in range(count):
        nodes = [Node(-1, 0, [4, 5])]
        for _ in range(5):
            nodes.append(Node(0, 1, rng.integers(4, 18, rng.integers(1, 7)).tolist(), leaf=True))
        rewards = {name: np.r_[np.nan, rng.normal(size=5)] for name in ("one", "two")}
        rewards["two"][1:][rng.random(5) < unknown] = np.nan
        rewards["two"][1] = rng.normal()
        trees.append(Tree(i, nodes, rewards))
    return trees


def known_part(tree, name):
    """The tree without the responses of which an objective is not known."""
    kept = [0, *(i for i in tree.leaves() if not np.isnan(tree.rewards[name][i]))]
    rewards = {n: values[kept] for n, values in tree.rewards.items()}
    return Tree(tree.prompt_index, [tree.nodes[i] for i in kept], rewards)


def items_of(trees, names, seed=0):
    """With hidden states, candidates and log-probabilities that depend on the row's token alone."""
    torch.manual_seed(seed)
    hidden = torch.randn(32, 6)
    candidates = torch.stack([torch.randperm(18)[:7] for _ in range(32)])
    log_probs = torch.randn(32, 7).log_softmax(-1)
    items = []
    for tree in trees:
        values = np.stack([tree.values(name) for name in names], axis=-1)
        known = np.stack([tree.known(name) for name in names], axis=-1)
        rows = tree_rows(tree, values, known)
        t = rows["tokens"]
        read = {"hidden": hidden[t], "candidates": candidates[t], "log_probs": log_probs[t]}
        items.append({**rows, **read, "tree": tree.prompt_index})
    return items


def test_unknown_scores_count_as_if_their_responses_were_not_there():
    trees = random_trees()
    parts = [known_part(tree, "two") for tree in trees]
    assert sum(len(tree.nodes) for tree in parts) < sum(len(tree.nodes) for tree in trees)
    for tree, part in zip(trees, parts):
        assert tree.values("two")[0] == pytest.approx(part.values("two")[0])
    np.testing.assert_allclose(
        np.ravel(reward_statistics(trees, ["one", "two"]))[1::2],
        np.ravel(reward_statistics(parts, ["two"])),
    )
    whole, alone = items_of(trees, ["one", "two"]), items_of(parts, ["two"])
    read = lambda item: item["hidden"]  # noqa: E731
    weights, values = fit_values(whole, read)
    # Of a tree whose responses are fewer each counts for more: here as in the whole one.
    for item, part in zip(alone, parts):
        item["reach"] *= len(part.leaves()) / 5
    expected, of_alone = fit_values(alone, read)
    torch.testing.assert_close(weights[:, [1]], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(values[0][0, 1], of_alone[0][0, 0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("on_policy", [True, False])
def test_measures_are_those_of_the_known_responses(on_policy):
    trees = random_trees()
    parts = [known_part(tree, "two") for tree in trees]
    whole, alone = items_of(trees, ["one", "two"]), items_of(parts, ["two"])
    table = torch.randn(32, 7, 2)  # of the row's token
    for item in (*whole, *alone):
        item["baseline"] = torch.zeros(item["labels"].shape)
    sums = []
    for items, i in ((whole, slice(0, 2)), (alone, slice(1, 2))):
        batch = collate_rows(items)
        values, advantages = batch["labels"].nan_to_num() * 0, table[batch["tokens"]][..., i]
        sums.append(efficiency_sums(batch, values, advantages, on_policy=on_policy).numpy())
    np.testing.assert_allclose(sums[0][..., [1]], sums[1], rtol=1e-6)


def test_off_policy_loss_is_the_squared_error_of_candidates():
    batch = collate_rows(items_of(random_trees(unknown=0.3), ["two"]))
    batch["excess"] = batch["labels"].clone()
    advantages = torch.randn(2, len(batch["tokens"]), 7, 1)
    loss = head_loss(batch, advantages, on_policy=False)
    expected = 0.0
    for member in advantages:
        errors = []
        for row in range(len(batch["tokens"])):
            before, token = int(batch["previous"][row]), int(batch["tokens"][row])
            candidates = batch["candidates"][before].tolist()
            target = float(batch["excess"][row, 0])
            if batch["depths"][row] == 0 or token not in candidates or target != target:
                continue
            share, of_all = batch["log_probs"][before].exp(), member[before, :, 0]
            value = float(of_all[candidates.index(token)] - (share * of_all).sum())
            errors.append((value - target) ** 2 - target**2)
        expected += np.mean(errors)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_tokens_that_guidance_cannot_choose_teach_nothing():
    batch = collate_rows(items_of(random_trees(2), ["one"]))
    batch["excess"], batch["candidates"] = batch["labels"], batch["candidates"] + 100
    advantages = torch.randn(1, len(batch["tokens"]), 7, 1, requires_grad=True)
    loss = head_loss(batch, advantages, on_policy=False)
    assert loss.item() == 0 and not torch.autograd.grad(loss, advantages)[0].any()


def test_responses_without_a_score_are_left_out(base_model, tmp_path, warnings):
    rows = [{"prompt": "a b", "completion": f" {c}", "x": x, "y": y}
            for c, x, y in (("c", None, None), ("d", 1.0, None), ("e", None, 2.0))]  # fmt: skip
    made = trainer(base_model, tmp_path, Dataset.from_list(rows))
    (tree,) = made._sources.responses["train"].trees
    np.testing.assert_array_equal(tree.rewards["x"], [np.nan, 1, np.nan])
    np.testing.assert_array_equal(tree.rewards["y"], [np.nan, np.nan, 2])
    assert "1 of the 3 rows of `train_dataset` have no score" in warnings[0]


def test_what_another_policy_prefers_is_not_exaggerated():
    """Two candidates that the base model takes by 9 to 1, and the data alike, worth 1 and -1."""
    share = torch.tensor([0.9, 0.1])
    batch = {
        "tokens": torch.tensor([5, 0, 1]),
        "previous": torch.zeros(3, dtype=torch.int64),
        "depths": torch.tensor([0, 1, 1]),
        "candidates": torch.tensor([[0, 1]]).expand(3, -1),
        "log_probs": share.log().expand(3, -1),
        "excess": torch.tensor([[0.0], [1.0], [-1.0]]),
    }
    found = {}
    for on_policy in (True, False):
        advantages = torch.zeros(2, 1, requires_grad=True)
        for _ in range(500):
            loss = head_loss(batch, advantages.expand(1, 3, 2, 1), on_policy=on_policy)
            advantages.data -= 0.1 * torch.autograd.grad(loss, advantages)[0]
        found[on_policy] = (advantages[0] - advantages[1]).item()
    assert 0 < found[False] < 2 < found[True]


def test_unknown_values_have_no_label_and_all_responses_are_packed():
    trees = random_trees()
    packed = TreeDataset(trees, ["one", "two"], np.zeros(2), np.ones(2), max_length=1 << 20)
    for tree, sequence in zip(trees, packed.sequences):
        known = ~np.isnan(sequence["labels"])
        tokens = [len(node.tokens) for node in tree.nodes]
        of_two = [n for n, x in zip(tokens[1:], tree.rewards["two"][1:]) if not np.isnan(x)]
        assert known.sum(0).tolist() == [1 + sum(tokens[1:]), 1 + sum(of_two)]


def test_words_are_tokens():
    """The tests above count on it."""
    assert make_tokenizer()("good <end>").input_ids == [VOCABULARY.index("good"), END]


def tokens_of(rows, tokenizer, **more):
    """The same responses as tokens, as another tool writes them."""
    return [
        {
            "prompt_ids": tokenizer(row["prompt"]).input_ids,
            "completion_ids": [*tokenizer(row["completion"]).input_ids, END],
            **{name: row[name] for name in ("good", "bad")},
            **more,
        }
        for row in rows
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rollouts_of_another_tool_are_read_as_they_were_written(tmp_path, tokenizer, suffix):
    rows = scored(3)
    with_tokens = tokens_of(rows, tokenizer, model="it")
    rows[1]["good"] = float("nan")  # which is no JSON
    with_tokens[0]["log_probs"] = [-1.5] * len(with_tokens[0]["completion_ids"])
    for kind in (rows, with_tokens):
        write_rollouts(tmp_path / f"rows.{suffix}", iter(kind))
        found = read_rollouts(tmp_path / f"rows.{suffix}").to_list()
        assert [{k: v for k, v in row.items() if k != "log_probs"} for row in found] == [
            {k: v if v == v else None for k, v in row.items() if k != "log_probs"} for row in kind
        ]
    assert found[0]["log_probs"] == with_tokens[0]["log_probs"] and found[1]["log_probs"] is None
    assert [path.name for path in tmp_path.iterdir()] == [f"rows.{suffix}"]


def test_tokens_train_as_their_text_does(base_model, tmp_path, tokenizer):
    rows, fields = scored(12), {**FIELDS, "num_train_epochs": 1}
    write_rollouts(tmp_path / "tokens.jsonl", tokens_of(rows, tokenizer))
    made = []
    for name, data in (("text", Dataset.from_list(rows)), ("tokens", tmp_path / "tokens.jsonl")):
        data = data if isinstance(data, Dataset) else read_rollouts(data)
        made.append(trainer(base_model, tmp_path / name, data, **fields))
        made[-1].train()
        assert not made[-1].on_policy
    torch.testing.assert_close(made[0].model.state_dict(), made[1].model.state_dict())


def test_responses_are_the_base_models_if_they_say_so(base_model, tmp_path, tokenizer):
    """Which is believed of its name, and checked against log-probabilities where there are any."""
    fields = {**FIELDS, "num_train_epochs": 1}
    rows = tokens_of(scored(12), tokenizer, model=base_model)
    model = AutoModelForCausalLM.from_pretrained(base_model).eval()
    for row in rows:
        tokens = row["completion_ids"]
        row["log_probs"] = prompt_log_probs(model, row["prompt_ids"] + tokens)[-len(tokens) :]
    made = trainer(base_model, tmp_path / "own", Dataset.from_list(rows), **fields)
    made.train()
    made.save_model()
    assert made.on_policy
    assert "mean reward under the base model" in (tmp_path / "own" / "README.md").read_text()
    unknown = [{**row, "model": None if i == 3 else base_model} for i, row in enumerate(rows)]
    again = trainer(base_model, tmp_path / "own", Dataset.from_list(unknown), **fields)
    assert not again.on_policy
    with pytest.raises(ValueError, match="cannot be resumed: on policy was None and is False"):
        again.train(resume_from_checkpoint=True)
    for row in rows:
        row["log_probs"] = [x - 0.5 for x in row["log_probs"]]
    with pytest.raises(ValueError, match=r"differ from its own by 0\.5 a token"):
        trainer(base_model, tmp_path / "other", Dataset.from_list(rows), **fields).train()
    rows[5]["model"] = "another/model"
    with pytest.raises(ValueError, match="row 5 of `train_dataset` was sampled from 'another/mod"):
        trainer(base_model, tmp_path / "other", Dataset.from_list(rows), **fields)


LINE = {"prompt_ids": [4], "completion_ids": [5, 0], "x": 1.0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt_ids": [4], "comple', r"rows.jsonl', line 2 is cut off or no JSON .* remove"),
        ("3", "line 2 must be an object of names and values, got 3"),
        ({**LINE, "completion_ids": []}, "line 2: 'completion_ids' must be a list of one or more"),
        ({**LINE, "prompt_ids": ["a"]}, r"line 2: 'prompt_ids' must be .* got \['a'\]"),
        ({**LINE, "completion_ids": [-1]}, "which are not negative"),
        ({"prompt": "a", "completion": 3, "x": 1}, "line 2: 'completion' must be text or a list"),
        ({"prompt": [{"content": "a"}], "completion": "b", "x": 1}, "'prompt' must be text or a"),
        ({**LINE, "log_probs": [-1.0]}, "'log_probs' must be a number for each of the 2 tokens"),
        ({**LINE, "log_probs": [-1.0, 1.0]}, "'log_probs' must be finite numbers of at most 0"),
        ({**LINE, "model": 3}, "'model' must be the id or path of a model, or None, got 3"),
        ({**LINE, "x": float("inf")}, "'x' must be a finite number, or None"),
        ({"prompt_ids": [4], "completion_ids": [5]}, "line 2 has no score, in a column that"),
        ({**LINE, "x": "1", "y": 1.0}, "'x' is text in some rows and a number in others"),
    ],
)
def test_damaged_rollouts_are_named_with_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    line = line if isinstance(line, str) else json.dumps(line)
    path.write_text(json.dumps(LINE) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_rollouts(path)


def test_damaged_files_are_named(tmp_path):
    write_rollouts(tmp_path / "rows.parquet", [LINE])
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cut.parquet' is cut off or no Parquet"):
        read_rollouts(tmp_path / "cut.parquet")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty.jsonl' holds no rollouts"):
        read_rollouts(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"must end in one of \('.jsonl', '.parquet'\)"):
        write_rollouts(tmp_path / "rows.csv", [LINE])
    with pytest.raises(ValueError, match="row 1: 'model' must be"):
        write_rollouts(tmp_path / "new.jsonl", [LINE, {**LINE, "model": 1}])
    assert not (tmp_path / "new.jsonl").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**LINE, "completion_ids": [99]}, "row 0 of .*has the token 99, the base model's tokeniz"),
        ({**LINE, "prompt_ids": [99]}, "row 0 of .*'prompt_ids' has the token 99, the base model"),
        ({**LINE, "completion_ids": [0, 5]}, "row 0 of .*goes on after an end-of-sequence token"),
        ({"prompt_ids": [4], "completion": " a", "x": 1.0}, "it is text and 'prompt_ids' is not"),
    ],
)
def test_tokens_that_are_no_response_are_named(base_model, tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        trainer(base_model, tmp_path, Dataset.from_list([row]))


def paired(count, offset=0, seed=0, each=4):
    """Pairs of responses, of which the better one is preferred."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt in prompts(count, offset)["prompt"]:
        for _ in range(each):
            both = sorted((response(rng) for _ in range(2)), key=lambda text: goodness([text]))
            if goodness([both[0]]) < goodness([both[1]]):
                rows.append({"prompt": prompt, "chosen": both[1], "rejected": both[0]})
    return rows


def implicit(rows):
    """With the prompt in both responses."""
    return [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]


@pytest.mark.parametrize(
    ("head_type", "of"), [("hidden", list), ("state", list), ("hidden", implicit)]
)
def test_pairs_in_a_file_train_values_that_guide(base_model, tokenizer, tmp_path, head_type, of):
    fields = {"hidden": FIELDS, "state": {"num_train_epochs": 8, "top_k": 18}}[head_type]
    fields = {**fields, "head_type": head_type}
    held_out = Dataset.from_list(paired(20, 5, seed=1))
    made = trainer(base_model, tmp_path, from_file(tmp_path, of(paired(60))), held_out, **fields)
    made.train()
    made.save_model()
    assert made.objectives == ["preference"]
    assert made.value_config.reward_std == [UTILITY_STD]
    plain = mean_goodness(base_model, tmp_path, tokenizer, {})
    assert mean_goodness(base_model, tmp_path, tokenizer, {"preference": 1.0}) > plain + 0.3
    assert mean_goodness(base_model, tmp_path, tokenizer, {"preference": -1.0}) < plain - 0.3
    assert "of the noise of a judgement" in (tmp_path / "README.md").read_text()


def test_implicit_prompts_are_those_in_a_column(base_model, tmp_path):
    rows = paired(6)
    found = [
        trainer(base_model, tmp_path, Dataset.from_list(x))._sources.responses["train"].trees
        for x in (rows, implicit(rows))
    ]
    # Unless both responses begin alike, which then is the prompt's.
    alike = [[t.nodes for t in trees if len(t.nodes[0].tokens) == 2] for trees in found]
    assert len(alike[1]) > 3 and all(nodes[0] in [x[0] for x in alike[0]] for nodes in alike[1])


def test_a_pair_that_is_turned_round_is_trained_on_anew(base_model, tmp_path):
    fields, rows = {**FIELDS, "num_train_epochs": 1}, paired(12)
    first = trainer(base_model, tmp_path / "run", Dataset.from_list(rows), **fields)
    first.train()
    folder = tmp_path / "run" / "rollouts" / "train"
    rows[3] = {**rows[3], "margin": 1.0}
    rows = [{"margin": 0.0, **row} for row in rows]
    margin = trainer(base_model, tmp_path / "run", Dataset.from_list(rows), **fields)
    read = [path.stat().st_mtime_ns for path in folder.glob("*.hidden.*")]
    margin.train()
    assert read == [path.stat().st_mtime_ns for path in folder.glob("*.hidden.*")]
    rows[3]["chosen"], rows[3]["rejected"] = rows[3]["rejected"], rows[3]["chosen"]
    turned = trainer(base_model, tmp_path / "run", Dataset.from_list(rows), **fields)
    turned.train()
    alone = trainer(base_model, tmp_path / "alone", Dataset.from_list(rows), **fields)
    alone.train()
    weights = [
        torch.cat([x.flatten() for x in made.model.state_dict().values()])
        for made in (first, margin, turned)
    ]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    torch.testing.assert_close(alone.model.state_dict(), turned.model.state_dict(), rtol=0, atol=0)


def pairs_of_trees(margins=True):
    trees = random_trees(4, seed=3)
    for tree in trees:
        del tree.nodes[-1]  # two pairs are left
        tree.rewards = {"preference": np.array([np.nan, 2.0, -2.0, 2.0, -2.0])}
        if margins:
            tree.rewards[MARGIN] = np.array([np.nan, 0.3 + tree.prompt_index, 0, 0.7, 0])
    return trees


def naive_pair_loss(trees, value, margins):
    """`value(tree, leaf, depth)` of a response's first tokens."""
    losses = []
    for tree in trees:
        for a, b in zip(tree.leaves()[::2], tree.leaves()[1::2]):
            lengths = [len(tree.response(leaf)) for leaf in (a, b)]
            margin = tree.rewards[MARGIN][a] if margins else 0.0
            odds = UTILITY_STD * (value(tree, a, lengths[0]) - value(tree, b, lengths[1])) - margin
            along = [
                np.log1p(np.exp(UTILITY_STD * (value(tree, b, d) - value(tree, a, d))))
                for d in range(1, min(lengths) + 1)
            ]
            losses.append((np.log1p(np.exp(-odds)) + np.mean(along)) / 2)
    return np.mean(losses)


@pytest.mark.parametrize("margins", [False, True])
def test_loss_of_heads_is_that_of_sums_of_advantages(margins):
    trees = pairs_of_trees(margins)
    items = items_of(trees, ["preference"])
    for item, tree in zip(items, trees):
        if margins:
            item["margins"] = np.zeros(len(item["tokens"]), dtype=np.float32)
            item["margins"][item["ends"]] = tree.rewards[MARGIN][1:]
    batch = collate_rows(items)
    advantages = torch.randn(2, len(batch["tokens"]), 7, 1)
    starts = np.cumsum([0, *(len(item["tokens"]) for item in items)])
    expected = 0.0
    for member in advantages:
        of_token, _, sampled = centred_advantages(batch, member)
        used = torch.where(sampled, of_token[:, 0], 0.0).numpy()

        def value(tree, leaf, depth):
            first = starts[tree.prompt_index] + 1
            first += sum(len(node.tokens) for node in tree.nodes[1:leaf])
            return used[first : first + depth].sum()  # noqa: B023

        expected += naive_pair_loss(trees, value, margins)
    assert pairs_loss(batch, advantages).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("margins", [False, True])
def test_loss_of_a_state_head_is_that_of_values_along_both(margins):
    trees = pairs_of_trees(margins)
    packed = TreeDataset(
        trees, ["preference"], np.zeros(1), np.ones(1), max_length=4, leaf_fraction=0.0, pairs=True
    )
    assert len(packed) == 8
    batch = DataCollatorForTrees(0)(packed.sequences)
    table = torch.randn(20)  # a value that depends on the token and its depth
    values = table[batch["input_ids"]] * (1 + batch["depths"])

    def value(tree, leaf, depth):
        return float(table[tree.nodes[leaf].tokens[depth - 1]] * (1 + depth))

    ends, depths = batch["siblings"][:, 2:], batch["depths"].flatten()
    loss = pair_loss(values.flatten(), ends, depths, batch["margins"])
    assert loss.item() == pytest.approx(naive_pair_loss(trees, value, margins), rel=1e-5)


def test_values_of_pairs_are_in_deviations_of_what_decides_them():
    """Pairs that a score decides without noise, of which a fifth of the variance is foreseen."""
    generator = torch.Generator().manual_seed(0)
    seen, unseen = torch.randn(2, 40_000, 2, generator=generator)
    score = 0.2**0.5 * seen + 0.8**0.5 * unseen  # of standard deviation 1
    seen = torch.where(score[:, :1] > score[:, 1:], seen, seen.flip(1)) * 0.2**0.5
    ends = torch.arange(80_000).view(-1, 2)
    depths, margins = torch.ones(80_000, dtype=torch.int64), torch.zeros(40_000)
    slopes = torch.linspace(0.5, 1.6, 111)
    losses = [pair_loss(slope * seen.flatten(), ends, depths, margins) for slope in slopes]
    assert slopes[int(torch.stack(losses).argmin())] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "chosen": " b"}], "has no column 'rejected'"),
        ([{"prompt": "a", "chosen": " b", "rejected": "c"}], "row 0 of .*, 'rejected': the tokens"),
        ([{"prompt": "a", "chosen": " b", "rejected": " c", "margin": "1"}], "'margin' of .* must"),
        ([{"prompt": "a", "chosen": " b", "rejected": " c", "margin": x} for x in (1.0, None)],
         "row 1 of `train_dataset` has no finite 'margin'"),
    ],
)  # fmt: skip
def test_pairs_that_cannot_be_learnt_from_are_named(base_model, tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        trainer(base_model, tmp_path, Dataset.from_list(rows))


def test_pairs_are_of_one_objective(base_model, tmp_path):
    model = MAVISValueModel.from_base_model(
        base_model, ["one", "two"], num_hidden_layers=1, tokenizer=make_tokenizer()
    )
    with pytest.raises(ValueError, match=r"pairs are of one objective, .* \['one', 'two'\]"):
        trainer(model, tmp_path, Dataset.from_list(paired(3)))


def stepwise(count, offset=0, seed=0, each=6):
    """Responses in two to four steps, each with how good the response is so far."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt in prompts(count, offset)["prompt"]:
        for _ in range(each):
            steps = [
                response(rng)[:12].rsplit(" ", 1)[0] or " a" for _ in range(rng.integers(2, 5))
            ]
            labels = [goodness(["".join(steps[: i + 1])])[0] for i in range(len(steps))]
            rows.append({"prompt": prompt, "completions": steps, "labels": labels})
    return rows


@pytest.mark.parametrize("head_type", ["hidden", "state"])
def test_labels_of_steps_train_values_that_guide(base_model, tokenizer, tmp_path, head_type):
    fields = {"hidden": FIELDS, "state": {"num_train_epochs": 8, "top_k": 18}}[head_type]
    held_out = Dataset.from_list(stepwise(20, 5, seed=1))
    fields = {**fields, "head_type": head_type, "max_completion_length": 24}
    made = trainer(base_model, tmp_path, from_file(tmp_path, stepwise(60)), held_out, **fields)
    made.train()
    made.save_model()
    assert made.objectives == ["labels"]
    plain = mean_goodness(base_model, tmp_path, tokenizer, {})
    assert mean_goodness(base_model, tmp_path, tokenizer, {"labels": 1.0}) > plain + 0.3
    assert mean_goodness(base_model, tmp_path, tokenizer, {"labels": -1.0}) < plain - 0.3
    last = [row["labels"][-1] for row in stepwise(60)]
    assert made.value_config.reward_mean == pytest.approx([np.mean(last)])
    assert made.value_config.provenance["rollouts"]["responses"] == 360


STEPWISE = [
    {"prompt": "a b", "completions": [" good", " bad red", " a"], "labels": [1.0, 0.0, 0.5]},
    {"prompt": "c d", "completions": [" c d", " e f g"], "labels": [None, -1.0]},
    {"prompt": "a b", "completions": [" blue", " red", " i j"], "labels": [2.0, 3.0, None]},
    {"prompt": "e f", "completions": [" blue"], "labels": [None]},
]


def test_a_steps_tokens_learn_the_next_label(base_model, tokenizer, tmp_path):
    """Against labels and returns of every response by itself, token by token."""
    made = trainer(base_model, tmp_path, Dataset.from_list(STEPWISE), max_completion_length=4)
    trees = made._sources.responses["train"].trees
    assert [tree.prompt_index for tree in trees] == [0, 1]
    batch = collate_rows(items_of(trees, ["labels"]))
    values = torch.randn(len(batch["tokens"]), 1)
    returns = lambda_returns(batch, values, 0.5)
    expected = {
        " good bad red a": [1.0, 0.0, 0.0, 0.5],
        " blue red": [2.0, 3.0],  # what follows the last label is left out
        " c d e f": [-1.0] * 4,  # cut
    }
    for text, labels in expected.items():
        tokens = tokenizer(text).input_ids
        ahead = 0.0
        for end in batch["ends"].nonzero()[:, 0].tolist():  # that of the whole response
            rows = [end]
            while batch["depths"][rows[0]] > 1:
                rows.insert(0, int(batch["previous"][rows[0]]))
            if batch["tokens"][rows].tolist() == tokens:
                break
        else:
            raise AssertionError(f"no response {text!r}")
        assert batch["labels"][rows, 0].tolist() == labels
        for i in reversed(range(len(rows))):  # 0.5 of the next value, up to the step's end
            last = i + 1 == len(rows) or (labels[i] != labels[i + 1])
            ahead = labels[i] if last else 0.5 * float(values[rows[i]]) + 0.5 * ahead
            assert float(returns[rows[i]]) == pytest.approx(ahead, abs=1e-5)
    roots = batch["labels"][batch["depths"] == 0, 0]
    assert roots.tolist() == [1.5, -1.0]
    made.collect_rollouts()
    stored = read_rollouts(tmp_path / "rollouts" / "train")
    assert [tree.nodes for tree in stored] == [tree.nodes for tree in trees]
    packed = [
        {int(t): x for t, x in zip(s["input_ids"], s["labels"][:, 0]) if x == x}
        for s in TreeDataset(trees, ["labels"], np.zeros(1), np.ones(1), max_length=99).sequences
    ]
    ids = dict(zip(VOCABULARY, range(len(VOCABULARY))))
    assert {ids["good"]: 1.0, ids["bad"]: 0.0, ids["blue"]: 2.0}.items() <= packed[0].items()


def test_steps_are_lines_and_turns_of_an_assistant(base_model, tmp_path):
    """Steps without white space are joined by line ends, as in TRL, and end where they do."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompt = [{"role": "user", "content": "a b"}]
    rows = [
        {"prompt": prompt, "completions": ["good red", "bad"], "labels": [True, False]},
        {"prompt": prompt, "completions": ["good ", "a", " b"], "labels": [True, None, False]},
    ]
    made = trainer(base_model, tmp_path, Dataset.from_list(rows), processing_class=tokenizer)
    (tree,) = made._sources.responses["train"].trees
    texts = [tokenizer.decode(node.tokens) for node in tree.nodes]
    assert texts == ["<user> a b <assistant>", "good red", "bad", "good", "a b"]
    assert [node.parent for node in tree.nodes] == [-1, 0, 1, 0, 3]
    assert tree.leaves() == [2, 4]


STEP = STEPWISE[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**STEP, "labels": [1.0]}, "row 1 of `train_dataset` has 3 steps in 'completions' and 1 "
         "'labels'; give one for each step, None where"),
        ({**STEP, "labels": None}, "row 1 of `train_dataset` has 3 steps in 'completions' and 0"),
        ({**STEP, "labels": [1.0, float("inf"), 0.0]}, "row 1 .* an infinite number in 'labels'"),
        ({**STEP, "completions": [" a", "", " b"]}, "row 1 .* step 1 has no token of its own"),
        ({**STEP, "completions": ["a", " b", " c"]}, "row 1 .*, 'completions': the tokens of"),
        ({**STEP, "completions": [" <end>", " b", " c"]}, "row 1 .* goes on after an end-of-seq"),
    ],
)  # fmt: skip
def test_steps_that_cannot_be_learnt_from_are_named(base_model, tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        trainer(base_model, tmp_path, Dataset.from_list([STEP, row]))


def test_columns_that_are_no_steps_are_named(base_model, tmp_path):
    for rows, message in (
        ([{**STEP, "labels": 1.0}], "'labels' of `train_dataset` holds .*, it must hold a list of"),
        ([{**STEP, "labels": [None] * 3}], "'labels' of `train_dataset` holds"),
        ([{**STEP, "completions": [[TURN]] * 3}], "row 0 .* must be a list of strings"),
        ([{k: v for k, v in STEP.items() if k != "labels"}], "has no column 'labels'"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(base_model, tmp_path, Dataset.from_list(rows))


def mixture(base_model, folder, rows, held_out=None, **fields):
    """Of redness, which is sampled for, and of the scores in the rows."""
    return MAVISTrainer(
        base_model,
        config(folder, **fields),
        {"redness": redness, "good": None},
        Dataset.from_list(rows),
        None if held_out is None else Dataset.from_list(held_out),
    )


@pytest.mark.parametrize("head_type", ["hidden", "state"])
def test_each_objective_learns_from_its_own_source(base_model, tokenizer, tmp_path, head_type):
    fields = {"hidden": FIELDS, "state": {"num_train_epochs": 8, "top_k": 18}}[head_type]
    fields = {**fields, "head_type": head_type}
    rows = [
        *({k: v for k, v in row.items() if k != "bad"} for row in scored(60)),
        {"prompt": "j j", "completion": None, "good": None},  # a prompt without a response
    ]
    made = mixture(base_model, tmp_path, rows, scored(20, 5, seed=1), **fields)
    made.train()
    made.save_model()
    assert made.objectives == ["redness", "good"]
    sampled = read_rollouts(tmp_path / "rollouts" / "train")
    assert len(sampled) == 61 and {*sampled[0].rewards} == {"redness"}  # each prompt once
    given = read_rollouts(tmp_path / "rollouts" / "train-responses")
    assert len(given) == 60 and {*given[0].rewards} == {"good"}
    expected = [reward_statistics(*part) for part in ((sampled, ["redness"]), (given, ["good"]))]
    means, stds = np.concatenate(expected, axis=1)
    np.testing.assert_allclose(made.value_config.reward_mean, means)
    np.testing.assert_allclose(made.value_config.reward_std, stds)
    card = (tmp_path / "README.md").read_text()
    assert "mean reward under the base model, of good score in the data" in card
    plain = mean_goodness(base_model, tmp_path, tokenizer, {})
    assert mean_goodness(base_model, tmp_path, tokenizer, {"good": 1.0}) > plain + 0.3
    assert mean_goodness(base_model, tmp_path, tokenizer, {"good": -1.0}) < plain - 0.3


def test_a_source_says_nothing_of_the_other_objectives(base_model, tmp_path):
    """Half of the mixture is what each source alone is."""
    rows = [{k: v for k, v in row.items() if k != "bad"} for row in scored(24)]
    both = mixture(base_model, tmp_path / "both", rows, **FIELDS)
    both.collect_rollouts()
    data = Dataset.from_list(rows)
    alone = [
        MAVISTrainer(base_model, config(tmp_path / "redness", **FIELDS), {"redness": redness},
                     data.select(range(0, len(data), 6)).select_columns("prompt")),
        trainer(base_model, tmp_path / "good", data, **FIELDS),
    ]  # fmt: skip
    items = []
    for one in alone:
        one.collect_rollouts()
        items.append([*one.train_dataset, *one.eval_dataset])
    found = [*both.train_dataset, *both.eval_dataset]
    assert len(found) == sum(map(len, items))
    by_source = [[x for x in found if (x["reach"][:, i] > 0).any()] for i in range(2)]
    for i, (of_both, of_one) in enumerate(zip(by_source, items)):
        for x, y in zip(*(sorted(z, key=lambda x: x["tree"]) for z in (of_both, of_one))):
            np.testing.assert_array_equal(x["tokens"], y["tokens"])
            np.testing.assert_array_equal(x["labels"][:, i], y["labels"][:, 0])
            np.testing.assert_array_equal(x["reach"][:, i], y["reach"][:, 0])
            assert np.isnan(x["labels"][:, 1 - i]).all() and not x["reach"][:, 1 - i].any()
    assert not both.on_policy and both._training._on_policy().tolist() == [True, False]


def test_each_objective_is_taken_for_its_own_writers():
    """The loss of sampled tokens and that of given ones, each over its objective's tokens."""
    trees = random_trees()
    items = items_of(trees, ["one", "two"])
    for item in items:
        item["excess"] = torch.randn(item["labels"].shape) + 0 * torch.as_tensor(item["labels"])
    batch = collate_rows(items)
    advantages = torch.randn(1, len(batch["tokens"]), 7, 2)
    losses, counts = [], []
    for i, on_policy in enumerate((True, False)):
        part = {**batch, "excess": batch["excess"][:, [i]]}
        losses.append(head_loss(part, advantages[..., [i]], on_policy=on_policy))
        sampled = centred_advantages(part, advantages[0][..., [i]])[2]
        counts.append((sampled & ~part["excess"][:, 0].isnan()).sum())
    expected = sum(loss * n for loss, n in zip(losses, counts)) / sum(counts)
    found = head_loss(batch, advantages, on_policy=torch.tensor([True, False]))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([{"prompt": "a"}], {}, r"has None for \['good'\]: .* one of the columns \['completion'"),
        ([{"prompt": "a", "chosen": " b", "rejected": " c"}], {}, "and no pairs; it has"),
        ([{"prompt": "a", "completion": " b"}], {}, "`train_dataset` has no column 'good'"),
        (scored(8), {"num_iterations": 2}, "num_iterations=2 needs `reward_funcs`, for every obj"),
    ],
)
def test_mixtures_that_cannot_be_learnt_from_are_named(base_model, tmp_path, rows, fields, message):
    with pytest.raises(ValueError, match=message):
        mixture(base_model, tmp_path, rows, **{**FIELDS, **fields})


def test_columns_of_scores_can_be_chosen_by_name(base_model, tmp_path):
    made = MAVISTrainer(base_model, config(tmp_path), {"bad": None}, Dataset.from_list(scored(4)))
    assert made.objectives == ["bad"] and not made.reward_funcs


def streamed(rows):
    """As from a hub, without a length or types."""
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("what", ["prompts", "scores", "pairs"])
def test_a_stream_trains_as_its_rows_do(base_model, tmp_path, what):
    fields = {**FIELDS, "num_train_epochs": 1}
    rows = {"prompts": prompts(10).to_list(), "scores": scored(10), "pairs": paired(10)}[what]
    rewards = {"goodness": goodness} if what == "prompts" else None
    weights = []
    for of in (Dataset.from_list, streamed):
        folder = tmp_path / of.__name__
        made = MAVISTrainer(
            base_model, config(folder, **fields), rewards, of(rows), {"some": of(rows[:20])}
        )
        made.train()
        weights.append(made.model.state_dict())
    stored = Dataset.from_parquet(
        str(folder / "rollouts" / "streamed" / "train.parquet"), cache_dir=str(tmp_path)
    )
    assert stored.to_list() == rows
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize("head_type", ["hidden", "state"])
def test_metrics_of_several_evaluation_sets_are_those_of_each(base_model, tmp_path, head_type):
    fields = {"hidden": FIELDS, "state": {"top_k": 18}}[head_type]
    fields = {**fields, "num_train_epochs": 1, "head_type": head_type}
    data = Dataset.from_list(scored(12))
    sets = {name: Dataset.from_list(scored(9, i, seed=i)) for i, name in ((1, "near"), (2, "far"))}
    together = trainer(base_model, tmp_path / "both", data, sets, **fields)
    together.train()
    metrics = together.evaluate()
    assert sorted(together.eval_dataset) == ["far", "near"]
    if head_type == "hidden":  # chosen and scaled by all of them
        assert len(together._training.held_out) == 18
    one = together.evaluate("near", metric_key_prefix="test")
    for name, dataset in sets.items():
        alone = trainer(base_model, tmp_path / name, data, dataset, **fields)
        alone.collect_rollouts()
        alone.model.load_state_dict(together.model.state_dict())
        expected = alone.evaluate()
        compared = [key for key in expected if "/" in key or key.endswith("loss")]
        assert len(compared) > 4
        for key in compared:
            found = metrics[key.replace("eval_", f"eval_{name}_", 1)]
            assert found == pytest.approx(expected[key], rel=1e-3, abs=1e-4), key
            if name == "near":
                assert one[key.replace("eval_", "test_", 1)] == pytest.approx(found)
    assert not any(key.startswith("eval_kl") or "eval_explained" in key for key in metrics)


def test_evaluation_sets_that_cannot_be_used_are_named(base_model, tmp_path):
    data = Dataset.from_list(scored(9))
    with pytest.raises(ValueError, match="`eval_dataset` has the name 'a/b', which is to be"):
        trainer(base_model, tmp_path, data, {"a/b": data})
    made = trainer(base_model, tmp_path, data, {"a": data})
    with pytest.raises(ValueError, match="give these prompts to the trainer as `eval_dataset`"):
        made.evaluate({"b": data})


def test_a_column_is_added_to_a_value_model_or_goes_on_with_it(base_model, tmp_path, warnings):
    fields = {**FIELDS, "num_train_epochs": 1}
    rows = [{**row, "calm": float(i % 3)} for i, row in enumerate(scored(12))]
    data = Dataset.from_list(rows).remove_columns("bad")
    first = trainer(base_model, tmp_path / "first", data.remove_columns("calm"), **fields)
    first.train()
    first.save_model()
    folder = str(tmp_path / "first")
    added = trainer(folder, tmp_path / "added", data.remove_columns("good"), **fields)
    added.train()
    added.save_model()
    saved = MAVISValueModel.load(str(tmp_path / "added"))
    assert saved.config.objectives == ["good", "calm"]
    there = MAVISValueModel.load(folder)
    torch.testing.assert_close(saved.value.weight[:1], there.value.weight, rtol=0, atol=0)
    again = trainer(folder, tmp_path / "again", data, **fields)  # which has both
    assert again.objectives == ["good"] and again._kept is None
    assert any("['calm'] are no objectives of the value model" in message for message in warnings)
