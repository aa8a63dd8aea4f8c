"""Held-out judges of the demo's objectives: other lexicons and formulas than the training rewards.

    pip install afinn==0.1

None needs a download. Each has the signature of a TRL reward function.
"""

from __future__ import annotations

import math
import re
from functools import cache
from importlib.resources import files
from typing import Any

Text = str | list[dict[str, str]]


def words_of(message: Text) -> list[str]:
    text = message if isinstance(message, str) else " ".join(turn["content"] for turn in message)
    return re.findall(r"[a-z]+", text.lower())


def positivity(completions: list[Text], **kwargs: Any) -> list[float]:
    """Sum of AFINN's valences per word. Trained on: VADER."""
    lexicon = afinn()
    words = [words_of(text) for text in completions]
    return [sum(lexicon.score(word) for word in w) / max(1, len(w)) for w in words]


def readability(completions: list[Text], **kwargs: Any) -> list[float]:
    """Minus the Coleman-Liau grade: letters and sentences, not syllables. Trained on: Flesch."""
    scores = []
    for text in completions:
        raw = text if isinstance(text, str) else " ".join(turn["content"] for turn in text)
        words = max(1, len(words_of(text)))
        letters = sum(map(len, words_of(text)))
        sentences = max(1, len(re.findall(r"[.!?]+(?:\s|$)", raw)))
        scores.append(-(5.88 * letters / words - 29.6 * sentences / words - 15.8))
    return scores


def rarity(completions: list[Text], **kwargs: Any) -> list[float]:
    """Share of words outside Dale and Chall's list of 3,000 that children know.

    Trained on: the mean Zipf frequency.
    """
    known = easy_words()
    words = [words_of(text) for text in completions]
    return [sum(not is_easy(word, known) for word in w) / max(1, len(w)) for w in words]


def relevance(prompts: list[Text], completions: list[Text], **kwargs: Any) -> list[float]:
    """Share of the prompt's words that the response uses, by their rarity among the prompts.

    Words count by their first five letters. Trained on: the cosine of sentence embeddings.
    """
    asked = [{word[:5] for word in words_of(prompt)} for prompt in prompts]
    distinct = {tuple(sorted(a)) for a in asked}
    scores = []
    for words, text in zip(asked, completions):
        used = {word[:5] for word in words_of(text)}
        weight = {
            w: math.log((1 + len(distinct)) / sum(w in other for other in distinct)) for w in words
        }
        scores.append(sum(weight[w] for w in words & used) / max(sum(weight.values()), 1e-9))
    return scores


@cache
def afinn() -> Any:
    from afinn import Afinn

    return Afinn()


@cache
def easy_words() -> frozenset[str]:
    text = files("textstat").joinpath("resources/en/easy_words.txt").read_text()
    return frozenset(line.strip().lower() for line in text.splitlines())


def is_easy(word: str, known: frozenset[str]) -> bool:
    """Whether the list has a word, or what it is without a regular ending."""
    stems = [word]
    for ending, rest in (("s", ""), ("es", ""), ("ies", "y"), ("ed", ""), ("d", ""), ("ing", "")):
        if word.endswith(ending):
            stems.append(word[: -len(ending)] + rest)
    return any(stem in known for stem in stems)
