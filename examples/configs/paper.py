"""Prompts and reward functions of the three settings of the MAVIS paper (arXiv 2508.13415).

    python examples/configs/paper.py hh_rlhf    # or summarize_from_feedback, safe_rlhf

writes the prompts that `hh_rlhf.yaml` beside this file names, as JSON lines with a column `split`.
Data sets and reward models are those of the authors' code, github.com/5-Jeremy/MAVIS.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROMPTS, HELD_OUT = 4000, 100
POSTS = range(101, 1200)  # characters of a post that is summarised
INSTRUCTION = "### Instruction: Generate a one-sentence summary of this post. ### Input: "
ANSWER = " ### Response: "


def hh_rlhf(row: dict[str, Any]) -> str | None:
    """The first question of a dialogue of Anthropic/hh-rlhf."""
    question, found, _ = row["chosen"].partition("Assistant:")
    return f"{question}{found} " if found else None


def summarize_from_feedback(row: dict[str, Any]) -> str | None:
    """The post of a comparison of openai/summarize_from_feedback, as the summariser is asked."""
    post = row["info"]["post"]
    if post is None or len(post) not in POSTS:
        return None
    return INSTRUCTION + post.replace("\n", " ") + ANSWER


def safe_rlhf(row: dict[str, Any]) -> str | None:
    """A question of PKU-Alignment/PKU-SafeRLHF-10K, in the form of the Alpaca that answers."""
    return f"BEGINNING OF CONVERSATION: USER: {row['prompt']} ASSISTANT:"


# Data set, arguments of `load_dataset`, splits to train on and to hold out, prompt of a row
SETTINGS: dict[str, tuple[str, dict[str, str], tuple[str, str], Any]] = {
    "hh_rlhf": ("Anthropic/hh-rlhf", {}, ("train", "test"), hh_rlhf),
    "summarize_from_feedback": (
        "openai/summarize_from_feedback",
        {"name": "comparisons"},
        ("train", "validation"),
        summarize_from_feedback,
    ),
    "safe_rlhf": (
        "PKU-Alignment/PKU-SafeRLHF-10K",
        {},
        ("train[:8000]", "train[8500:]"),
        safe_rlhf,
    ),
}


def prompts_of(
    rows: Any, prompt_of: Any, tokenizer: Any, longest: int, count: int
) -> Iterator[str]:
    """The first distinct prompts that are not too long."""
    seen: set[str] = set()
    for row in rows:
        prompt = prompt_of(row)
        if prompt is None or prompt in seen or len(tokenizer(prompt)["input_ids"]) > longest:
            continue
        seen.add(prompt)
        yield prompt
        if len(seen) == count:
            return


def write_prompts(setting: str) -> None:
    """Downloads a setting's data and writes the file that its configuration names."""
    import yaml
    from datasets import load_dataset
    from transformers import AutoTokenizer

    config = yaml.safe_load((HERE / f"{setting}.yaml").read_text())
    name, arguments, splits, prompt_of = SETTINGS[setting]
    tokenizer = AutoTokenizer.from_pretrained(config["model_name_or_path"])
    path = Path(config["dataset_name"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for split, of, count in zip(("train", "test"), splits, (PROMPTS, HELD_OUT)):
            rows = load_dataset(name, split=of, **arguments)
            longest = config["max_prompt_length"]
            for prompt in prompts_of(rows, prompt_of, tokenizer, longest, count):
                file.write(json.dumps({"prompt": prompt, "split": split}) + "\n")


@functools.cache
def classifier(name: str) -> tuple[Any, Any]:
    """A sequence classifier and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForSequenceClassification.from_pretrained(name).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def logits(name: str, texts: list[Any], output: int, size: int = 16) -> list[float]:
    """One output of a classifier of texts, or of pairs of texts."""
    import torch

    model, tokenizer = classifier(name)
    found: list[float] = []
    for start in range(0, len(texts), size):
        batch = tokenizer(
            texts[start : start + size],
            padding=True,
            padding_side="right",
            truncation=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            found += model(**batch).logits[:, output].tolist()
    return found


def humor(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    """How funny a dialogue is, by the classifier's second output."""
    texts = [prompt + completion for prompt, completion in zip(prompts, completions)]
    return logits("mohameddhiab/humor-no-humor", texts, 1)


def post_of(prompt: str) -> str:
    return prompt.removeprefix(INSTRUCTION).removesuffix(ANSWER)


def summary(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    """How good a summary is, by a reward model that reads it before the post."""
    pairs = zip(prompts, completions)
    texts = [f"{text.strip()} <|endoftext|> {post_of(prompt)}" for prompt, text in pairs]
    return logits("Tristan/gpt2_reward_summarization", texts, 0)


def faithful(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    """How faithful a summary is to its post, by the classifier's second output."""
    pairs = [[text.strip(), post_of(prompt)] for prompt, text in zip(prompts, completions)]
    return logits("CogComp/bart-faithful-summary-detector", pairs, 1)


@functools.cache
def beaver(name: str) -> tuple[Any, Any]:
    """A reward or cost model of Safe RLHF, whose class is in a package of its own."""
    try:
        from safe_rlhf.models import AutoModelForScore
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the models of Safe RLHF need its code: install github.com/PKU-Alignment/safe-rlhf"
        ) from error
    from transformers import AutoTokenizer

    model = AutoModelForScore.from_pretrained(name, dtype="auto").eval()
    return model, AutoTokenizer.from_pretrained(name)


def scores(name: str, prompts: list[str], completions: list[str]) -> list[float]:
    """Of whole dialogues, one by one: a model of 7 billion parameters."""
    import torch

    model, tokenizer = beaver(name)
    found = []
    for prompt, completion in zip(prompts, completions):
        with torch.inference_mode():
            read = model(**tokenizer(prompt + completion, return_tensors="pt"))
        found.append(float(read.end_scores[0, 0]))
    return found


def safe_helpful(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    """Helpfulness, by the reward model of Safe RLHF."""
    return scores("PKU-Alignment/beaver-7b-v1.0-reward", prompts, completions)


def safe_harmless(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    """Harmlessness: the cost model of Safe RLHF, turned round."""
    return [-x for x in scores("PKU-Alignment/beaver-7b-v1.0-cost", prompts, completions)]


REWARDS: tuple[Any, ...] = (humor, summary, faithful, safe_helpful, safe_harmless)
for function in REWARDS:
    function.version = "1"  # the weights behind a hub id are not compared

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in SETTINGS:
        raise SystemExit(f"usage: python {sys.argv[0]} {'|'.join(SETTINGS)}")
    write_prompts(sys.argv[1])
