"""Policies whose rewards can be read off the text: "red 0.5 blue 1.5"."""

import re

import numpy as np

from trimtab.trainers import Policy, Response, evaluate, sweep

OBJECTIVES = ("red", "blue")
PROMPTS = [f"prompt {i}" for i in range(6)]


def red(completions, **kwargs):
    return [float(re.search(r"red (\S+)", text)[1]) for text in completions]


def blue(completions, **kwargs):
    return [float(re.search(r"blue (\S+)", text)[1]) for text in completions]


def against_red(completions, **kwargs):
    return [-value for value in red(completions)]


REWARDS = {"red": red, "blue": blue}
ASKED = {
    "kl_budgets": [5.0, 20.0],
    "against": ("strong", 1.0),
    "draws": 200,
    "references": (1.0, 3.0),
}
WEIGHTS = [{"red": 1.0}, {"red": 0.5, "blue": 0.5}, {"blue": 1.0}]


def noise(i, seed, offset):
    return float(np.random.default_rng([i, seed, offset]).normal())


def respond_with(gain, kl=None, calls=None):
    def respond(prompts, weights, seed):
        if calls is not None:
            calls[tuple(weights.items()), seed] += 1
        responses = []
        for i in range(len(prompts)):
            # The same noise for every method: differences between them are exact.
            r = noise(i, seed, 0) + gain * weights.get("red", 0.0)
            b = noise(i, seed, 1) + gain * weights.get("blue", 0.0)
            responses.append(Response(f"red {r} blue {b}", [1, 2, 3], log_ratio=kl, kl=kl))
        return responses

    return respond


def policies(calls=None):
    return [
        Policy("unguided", respond_with(0.0, 0.0, calls), weights=[{}]),
        Policy("weak", respond_with(1.0, 2.0, calls), strength=1),
        Policy("weak", respond_with(2.0, 8.0, calls), strength=2),
        Policy("strong", respond_with(2.0, calls=calls), kl_bound=4.0, seeds=1),
    ]


def evaluated(folder):
    """What `evaluate` finds of all of them, and the points."""
    points = sweep(
        policies(), PROMPTS, WEIGHTS, REWARDS, folder, seeds=2,
        judges={"red": against_red, "blue": blue},
    )  # fmt: skip
    return evaluate(points, **ASKED), points
