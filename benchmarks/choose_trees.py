"""Whether to sample where siblings disagree most: prompts chosen by a pilot, or at random.

    python benchmarks/choose_trees.py            # after `make demo`; 10 minutes on two cores

Half of every tree of the demo's rollouts is the pilot; the prompts whose pilot has the largest
variance of rewards give their other half to train on, until half of the tokens are used, against
prompts drawn at random. Writes docs/choose_trees.json and a table: explained variance and mean
squared error on held-out rollouts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.trainers import MAVISConfig, MAVISTrainer, read_rollouts
from trimtab.trainers.cli import MAVISScriptArguments, load_prompts
from trimtab.trainers.packing import TreeDataset
from trimtab.trainers.trees import Tree

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import rewards
from smollm2 import smollm2

PROMPTS = Path(__file__).parents[1] / "examples/prompts.jsonl"
OBJECTIVES = ("positivity", "relevance", "readability", "rarity")
CHOICES = ("at random", "by disagreement")


def below(tree: Tree, children: slice) -> Tree:
    """The part of a tree that is below some of the root's children."""
    roots = [i for i, node in enumerate(tree.nodes) if node.parent == 0]
    kept = {0: 0}
    nodes = [tree.nodes[0]]
    for i, node in enumerate(tree.nodes):
        if (node.parent == 0 and i in roots[children]) or node.parent in kept.keys() - {0}:
            kept[i] = len(nodes)
            nodes.append(dataclasses.replace(node, parent=kept[node.parent]))
    columns = {name: column[list(kept)] for name, column in tree.rewards.items()}
    return Tree(tree.prompt_index, nodes, columns)


def choose(trees: list[Tree], std: np.ndarray, choice: str, seed: int) -> list[Tree]:
    """Half of the tokens of the trees' second halves."""
    order = np.random.default_rng(seed).permutation(len(trees))
    if choice == "by disagreement":
        pilots = [below(tree, slice(0, 2)) for tree in trees]
        variances = [
            np.mean([p.rewards[n][p.leaves()].var() / s**2 for n, s in zip(OBJECTIVES, std)])
            for p in pilots
        ]
        order = np.argsort(variances)[::-1]
    halves = [below(tree, slice(2, 4)) for tree in trees]
    tokens = np.array([sum(len(node.tokens) for node in half.nodes[1:]) for half in halves])
    used = np.cumsum(tokens[order])
    return [halves[i] for i in order[used <= tokens.sum() / 2]]


def measure(args: argparse.Namespace, choice: str, seed: int) -> dict[str, float]:
    """Metrics of a value model that was trained on the chosen trees."""
    prompts = load_prompts(MAVISScriptArguments(str(PROMPTS), []))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = MAVISTrainer(
            model=str(smollm2(args.artifacts / "smollm2")),
            args=MAVISConfig(
                scratch,
                rollout_dir=str(args.artifacts / "rollouts"),
                use_vllm=True,
                max_completion_length=48,
                layers=3,
                rollout_batch_size=48,
                head_type="state",
                learning_rate=4e-4,
                num_train_epochs=3,
                warmup_steps=0.05,
                save_strategy="no",
                report_to="none",
                data_seed=seed,  # the rollouts have one of their own
            ),
            reward_funcs={name: getattr(rewards, name) for name in OBJECTIVES},
            train_dataset=prompts["train"],
            eval_dataset=prompts["test"],
        )
        folder = args.artifacts / "rollouts"
        config = trainer.value_config

        def pack(trees: list[Tree], fraction: float) -> Any:
            return TreeDataset(
                trees, OBJECTIVES, np.array(config.reward_mean), np.array(config.reward_std),
                trainer.args.max_length, fraction, seed,
            )  # fmt: skip

        trainer.collect_rollouts()  # they are there
        chosen = choose(read_rollouts(folder / "train"), np.array(config.reward_std), choice, seed)
        trainer.train_dataset = pack(chosen, trainer.args.leaf_fraction)
        trainer.train()
        metrics = trainer.evaluate(pack(read_rollouts(folder / "eval"), 1.0))
    return {"value_loss": metrics["eval_value_loss"]} | {
        name: metrics[f"eval_explained_variance/{name}"] for name in OBJECTIVES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"))
    parser.add_argument("--out", type=Path, default=Path("docs/choose_trees.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {choice: [] for choice in CHOICES}
    for seed in args.seeds:
        for choice in CHOICES:
            found[choice].append(measure(args, choice, seed))
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    lines = [
        f"| prompts chosen | mean squared error | {' | '.join(OBJECTIVES)} |",
        "| --- | --- |" + " --- |" * len(OBJECTIVES),
    ]
    for choice, rows in found.items():
        cells = [f"{np.median([row[k] for row in rows]):.3f}" for k in ("value_loss", *OBJECTIVES)]
        lines.append(f"| {choice} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
