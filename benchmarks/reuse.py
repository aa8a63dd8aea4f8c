"""Whether an iteration should learn from earlier rollouts too, at equal tokens sampled.

    python benchmarks/iterations.py --head_type state --out state_iterations.json  # before it
    python benchmarks/reuse.py            # 6 minutes a seed

Iteration 1 of every seed is trained twice from the value model of iteration 0: on its own rollouts
alone, and on those of the base model as well. Both are evaluated on held-out prompts, on responses
of the base model and of the policies of iterations 0 and 1. Writes docs/reuse.json and a table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from iterations import folder_of, make_parser, make_trainer

from trimtab.plugins import MAVISValueModel
from trimtab.trainers import read_rollouts
from trimtab.trainers.packing import TreeDataset

SOURCES = {"its own rollouts": False, "all rollouts so far": True}
RESPONSES = {"base model": 0, "policy of iteration 0": 1, "policy of iteration 1": 2}


def pack(trainer: Any, rollouts: Path, split: str, iterations: list[int]) -> TreeDataset:
    """What the trainer makes of the rollouts of some iterations."""
    trees = []
    for iteration in iterations:
        own = [f"iteration-{iteration}/{name}/{split}" for name in trainer.objectives]
        for place in own if iteration else [split]:
            trees += read_rollouts(rollouts / place)
    return TreeDataset(
        trees,
        trainer.objectives,
        np.array(trainer.value_config.reward_mean),
        np.array(trainer.value_config.reward_std),
        trainer.args.max_length,
        leaf_fraction=trainer.args.leaf_fraction if split == "train" else 1.0,
        seed=trainer.args.seed,
        kl_penalty=trainer.args.kl_penalty,
    )


def measure(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """By source of the training, explained variances on every kind of response."""
    folder = folder_of(seed, args)
    found: dict[str, Any] = {}
    for source, reused in SOURCES.items():
        with tempfile.TemporaryDirectory() as scratch:
            trainer = make_trainer(
                seed,
                args,
                model=MAVISValueModel.load(str(folder / "iteration-0/value_model")).float(),
                output_dir=scratch,
                num_iterations=1,
                rollout_dir=str(folder / "rollouts"),
            )
            trainer.collect_rollouts()  # they are there
            iterations = [0, 1] if reused else [1]
            trainer.train_dataset = pack(trainer, folder / "rollouts", "train", iterations)
            trainer.train()
            found[source] = {}
            for responses, iteration in RESPONSES.items():
                dataset = pack(trainer, folder / "rollouts", "eval", [iteration])
                metrics = trainer.evaluate(dataset)
                found[source][responses] = {
                    name: metrics[f"eval_explained_variance/{name}"] for name in trainer.objectives
                }
    return found


def table(seeds: list[dict[str, Any]]) -> str:
    """Markdown: explained variances, medians over the seeds."""
    names = list(next(iter(next(iter(seeds[0].values())).values())))
    lines = [
        f"| responses of | trained on | {' | '.join(names)} |",
        "| --- | --- |" + " --- |" * len(names),
    ]
    for responses in RESPONSES:
        for source in SOURCES:
            cells = [f"{np.median([s[source][responses][n] for s in seeds]):.2f}" for n in names]
            lines.append(f"| {responses} | {source} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args = make_parser(__doc__ or "", "docs/reuse.json", "state").parse_args()
    seeds = [measure(seed, args) for seed in args.seeds]
    args.out.write_text(json.dumps({"seeds": seeds}, indent=2) + "\n")
    text = table(seeds)
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
