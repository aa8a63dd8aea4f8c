"""A judge that training never saw: a language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..statistics import interval, prompt_draws
from .points import Point, single_objective


def judge_points(
    judge: PairwiseJudge,
    criteria: Mapping[str, str],
    points: Sequence[Point],
    prompts: Sequence[Any],
    baseline: str = "unguided",
    draws: int = 2000,
) -> list[dict[str, Any]]:
    """
    Win rates over the baseline, of the points with all weight on one objective.

    Args:
        judge ([`PairwiseJudge`]):
            Language model that compares.
        criteria (`dict[str, str]`):
            What to ask for each objective, for example `{"positivity": "is more positive"}`.
        points (`list[Point]`):
            Of [`sweep`], the baseline's among them.
        prompts (`list`):
            Of the sweep.
        baseline (`str`, *optional*, defaults to `"unguided"`):
            Method to compare with.
        draws (`int`, *optional*, defaults to `2000`):
            Bootstrap samples of the prompts.

    Returns:
        `list[dict[str, Any]]`: `method`, `strength`, `objective`, and the win rate, ties half, with
        its 95 % interval: `value`, `low` and `high`.

    Raises:
        ValueError: `baseline` is the method of no point.

    Example:

    ```python
    >>> from trimtab.trainers import PairwiseJudge, judge_points, sweep
    >>> judge = PairwiseJudge("http://localhost:8000/v1", "my-judge", "judgements.jsonl")
    >>> points = sweep(
    ...     policies, prompts["prompt"], [{"brief": 1.0}], {"brief": brief}, folder="sweep"
    ... )
    >>> (row,) = judge_points(judge, {"brief": "is shorter"}, points, prompts["prompt"])
    >>> row["method"], row["objective"], row["value"]
    ('guided', 'brief', 1.0)
    ```
    """
    base = next((point for point in points if point.method == baseline), None)
    if base is None:
        raise ValueError(f"`baseline` is the method of no point: {baseline!r}")
    order = prompt_draws(len(prompts), draws)
    rows = []
    for point in points:
        objective = single_objective(point.weights)
        if objective is None or objective not in criteria:
            continue
        wins = [
            judge.compare(
                criteria[objective], prompts, [r.text for r in ours], [r.text for r in plain]
            )
            for ours, plain in zip(point.responses, base.responses)
        ]
        rows.append(
            {
                "method": point.method,
                "strength": point.strength,
                "objective": objective,
                **interval(np.array(wins).mean(0)[order].mean(-1)),
            }
        )
    return rows


class PairwiseJudge:
    """
    A language model that says which of two responses meets a criterion better.

    Each pair is asked in both orders. A response wins only if both answers name it; answers that
    disagree are a tie, which cancels a preference for the first or the second place. Answers are
    kept on disk: a question is asked once.

    Args:
        base_url (`str`):
            An OpenAI-compatible endpoint, for example `"http://localhost:8000/v1"`.
        model (`str`):
            Name of the model there.
        cache (`str` or `Path`):
            File of the answers, a JSON object in each line.
        api_key (`str`, *optional*, defaults to `"none"`):
            Key of the endpoint.
        concurrency (`int`, *optional*, defaults to `8`):
            Number of questions that wait at once.
        max_retries (`int`, *optional*, defaults to `5`):
            Of a question, with growing pauses.

    Raises:
        ValueError: `concurrency` is below 1.

    Example:

    ```python
    >>> from trimtab.trainers import PairwiseJudge
    >>> judge = PairwiseJudge("http://localhost:8000/v1", "my-judge", "judgements.jsonl")
    >>> guided, unguided = ["A drink.", "Rails."], ["It is a drink.", "Steel."]
    >>> wins = judge.compare("is shorter", ["What is tea?", "What are tracks?"], guided, unguided)
    >>> float(wins.mean())  # the win rate: one won, one tied
    0.75
    ```
    """

    TEMPLATE = (
        "Two assistants answered the same prompt.\n\nPrompt:\n{prompt}\n\nAnswer A:\n{a}\n\n"
        "Answer B:\n{b}\n\nWhich answer {criterion}? Reply with one word: A, B or tie."
    )

    def __init__(
        self,
        base_url: str,
        model: str,
        cache: str | Path,
        api_key: str = "none",
        concurrency: int = 8,
        max_retries: int = 5,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"`concurrency` must be at least 1, got {concurrency}")
        self.base_url = base_url
        self.model = model
        self.cache = Path(cache)
        self.api_key = api_key
        self.concurrency = concurrency
        self.max_retries = max_retries

    def compare(
        self, criterion: str, prompts: Sequence[Any], first: Sequence[str], second: Sequence[str]
    ) -> np.ndarray:
        """
        Compares two responses to each prompt.

        Args:
            criterion (`str`):
                Ends the question "Which answer …?", for example `"is more positive"`.
            prompts (`list`):
                Strings, or conversations, whose last message is shown.
            first (`list[str]`):
                Responses.
            second (`list[str]`):
                The other responses.

        Returns:
            `np.ndarray`: `[n]` float64: 1 where `first` wins, 0 where it loses, 0.5 for a tie.

        Raises:
            ValueError: `prompts`, `first` and `second` are not of one length.
            ModuleNotFoundError: openai is not installed.
            openai.OpenAIError: The endpoint refuses, or fails `max_retries` times; answers that
                came are kept.
        """
        if not len(prompts) == len(first) == len(second):
            raise ValueError(
                "`prompts`, `first` and `second` must be of one length, got "
                f"{len(prompts)}, {len(first)} and {len(second)}"
            )
        shown = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
        questions = [
            self.TEMPLATE.format(prompt=prompt, a=a, b=b, criterion=criterion)
            for prompt, one, other in zip(shown, first, second)
            for a, b in ((one, other), (other, one))
        ]
        answers = asyncio.run(self._ask(questions))
        wins = np.full(len(prompts), 0.5)
        for i, pair in enumerate(zip(answers[::2], answers[1::2])):
            if pair == ("A", "B"):
                wins[i] = 1.0
            elif pair == ("B", "A"):
                wins[i] = 0.0
        return wins

    async def _ask(self, questions: Sequence[str]) -> list[str]:
        """`"A"`, `"B"` or `"tie"` for every question, from the cache where it is there."""
        try:
            from openai import AsyncOpenAI
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "PairwiseJudge needs openai; pip install openai", name="openai"
            ) from error

        def key(question: str) -> str:
            return hashlib.sha256(json.dumps([self.model, question]).encode()).hexdigest()

        text = self.cache.read_text() if self.cache.exists() else ""
        complete = text[: text.rfind("\n") + 1]  # without the line that an interruption cut off
        if complete != text:
            self.cache.write_text(complete)
        known = {row["question"]: row["answer"] for row in map(json.loads, complete.splitlines())}
        open_questions = [q for q in dict.fromkeys(questions) if key(q) not in known]
        gate = asyncio.Semaphore(self.concurrency)

        async def one(client: Any, question: str) -> tuple[str, str]:
            async with gate:
                reply = await client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "user", "content": question}],
                    temperature=0.0,
                    max_tokens=8,
                )
            return key(question), verdict(reply.choices[0].message.content or "")

        if open_questions:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            async with AsyncOpenAI(
                base_url=self.base_url, api_key=self.api_key, max_retries=self.max_retries
            ) as client:
                tasks = [asyncio.create_task(one(client, q)) for q in open_questions]
                with self.cache.open("a") as out:
                    for task in tqdm(asyncio.as_completed(tasks), total=len(tasks), desc="Judging"):
                        question, answer = await task
                        known[question] = answer
                        out.write(json.dumps({"question": question, "answer": answer}) + "\n")
                        out.flush()
        return [known[key(question)] for question in questions]


def verdict(reply: str) -> str:
    """
    Reads a judge's reply.

    Args:
        reply (`str`):
            What the judge wrote.

    Returns:
        `str`: `"A"` or `"B"` if the reply names one of them and not the other, else `"tie"`.
    """
    named = set(re.findall(r"\b[AB]\b", reply))
    return named.pop() if len(named) == 1 else "tie"
