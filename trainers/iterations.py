"""What an iteration of MAVIS has gained: reward, KL and the regularised objective of its policy.

Iteration `n` samples from the policy of iteration `n - 1`. With exact values it ends with a policy
of a higher `reward - KL / beta` (arXiv 2508.13415, section 4); with learnt ones that has to be
measured, and this file does, on held-out prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.plugins.value_config import load_config

from .statistics import interval, prompt_draws
from .trees import Tree


def guidance_fingerprint(folder: str | Path) -> str:
    """Tells the policies of a value model from another's: a hash of its weights and its scale."""
    digest = hashlib.sha256()
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{str(folder)!r} has no weights")
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    if (Path(folder) / "config.json").exists():  # an adapter to train on has none
        digest.update(json.dumps(load_config(str(folder)).candidate_scale).encode())
    return digest.hexdigest()[:16]


class PolicyHistory:
    """
    Measures of the policies of all iterations, the base model's first.

    Every second prompt is held back to choose the best iteration on; the measures are those on the
    others. A single prompt serves both. Prompts without a reward of an objective are left out of
    its measures.

    Args:
        beta (`float`):
            Of the regularised objective `reward - KL / beta`.
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.policies: list[dict[str, Any]] = []  # by objective
        self.prompts = {"chosen on": 0, "reported on": 0}
        self._objectives: list[dict[str, np.ndarray]] = []  # each prompt's, of every policy
        self._choices: list[float] = []  # mean objective on the prompts held back

    def add(
        self,
        trees: Mapping[str, Sequence[Tree]],
        mean: Sequence[float] | np.ndarray,
        std: Sequence[float] | np.ndarray,
    ) -> None:
        """
        Adds a policy.

        Args:
            trees (`dict[str, list[Tree]]`):
                For every objective, rollouts of the policy of that objective alone, of the same
                prompts as those of the other policies.
            mean (`list[float]`):
                Of every objective's reward, as in the value model.
            std (`list[float]`):
                Of every objective's reward.
        """
        count = len(next(iter(trees.values())))
        held_back = np.arange(count) % 2 == 1
        reported = ~held_back if count > 1 else np.ones(1, dtype=bool)
        held_back = held_back if count > 1 else reported
        self.prompts = {"chosen on": int(held_back.sum()), "reported on": int(reported.sum())}
        draws = prompt_draws(int(reported.sum()))
        policy: dict[str, Any] = {}
        regularised = {}
        for (name, of_objective), m, s in zip(trees.items(), mean, std):
            reward = np.array([(tree.values(name)[0] - m) / s for tree in of_objective])
            kl = np.array([tree.kl() for tree in of_objective])
            regularised[name] = reward - kl / self.beta
            measured = {"reward": reward, "kl": kl, "objective": regularised[name]}
            if self._objectives:
                measured["improvement"] = regularised[name] - self._objectives[-1][name]
            policy[name] = {
                k: interval(np.nanmean(x[reported][draws], 1)) for k, x in measured.items()
            }
        self.policies.append(policy)
        self._objectives.append(regularised)
        self._choices.append(
            float(np.mean([np.nanmean(x[held_back]) for x in regularised.values()]))
        )

    def best(self) -> int:
        """The iteration whose policies have the highest mean objective on prompts held back."""
        return int(np.argmax(self._choices[1:]))

    def warnings(self) -> list[str]:
        """What to say of objectives that the last iteration did not improve."""
        messages = []
        for name, measured in self.policies[-1].items():
            gained = measured["improvement"]
            if gained["value"] > 0:
                continue
            messages.append(
                f"iteration {len(self.policies) - 2} did not improve the regularised objective of "
                f"{name!r} (reward - KL / beta, beta={self.beta:g}): it changed by "
                f"{gained['value']:.3g} [{gained['low']:.3g}, {gained['high']:.3g}], at a KL of "
                f"{measured['kl']['value']:.3g} nats. More prompts or larger trees (`layers`) make "
                "values less noisy; a smaller `beta` keeps the policy nearer to the responses "
                "that the values were learnt from"
            )
        return messages

    def to_json(self) -> dict[str, Any]:
        """All measures, each with its 95 % bootstrap interval over the prompts."""
        return {
            "beta": self.beta,
            "prompts": self.prompts,
            "choice": self._choices[1:],
            "policies": self.policies,
        }

    def write(self, folder: Path) -> None:
        """Writes `iterations.json`, and `iterations.png` if matplotlib is installed."""
        (folder / "iterations.json").write_text(json.dumps(self.to_json(), indent=2) + "\n")
        if find_spec("matplotlib"):
            plot_policies(self.policies, self.beta, folder / "iterations.png")


def plot_policies(policies: Sequence[dict[str, Any]], beta: float, path: Path) -> None:
    """
    Plots the regularised objective, the reward and the KL of every iteration's policies.

    Args:
        policies (`list[dict]`):
            Of a [`PolicyHistory`].
        beta (`float`):
            Of the regularised objective.
        path (`Path`):
            PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    labels = ["base", *map(str, range(len(policies) - 1))]
    titles = {
        "objective": f"reward - KL / {beta:g}",
        "reward": "reward (the base model's deviations within a prompt)",
        "kl": "KL to the base model (nats a response)",
    }
    for axis, (measure, title) in zip(axes, titles.items()):
        for name in policies[0]:
            points = [policy[name][measure] for policy in policies]
            values = np.array([p["value"] for p in points])
            ends = np.array([[p["low"], p["high"]] for p in points]).T
            axis.errorbar(labels, values, np.abs(ends - values), marker="o", capsize=3, label=name)
        axis.set_xlabel("iteration")
        axis.set_title(title, fontsize=10)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
