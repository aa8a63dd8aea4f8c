"""The configurations of the paper's settings: read as `trimtab train` reads them, offline."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import BertConfig, BertForSequenceClassification

from trimtab.trainers.cli import load_reward_func, parse

from .conftest import VOCABULARY, make_tokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "configs"
SETTINGS = {
    "hh_rlhf": ["helpful", "harmless", "humor"],
    "summarize_from_feedback": ["summary", "faithful"],
    "safe_rlhf": ["helpful", "harmless"],
}
POST = "what a day " * 20


@pytest.fixture(scope="module")
def paper():
    spec = importlib.util.spec_from_file_location("paper_of_test", FOLDER / "paper.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield
    sys.modules.pop("paper", None)


def test_each_configuration_is_tested(paper):
    assert {path.stem for path in FOLDER.glob("*.yaml")} == SETTINGS.keys() == paper.SETTINGS.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_configurations_are_what_the_command_takes(name):
    path = FOLDER / f"{name}.yaml"
    script, args, model, folder = parse("train", ["--config", str(path)])
    given = yaml.safe_load(path.read_text())
    for key, value in given.items():
        found = [getattr(x, key) for x in (script, args, model) if hasattr(x, key)]
        assert found == [value], key
    assert args.head_type == "hidden" and args.max_prompt_length
    funcs = dict(load_reward_func(spec, (".", folder)) for spec in script.reward_funcs)
    assert list(funcs) == SETTINGS[name]
    assert all(isinstance(func, str) or func.version == "1" for func in funcs.values())
    assert f"paper.py {name} " in path.read_text()


def test_the_papers_form_is_taken_too(tmp_path):
    text = (FOLDER / "hh_rlhf.yaml").read_text()
    path = tmp_path / "state.yaml"
    path.write_text(re.sub(r"^# (\w+: .*)$", r"\1", text, flags=re.MULTILINE))
    _, args, model, _ = parse("train", ["--config", str(path)])
    assert args.head_type == "state" and args.learning_rate == 2e-5
    assert model.use_peft and (model.lora_r, model.lora_alpha) == (128, 256)


@pytest.mark.parametrize(
    ("setting", "row", "expected"),
    [
        (
            "hh_rlhf",
            {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: No.\n\nAssistant: Oh."},
            "\n\nHuman: Hi?\n\nAssistant: ",
        ),
        ("hh_rlhf", {"chosen": "\n\nHuman: Hi?"}, None),
        ("summarize_from_feedback", {"info": {"post": "too short"}}, None),
        ("summarize_from_feedback", {"info": {"post": None}}, None),
        ("safe_rlhf", {"prompt": "Hi?"}, "BEGINNING OF CONVERSATION: USER: Hi? ASSISTANT:"),
    ],
)
def test_prompts_of_rows(paper, setting, row, expected):
    assert paper.SETTINGS[setting][-1](row) == expected


def test_a_posts_prompt_is_taken_apart_again(paper):
    prompt = paper.summarize_from_feedback({"info": {"post": POST + "\nend"}})
    assert "\n" not in prompt and paper.post_of(prompt) == POST + " end"


def test_prompts_are_distinct_and_short(paper):
    rows = [{"prompt": text} for text in ("a", "a", "a b c", "b", "c")]
    found = paper.prompts_of(rows, lambda row: row["prompt"], make_tokenizer(), 2, count=2)
    assert list(found) == ["a", "b"]


def test_rewards_are_those_of_each_text_by_itself(paper, monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(VOCABULARY), intermediate_size=16, **sizes)
    model, tokenizer = BertForSequenceClassification(config).eval(), make_tokenizer()
    monkeypatch.setattr(paper, "classifier", lambda name: (model, tokenizer))
    prompts = [paper.INSTRUCTION + "a b" + paper.ANSWER, paper.INSTRUCTION + "c" + paper.ANSWER] * 9
    completions = [" good red", " bad"] * 9

    def alone(text, output):
        ids = torch.tensor([tokenizer(text).input_ids])
        return model(ids).logits[0, output].item()

    for func, texts, output in (
        (paper.humor, [p + c for p, c in zip(prompts, completions)], 1),
        (paper.faithful, ["good red a b", "bad c"] * 9, 1),
        (paper.summary, ["good red <|endoftext|> a b", "bad <|endoftext|> c"] * 9, 0),
    ):
        found = func(prompts=prompts, completions=completions)
        assert found == pytest.approx([alone(text, output) for text in texts], abs=1e-5)


def test_a_cost_is_turned_round(paper, monkeypatch):
    monkeypatch.setattr(paper, "scores", lambda name, prompts, completions: [2.0, -1.0])
    assert paper.safe_harmless(prompts=["a"] * 2, completions=["b"] * 2) == [-2.0, 1.0]
    assert paper.safe_helpful(prompts=["a"] * 2, completions=["b"] * 2) == [2.0, -1.0]
