import concurrent.futures
import functools
import json
import os
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig
from tokenizers import processors
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments

from trimtab.plugins import ValueEngine
from trimtab.plugins.adapters import load_value_models
from trimtab.plugins.value_config import tokenizer_fingerprint
from trimtab.plugins.value_model import MAVISValueModel
from trimtab.trainers import MAVISConfig, MAVISTrainer, read_rollouts
from trimtab.trainers.state_training import ValueMetrics

from .conftest import END, VOCABULARY, make_model, make_tokenizer


def goodness(completions, **kwargs):
    """More "good" than "bad"."""
    return [float(text.count("good") - text.count("bad")) for text in map(text_of, completions)]


def redness(completions, **kwargs):
    return [float("red" in text_of(text)) for text in completions]


def text_of(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


REWARDS = {"goodness": goodness, "redness": redness}


def prompts(count, offset=0):
    letters = "abcdefghij"
    return Dataset.from_dict(
        {"prompt": [f"{letters[(offset + i) % 10]} {letters[i // 10 % 10]}" for i in range(count)]}
    )


def config(folder, **fields):
    return MAVISConfig(
        str(folder),
        **{
            "head_type": "state",
            **({} if fields.get("head_type") == "hidden" else {"num_hidden_layers": 2}),
            "max_completion_length": 12,
            "layers": 3,
            "top_k": 0,
            "generation_batch_size": 256,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "learning_rate": 3e-3,
            **fields,
        },
    )


def trainer(base_model, folder, rewards=None, data=None, **fields):
    arguments = {
        k: fields.pop(k) for k in ("peft_config", "eval_dataset", "callbacks") if k in fields
    }
    return MAVISTrainer(
        base_model,
        config(folder, **fields),
        REWARDS if rewards is None else rewards,
        prompts(8) if data is None else data,
        **arguments,
    )


@pytest.fixture(scope="module")
def trained(base_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    data = prompts(60)
    made = trainer(
        base_model, folder, data=data, eval_dataset=prompts(40, 5), num_train_epochs=8,
        leaf_fraction=1.0, logging_steps=5,
    )  # fmt: skip
    made.train()
    metrics = made.evaluate()
    made.save_model()
    return made, metrics, folder


def test_training_learns_values_and_ranks_siblings(trained):
    made, metrics, _ = trained
    losses = [log["value_loss"] for log in made.state.log_history if "value_loss" in log]
    assert losses[-1] < 0.8 * losses[0]
    for name in REWARDS:
        # The tokens so far decide the reward; chance is 0 and 0.5.
        assert metrics[f"eval_explained_variance/{name}"] > 0.3
        assert metrics[f"eval_sibling_accuracy/{name}/last_token"] > 0.6
        late = metrics[f"eval_explained_variance/{name}/quarter_4"]
        assert late > metrics[f"eval_explained_variance/{name}/quarter_1"]
    first = [metrics[f"eval_sibling_accuracy/{name}/first_token"] for name in REWARDS]
    assert np.mean(first) > 0.53


def test_value_of_good_is_above_that_of_bad(trained):
    made, _, _ = trained
    ids = [VOCABULARY.index(word) for word in ("good", "bad", "red", "blue")]
    prefix = [VOCABULARY.index("a"), VOCABULARY.index("b")]
    with torch.inference_mode():
        values = made.model.eval()(torch.tensor([[*prefix, i] for i in ids])).logits[:, -1]
    assert values[0, 0] > values[1, 0] + 0.1
    assert values[2, 1] > values[3, 1] + 0.1


def test_saved_model_is_a_value_model_with_its_statistics(trained, base_model):
    made, _, folder = trained
    model = MAVISValueModel.load(str(folder))
    torch.testing.assert_close(model.state_dict(), made.model.state_dict())
    assert model.config.objectives == ["goodness", "redness"]
    assert model.config.base_model == base_model
    assert model.config.tokenizer_fingerprint == tokenizer_fingerprint(make_tokenizer())
    trees = read_rollouts(folder / "rollouts" / "train")
    for i, name in enumerate(REWARDS):
        mean = np.mean([tree.values(name)[0] for tree in trees])
        assert model.config.reward_mean[i] == pytest.approx(mean)
        assert model.config.reward_std[i] > 0
    assert model.config.provenance["rollouts"]["layers"] == 3
    assert len(model.config.candidate_range) == 2 and min(model.config.candidate_range) > 0
    assert "trimtab" in model.config.provenance["packages"]
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == make_tokenizer().get_vocab()
    assert not [p for p in os.listdir(folder) if p.endswith((".bin", ".pt", ".pkl"))]
    assert "goodness" in (folder / "README.md").read_text()


def test_loss_is_that_of_every_labelled_token(base_model, tmp_path):
    made = trainer(base_model, tmp_path)
    made.collect_rollouts()
    torch.nn.init.normal_(made.model.head.weight)
    made.model.eval()
    sequences = [made.train_dataset[i] for i in range(3)]
    with torch.inference_mode():
        loss = made.compute_loss(made.model, made.data_collator(sequences))
        errors = []
        for sequence in sequences:
            batch = made.data_collator([sequence])
            values = made.model(
                batch["input_ids"], batch["attention_mask"], batch["position_ids"]
            ).logits[0]
            for value, label in zip(values.tolist(), sequence["labels"].tolist()):
                errors += [(v - y) ** 2 for v, y in zip(value, label) if y == y]
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-4)


def test_metrics_are_those_of_plain_numpy():
    rng = np.random.default_rng(0)
    labels = rng.normal(size=(50, 1))
    values = labels * 0.5 + rng.normal(size=(50, 1)) * 0.3
    quarters = rng.integers(-1, 4, size=50)
    differences, sibling_labels = rng.normal(size=(2, 20, 1)), rng.normal(size=(20, 2, 1))
    sibling_labels[:3] = 0
    distinct = np.arange(20) % 4 != 0
    metrics = ValueMetrics(["r"])

    class OneProcess:
        @staticmethod
        def reduce(tensor, reduction):
            return tensor

    for rows, pairs in ((slice(0, 30), slice(0, 5)), (slice(30, 50), slice(5, 20))):
        metrics.add(
            torch.tensor(values[rows]),
            torch.tensor(labels[rows]),
            torch.tensor(quarters[rows]),
            torch.tensor(differences[:, pairs]),
            torch.tensor(sibling_labels[pairs]),
            torch.tensor(distinct[pairs]),
        )
    got = metrics.compute(OneProcess)
    inside = quarters >= 0
    for key, rows in {"": inside, **{f"/quarter_{q + 1}": quarters == q for q in range(4)}}.items():
        residual = np.mean((values[rows] - labels[rows]) ** 2)
        assert got[f"explained_variance/r{key}"] == pytest.approx(1 - residual / labels[rows].var())
    assert got["value_loss"] == pytest.approx(np.mean((values - labels) ** 2))
    agree = np.sign(differences[..., 0]) == np.sign(sibling_labels[..., 0].T)
    decided = sibling_labels[:, 0, 0] != 0
    assert got["sibling_accuracy/r/last_token"] == pytest.approx(agree[1, decided].mean())
    assert got["sibling_accuracy/r/first_token"] == pytest.approx(
        agree[0, decided & distinct].mean()
    )
    assert metrics.sums is None


def test_interrupted_training_resumes_from_its_checkpoint(base_model, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    fields = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3}
    trainer(base_model, tmp_path / "a", callbacks=[Stop()], **fields).train()
    resumed = trainer(base_model, tmp_path / "a", **fields)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer(base_model, tmp_path / "b", **fields)
    whole.train()
    assert resumed.state.global_step == whole.state.global_step == 6
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict())
    MAVISValueModel.load(str(tmp_path / "a" / "checkpoint-6"))


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"]])
def test_lora_trains_adapter_and_head_and_saves_them_merged(base_model, tmp_path, targets):
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=targets)
    fields = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1}
    made = trainer(base_model, tmp_path, peft_config=lora, **fields)
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    made.train()
    made.save_model()
    changed = {k for k, v in made.model.state_dict().items() if not torch.equal(v, before[k])}
    assert all("lora_" in k or "head.modules_to_save" in k for k in changed)
    assert any("lora_B" in k for k in changed) and any(
        k.endswith("weight") and "head" in k for k in changed
    )
    model = MAVISValueModel.load(str(tmp_path)).eval()
    ids = torch.tensor([[4, 8, 9, 10]])
    with torch.inference_mode():
        torch.testing.assert_close(
            model(ids).logits, made.model.eval()(input_ids=ids).logits, atol=1e-5, rtol=1e-4
        )
    assert model.config.reward_std == made.value_config.reward_std
    resumed = trainer(base_model, tmp_path, peft_config=lora, **fields)
    resumed.train(resume_from_checkpoint=True)
    torch.testing.assert_close(resumed.model.state_dict(), made.model.state_dict())


def test_adapters_saved_unmerged_are_served_as_they_were_trained(base_model, tmp_path):
    made = []
    for objective in ("goodness", "brevity"):
        made.append(
            trainer(
                base_model,
                tmp_path / objective,
                {objective: goodness},
                peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"),
                merge_adapter=False,
                num_train_epochs=1,
            )
        )
        made[-1].train()
        made[-1].save_model()
    folders = [str(tmp_path / objective) for objective in ("goodness", "brevity")]
    models = load_value_models(folders, torch.float32)
    assert models[0].backbone is models[1].backbone
    assert models[0].config.reward_std == made[0].value_config.reward_std
    engine = ValueEngine(models, num_slots=1, max_length=16)
    candidates = torch.tensor([[5, 6, 7]])
    values = engine.values(
        np.array([0]), np.array([4]), torch.tensor([10]), candidates, lambda *_: [4, 8, 9]
    )
    ids = torch.tensor([[4, 8, 9, 10, token] for token in candidates[0]])
    with torch.inference_mode():
        for i, one in enumerate(made):
            expected = one.model.eval()(input_ids=ids).logits[:, -1, 0]
            torch.testing.assert_close(values[0, :, i], expected, atol=1e-5, rtol=1e-4)


def test_an_adapter_of_anything_but_the_base_model_is_not_saved_unmerged(base_model, tmp_path):
    model = MAVISValueModel.from_base_model(
        base_model, list(REWARDS), num_hidden_layers=1, tokenizer=make_tokenizer()
    )
    for given, fields in ((model, {}), (base_model, {"train_embeddings": True})):
        with pytest.raises(ValueError, match="`merge_adapter=False` saves what is added"):
            trainer(given, tmp_path, peft_config=LoraConfig(r=4), merge_adapter=False, **fields)


@pytest.mark.parametrize("train_embeddings", [False, True])
def test_embedding_is_trained_only_when_asked(base_model, tmp_path, train_embeddings):
    made = trainer(base_model, tmp_path, train_embeddings=train_embeddings, num_train_epochs=1)
    before = made.model.get_input_embeddings().weight.clone()
    made.train()
    after = made.model.get_input_embeddings().weight
    assert torch.equal(before, after) is not train_embeddings


def test_value_model_can_be_given(base_model, tmp_path):
    model = MAVISValueModel.from_base_model(
        base_model, ["goodness"], num_hidden_layers=1, tokenizer=make_tokenizer()
    )
    made = trainer(model, tmp_path, {"goodness": goodness}, num_train_epochs=1, top_k=7)
    made.train()
    assert made.model is model and model.config.top_k == 7
    with pytest.raises(ValueError, match=r"objectives \['goodness'\]"):
        trainer(model, tmp_path)


def test_value_model_without_base_model_is_refused(tmp_path):
    model = MAVISValueModel.from_base_model(make_model(), ["goodness"], num_hidden_layers=1)
    model.config.base_model = None
    with pytest.raises(ValueError, match="names no base model"):
        trainer(model, tmp_path, {"goodness": goodness})


def test_the_folder_of_a_value_model_is_that_model(trained, tmp_path):
    _, _, folder = trained
    made = trainer(str(folder), tmp_path)
    torch.testing.assert_close(
        made.model.state_dict(), MAVISValueModel.load(str(folder)).state_dict()
    )


def test_what_is_neither_a_value_model_nor_a_name_is_refused(base_model, tmp_path):
    with pytest.raises(TypeError, match="got LlamaForCausalLM: of a loaded base model, give the"):
        trainer(make_model(), tmp_path)
    with pytest.raises(
        ValueError, match=r"is a folder without config\.json, and so neither a base"
    ):
        trainer(str(tmp_path), tmp_path)
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="must be a MAVISConfig, got TrainingArguments"):
        MAVISTrainer(base_model, args, REWARDS, prompts(2))


def test_the_chat_template_is_told_what_serving_tells_it(base_model, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if word %}{{ word }} {% endif %}" + tokenizer.chat_template
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": "a b"}]]})

    def ids(**fields):
        args = config(tmp_path, **fields)
        made = MAVISTrainer(base_model, args, REWARDS, data, processing_class=tokenizer)
        return made._sources.prompt_ids["train"][0]

    red = VOCABULARY.index("red")
    assert ids(chat_template_kwargs={"word": "red"}) == [red, *ids()]
    assert ids(chat_template_kwargs='{"word": "red"}') == [red, *ids()]  # from a command line


def test_a_prompt_that_begins_with_its_first_token_gets_no_second_one(base_model, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<user>"
    user = VOCABULARY.index("<user>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<user> $A", special_tokens=[("<user>", user)]
    )
    data = Dataset.from_dict({"prompt": ["a b", "<user> a b"]})
    made = MAVISTrainer(base_model, config(tmp_path), REWARDS, data, processing_class=tokenizer)
    a, b = (VOCABULARY.index(word) for word in "ab")
    assert list(made._sources.prompt_ids["train"]) == [[user, a, b]] * 2


def test_conversational_prompts_and_columns_reach_the_rewards(base_model, tmp_path):
    seen = []

    def spy(prompts, completions, source, **kwargs):
        seen.extend(zip(prompts, completions, source))
        return goodness(completions)

    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": w}], "source": w} for w in "abc"]
    )
    made = trainer(base_model, tmp_path, {"goodness": spy}, data)
    made.collect_rollouts()
    for prompt, completion, source in seen:
        assert prompt == [{"role": "user", "content": source}]
        assert completion[0]["role"] == "assistant" and "<end>" not in completion[0]["content"]
    tree = read_rollouts(tmp_path / "rollouts" / "train")[0]
    assert tree.nodes[0].tokens == make_tokenizer()("<user> a <assistant>")["input_ids"]


def test_failing_reward_function_leaves_rollouts_to_resume_from(base_model, tmp_path):
    def flaky(completions, **kwargs):
        if flaky.broken:
            raise ConnectionError("no judge")
        return goodness(completions)

    flaky.broken = True
    with pytest.raises(RuntimeError, match="'flaky' raised ConnectionError: no judge"):
        trainer(base_model, tmp_path, {"flaky": flaky}).train()
    kept = list(read_rollouts(tmp_path / "rollouts" / "train"))
    assert len(kept) == 8
    flaky.broken = False
    made = trainer(base_model, tmp_path, {"flaky": flaky}, num_train_epochs=1)
    made._collection.make_sampler = None  # nothing is left to sample
    made.train()
    assert [t.nodes for t in read_rollouts(tmp_path / "rollouts" / "train")] == [
        t.nodes for t in kept
    ]


def test_same_seed_same_model(base_model, tmp_path):
    states = []
    for name in ("a", "b"):
        made = trainer(base_model, tmp_path / name, num_train_epochs=1)
        made.train()
        states.append(made.model.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


class TestBadInput:
    def test_dataset(self, base_model, tmp_path):
        with pytest.raises(ValueError, match="`train_dataset` is empty"):
            trainer(base_model, tmp_path, data=Dataset.from_dict({"prompt": []}))
        with pytest.raises(ValueError, match=r"column 'prompt', it has \['text'\]"):
            trainer(base_model, tmp_path, data=Dataset.from_dict({"text": ["a"]}))
        with pytest.raises(TypeError, match=r"`train_dataset` must be a `datasets\.Dataset`"):
            trainer(base_model, tmp_path, data=["a"])
        with pytest.raises(ValueError, match="`eval_dataset` is empty"):
            trainer(base_model, tmp_path, eval_dataset=Dataset.from_dict({"prompt": []}))

    def test_prompt_beyond_the_context(self, base_model, tmp_path):
        long = Dataset.from_dict({"prompt": ["a b", "c " * 117 + "d"]})
        with pytest.raises(ValueError, match=r"row 1 .* 118 tokens, 1 to 116 .*'c c"):
            trainer(base_model, tmp_path, data=long)
        with pytest.raises(ValueError, match=r"row 0 .* 2 tokens, 1 to 1 .*max_prompt_length=1"):
            trainer(base_model, tmp_path, data=long, max_prompt_length=1)

    def test_completions_that_leave_no_room_for_a_prompt(self, base_model, tmp_path):
        message = "`max_completion_length` is 128, which leaves no room .* context of 128 tokens"
        with pytest.raises(ValueError, match=message):
            trainer(base_model, tmp_path, max_completion_length=128)

    def test_conversation_without_a_chat_template(self, base_model, tmp_path):
        data = Dataset.from_list([{"prompt": [{"role": "user", "content": "a"}]}])
        with pytest.raises(ValueError, match="no chat template"):
            MAVISTrainer(
                base_model, config(tmp_path), REWARDS, data,
                processing_class=make_tokenizer(chat_template=False),
            )  # fmt: skip

    @pytest.mark.parametrize("rewards", [{}, []])
    def test_reward_funcs(self, base_model, tmp_path, rewards):
        with pytest.raises(ValueError, match="`reward_funcs` must be a non-empty dict"):
            trainer(base_model, tmp_path, rewards)

    def test_other_tokenizer(self, base_model, tmp_path):
        model = MAVISValueModel.from_base_model(
            base_model, list(REWARDS), num_hidden_layers=1, tokenizer=make_tokenizer()
        )
        other = make_tokenizer()
        other.add_tokens(["new"])
        with pytest.raises(ValueError, match="another vocabulary"):
            MAVISTrainer(model, config(tmp_path), REWARDS, prompts(2), processing_class=other)

    def test_backbone_that_ignores_the_mask(self, base_model, tmp_path, monkeypatch):
        made = trainer(base_model, tmp_path)
        backbone = made.model.backbone
        forward = backbone.forward
        monkeypatch.setattr(
            backbone, "forward", lambda **kwargs: forward(**{**kwargs, "attention_mask": None})
        )
        with pytest.raises(ValueError, match="'llama' does not follow the mask of a tree"):
            made.train()

    @pytest.mark.parametrize(
        "field",
        [
            {"layers": 0},
            {"top_k": -1},
            {"temperature": 0.0},
            {"leaf_fraction": 1.5},
            {"head_type": "none"},
            {"head_type": "action"},
            {"action_rank": 0},
            {"top_p": 0.0},
            {"top_p": 0.9, "top_k": 18, "num_iterations": 2},
        ],
    )
    def test_config(self, tmp_path, field):
        with pytest.raises(ValueError, match=f"`{next(iter(field))}`"):
            config(tmp_path, **field)


def test_datasets_that_cannot_be_sampled_are_named(base_model, tmp_path):
    data = Dataset.from_dict({"prompt": ["a", None, "b"]})
    with pytest.raises(ValueError, match=r"row 1 of `train_dataset` has no prompt.*dataset.filter"):
        trainer(base_model, tmp_path, data=data)
    with pytest.raises(ValueError, match=r"has \['prompts'\]: `dataset.rename_column`"):
        trainer(base_model, tmp_path, data=Dataset.from_dict({"prompts": ["a"]}))
    data = Dataset.from_dict({"prompt": ["a", "b"], "completions": ["a", "b"]})
    with pytest.raises(ValueError, match="has a column 'completions', by which"):
        trainer(base_model, tmp_path, data=data).collect_rollouts()


def test_what_values_are_not_for_says_what_to_do(base_model, tmp_path):
    with pytest.raises(ValueError, match="`remove_unused_columns` must be False"):
        config(tmp_path, remove_unused_columns=True)
    with pytest.raises(NotImplementedError, match="give prompts to the trainer as `eval_dataset`"):
        trainer(base_model, tmp_path).predict(prompts(3))


def test_chat_template_gets_the_tools_of_a_row(base_model, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if tools %}{% for t in tools %}{{ t | length }} {{ t['name'] }} {% endfor %}{% endif %}"
        "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}"
    )
    asked = [[{"role": "user", "content": "a"}]] * 3
    tools = [[{"name": "good"}], [{"name": "bad", "description": "red"}, {"name": "blue"}], []]
    for column in (tools, list(map(json.dumps, tools))):
        data = Dataset.from_dict({"prompt": asked, "tools": column})
        made = MAVISTrainer(base_model, config(tmp_path), REWARDS, data, processing_class=tokenizer)
        seen = [tokenizer.decode(ids) for ids in made._sources.prompt_ids["train"]]
        # A field that another row has is none of this row's.
        unknown = "<unk>"
        assert seen == [
            f"{unknown} good <user> a",
            f"{unknown} bad {unknown} blue <user> a",
            "<user> a",
        ]


def test_constant_reward_trains_with_a_warning(base_model, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("trimtab.trainers.rewards.logger.warning", warnings.append)

    def constant(completions, **kwargs):
        return [1.0] * len(completions)

    made = trainer(base_model, tmp_path, {"dull": constant}, num_train_epochs=1)
    made.train()
    assert "'dull'" in warnings[0]
    assert made.value_config.reward_mean == [1.0] and made.value_config.reward_std == [1.0]


def test_missing_vllm_names_the_extra(base_model, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModuleNotFoundError, match=r"trimtab\[vllm\]"):
        trainer(base_model, tmp_path, use_vllm=True).train()


def test_model_card_is_the_value_models_own(trained):
    made, _, folder = trained
    (folder / "README.md").unlink()
    made.create_model_card(model_name="anything")
    assert "MAVIS value model" in (folder / "README.md").read_text()


def test_default_config_suits_this_machine(tmp_path):
    made = MAVISConfig(str(tmp_path))
    assert made.bf16 and made.use_cpu is not torch.accelerator.is_available()
    assert not MAVISConfig(str(tmp_path), bf16=False).bf16


def test_config_parses_from_yaml(tmp_path):
    from trl import TrlParser

    path = tmp_path / "config.yaml"
    path.write_text(
        "output_dir: out\nlayers: 3\nuse_cpu: true\nvllm_init_kwargs:\n  enforce_eager: true\n"
    )
    (parsed,) = TrlParser((MAVISConfig,)).parse_args_and_config(
        ["--config", str(path), "--top_k", "7"]
    )
    assert (parsed.layers, parsed.top_k) == (3, 7)
    kwargs = parsed.vllm_init_kwargs
    assert (json.loads(kwargs) if isinstance(kwargs, str) else kwargs) == {"enforce_eager": True}


def plain(text):
    return re.sub(r"[`\[\]\"']|~?transformers\.", "", text).strip(".")


def test_every_field_is_documented_and_has_the_same_help():
    import dataclasses

    from transformers import TrainingArguments

    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    documentation = " ".join(MAVISConfig.__doc__.split())
    own = [f for f in dataclasses.fields(MAVISConfig) if f.name not in inherited]
    assert len(own) > 15
    for field in own:
        assert f" {field.name} (`" in documentation
        first_sentence = field.metadata["help"].split(". ")[0]
        assert plain(first_sentence) in plain(documentation)


class Hub:
    """Where the hub's API would be, which cannot be here: keeps what was uploaded."""

    def __init__(self, monkeypatch):
        self.repos = {}
        monkeypatch.setattr("transformers.trainer.hf_api", lambda: self)

    def create_repo(self, name, **kwargs):
        self.repos.setdefault(name, [])
        return types.SimpleNamespace(repo_id=name)

    def upload_folder(self, repo_id, folder_path, ignore_patterns=None, **kwargs):
        paths = [p.relative_to(folder_path) for p in Path(folder_path).rglob("*") if p.is_file()]
        kept = filter_repo_objects(map(str, paths), ignore_patterns=ignore_patterns)
        self.repos[repo_id].append({name: (Path(folder_path) / name).read_bytes() for name in kept})
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        done.set_result(None)
        return done


WHOLE = {"config.json", "model.safetensors", "README.md", "tokenizer.json"}


def test_only_the_value_model_is_pushed(base_model, tmp_path, monkeypatch):
    hub = Hub(monkeypatch)
    folder = tmp_path / "brevity"
    made = trainer(
        base_model, folder, num_iterations=2, top_k=10, layers=2, eval_dataset=prompts(2)
    )
    made.train()
    made.push_to_hub()
    assert (folder / "rollouts").is_dir() and made.args.output_dir == str(folder)
    ((name, (pushed,)),) = hub.repos.items()
    assert name == "brevity" and pushed.keys() >= WHOLE
    assert not [path for path in pushed if "/" in path or path.endswith((".bin", ".pt"))]
    assert "value model" in pushed["README.md"].decode()
    (tmp_path / "again").mkdir()
    for path, content in pushed.items():
        (tmp_path / "again" / path).write_bytes(content)
    again = MAVISValueModel.load(str(tmp_path / "again"))
    torch.testing.assert_close(again.state_dict(), made.model.state_dict())


def test_checkpoints_are_pushed_without_the_rollouts(base_model, tmp_path, monkeypatch):
    hub = Hub(monkeypatch)
    made = trainer(
        base_model, tmp_path, push_to_hub=True, hub_model_id="me/brevity", hub_always_push=True,
        save_strategy="steps", save_steps=1, num_train_epochs=1,
    )  # fmt: skip
    made.train()
    made.save_model()
    *during, last = hub.repos["me/brevity"]
    assert during and last.keys() >= WHOLE
    for pushed in during:
        assert "model.safetensors" in pushed and not [path for path in pushed if "/" in path]


def unservable(folder):
    """A base model whose attention the value engine does not follow, with the tests' tokenizer."""
    from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

    config = DiffLlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=END,
        eos_token_id=END,
    )
    torch.manual_seed(0)
    model = DiffLlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_what_could_not_be_served_is_refused_before_anything_is_sampled(tmp_path):
    base = unservable(tmp_path / "base")
    with pytest.raises(ValueError, match="a backbone of type 'diffllama' is not supported: "):
        trainer(base, tmp_path / "out")
    assert not (tmp_path / "out" / "rollouts").exists()


@pytest.mark.parametrize("head_type", ["state", "hidden"])
def test_rewards_that_do_not_apply_are_left_out(base_model, tmp_path, head_type):
    """`None`, as in TRL: of some prompts, and of some responses to others."""

    def sometimes(prompts, completions, **kwargs):
        return [
            None
            if prompt[0] in "aceg" or len(text_of(c)) % 3 == 0
            else float(text_of(c).count("g"))
            for prompt, c in zip(prompts, completions)
        ]

    def nowhere(prompts, completions, **kwargs):
        rewards = goodness(prompts=prompts, completions=completions)
        return [None if prompt[0] == "a" else r for prompt, r in zip(prompts, rewards)]

    made = trainer(
        base_model,
        tmp_path,
        {"sometimes": sometimes, "nowhere": nowhere},
        prompts(24),
        eval_dataset=prompts(10, 3),
        head_type=head_type,
        per_device_train_batch_size=1,
        num_train_epochs=1,
        top_k=18,
    )
    made.train()
    metrics = made.evaluate()
    trees = read_rollouts(tmp_path / "rollouts" / "train")
    known = [tree for tree in trees if not np.isnan(tree.values("sometimes")[0])]
    assert 0 < len(known) < len(trees) - 3
    expected = np.mean([tree.values("sometimes")[0] for tree in known])
    assert made.value_config.reward_mean[0] == pytest.approx(expected)
    unknown = {i for i in range(24) if made._sources.prompts["train"][i]["prompt"][0] == "a"}
    sequences = getattr(made.train_dataset, "sequences", None) or made.train_dataset.items
    assert len(unknown) == 3 and not unknown & {s["tree"] for s in sequences}, "nothing to learn"
    assert all(torch.isfinite(x).all() for x in made.model.parameters())
    assert np.isfinite(metrics["eval_explained_variance/sometimes"])


def test_what_reward_functions_log_is_reported(base_model, tmp_path, capsys):
    def measured(completions, log_metric, log_extra, trainer_state, **kwargs):
        log_metric("length", sum(map(len, completions)) / len(completions))
        log_extra("capital", [text.upper() for text in completions])
        assert trainer_state.global_step == 0
        return goodness(completions=completions)

    made = trainer(
        base_model, tmp_path, {"measured": measured}, prompts(6), log_completions=True,
        rollout_batch_size=3,
    )  # fmt: skip
    made.collect_rollouts()
    (logged,) = [entry["length"] for entry in made.state.log_history if "length" in entry]
    trees = made._iterations.base_trees["train"]
    decode = functools.partial(made.processing_class.decode, skip_special_tokens=True)
    texts = [[decode(tree.response(i)) for i in tree.leaves()] for tree in trees]
    batches = [[len(t) for of_tree in half for t in of_tree] for half in (texts[:3], texts[3:])]
    assert logged == pytest.approx(np.mean([np.mean(batch) for batch in batches]))
    shown = capsys.readouterr().out
    assert "capital" in shown and "measured" in shown
    assert any(word.upper() in shown for text in texts for word in text[0].split())
