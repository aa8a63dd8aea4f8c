"""Responses that are there already: from a file to a steered response."""

import json
import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from trimtab.plugins.transformers import MAVISLogitsProcessor
from trimtab.plugins.value_model import MAVISValueModel
from trimtab.trainers import MAVISTrainer, read_rollouts, write_rollouts
from trimtab.trainers.head_training import efficiency_sums, fit_values, head_loss
from trimtab.trainers.hidden_states import collate_rows, tree_rows
from trimtab.trainers.packing import TreeDataset
from trimtab.trainers.rewards import reward_statistics
from trimtab.trainers.rollouts import Node, Tree
from trimtab.trainers.samplers import prompt_log_probs

from .conftest import END, VOCABULARY, WORDS, make_tokenizer
from .test_head_training import FIELDS, goodness
from .test_mavis_trainer import config, prompts

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
    model = AutoModelForCausalLM.from_pretrained(base_model).eval()
    ids = torch.tensor([tokenizer("a b").input_ids]).expand(200, -1)
    processor = MAVISLogitsProcessor(
        [str(folder)], weights=weights, beta=4.0, model=model, tokenizer=tokenizer
    )
    torch.manual_seed(0)
    out = model.generate(
        ids, do_sample=True, top_k=18, max_new_tokens=12, logits_processor=[processor]
    )
    return np.mean(
        goodness(tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True))
    )


@pytest.fixture
def warnings():
    """What is warned of, by whatever logger."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    loggers = [
        transformers_logging.get_logger(f"trimtab.trainers.{name}")
        for name in ("data", "mavis_trainer")
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
        {"prompt": "a b", "completion": " good red", "x": 1.0, "note": "n"},
        {"prompt": "c d", "completion": " bad", "x": None, "note": "n"},
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
    assert made.value_config.reward_mean == [3.5]  # of the prompts' means, 2 and 5
    assert made.value_config.reward_std == pytest.approx([2**0.5])  # of 1 and 3
    labels = [sequence["labels"] for sequence in made.train_dataset.sequences]
    assert sum((~np.isnan(label)).sum() for label in labels) == 1 + 3 + 2 + 1 + 4


def test_conversations_end_where_the_model_would_end_them(base_model, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    row = {
        "prompt": [{"role": "user", "content": "a b"}],
        "completion": [{"role": "assistant", "content": "good"}],
        "x": 1.0,
    }
    made = trainer(base_model, tmp_path, Dataset.from_list([row]), processing_class=tokenizer)
    (tree,) = made._responses["train"].trees
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
        ([ROW, {**ROW, "completion": "good"}], "row 1 of `train_dataset`: the tokens of the prompt "
         "are not those .* Move the space between them to the beginning of the completion"),
        ([{**ROW, "completion": " <end> good"}], "row 0 of .*'good' follows the end-of-sequence"),
        ([{**ROW, "x": float("inf")}], "row 0 of `train_dataset` has an infinite 'x'"),
        ([{**ROW, "y": float("nan")}], "has no score in its column 'y'"),
        ([{**ROW, "x": "1"}], "no column of numbers to learn from"),
        ([{**ROW, "prompt": [TURN]}], "must both be strings or both lists of messages"),
        ([{**ROW, "prompt": [TURN], "completion": [TURN, TURN]}], "'completion' has 2 messages"),
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
        rows = tree_rows(tree, values)
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
        item["reach"][1:] *= len(part.leaves()) / 5
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
        sums.append(efficiency_sums(batch, values, advantages, 1.0, on_policy).numpy())
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
            loss = head_loss(batch, advantages.expand(1, 3, 2, 1), 1.0, on_policy)
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
    with_tokens[0]["log_probs"] = [-1.5] * len(with_tokens[0]["completion_ids"])
    for kind in (rows, with_tokens):
        write_rollouts(tmp_path / f"rows.{suffix}", iter(kind))
        found = read_rollouts(tmp_path / f"rows.{suffix}").to_list()
        assert [{k: v for k, v in row.items() if k != "log_probs"} for row in found] == [
            {k: v for k, v in row.items() if k != "log_probs"} for row in kind
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
        ({**LINE, "completion_ids": [0, 5]}, "row 0 of .*goes on after an end-of-sequence token"),
        ({"prompt_ids": [4], "completion": " a", "x": 1.0}, "'completion' is text and 'prompt_ids"),
    ],
)
def test_tokens_that_are_no_response_are_named(base_model, tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        trainer(base_model, tmp_path, Dataset.from_list([row]))
