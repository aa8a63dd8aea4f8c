"""What data is worth: heads from trees, scored responses, labels and pairs of the same responses.

    python benchmarks/offline.py        # on the rollouts of `make demo`

The leaves of the demo's trees are turned into each type of data that `MAVISTrainer` takes: a row
for every response with its scores; a label for every response and objective, whether it is above
the median; eight pairs of responses to every prompt, of which the one of the higher score is
preferred. Heads are trained from each as `MAVISTrainer` trains them, for as many steps, and
measured on the held-out prompts' trees: `C^2 / D`, as in `hidden_heads.py`. The hidden state after
a prefix is that in the tree, where it was read. Writes `benchmarks/results/offline.json` and
`docs/offline.md`.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from hidden_heads import (
    DEMO,
    MAX_LENGTH,
    OBJECTIVES,
    TOP_K,
    Variant,
    efficiencies,
    mean_gain,
    train,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.plugins.hidden_states import checkpoint_fingerprint
from trimtab.trainers import Tree, read_rollouts
from trimtab.trainers.data import PREFERENCE, read_responses
from trimtab.trainers.head_training import (
    add_baseline,
    efficiency,
    head_loss,
    pairs_loss,
)
from trimtab.trainers.hidden_states import HeadDataset, cache_hidden_states, row_starts, tree_rows
from trimtab.trainers.preferences import UTILITY_STD, WIN
from trimtab.trainers.rewards import reward_statistics
from trimtab.trainers.trees import Node

ROOT = Path(__file__).parents[1]
READ = ("hidden", "candidates", "log_probs")  # by the base model
UNKNOWN = "scored responses of an unknown writer"
ARMS = ("trees", "scored responses", UNKNOWN, "pairs", "labels")


def responses_of(tree: Tree) -> list[tuple[list[int], dict[str, float], np.ndarray]]:
    """Tokens, scores and rows of the tree of every finished response."""
    starts = row_starts(tree)
    found = []
    for leaf in tree.leaves():
        rows = [np.arange(starts[node], starts[node + 1]) for node in tree.path(leaf)]
        scores = {name: float(tree.rewards[name][leaf]) for name in OBJECTIVES}
        found.append((tree.response(leaf), scores, np.concatenate(rows)))
    return found


def items_of(
    made: list[Tree], names: list[str], trees: list[Tree], read: list[Any]
) -> tuple[list[dict[str, Any]], list[float]]:
    """What the trainer makes of trees of depth one, and the standard deviations that it finds."""
    known = {tuple(tree.nodes[0].tokens): i for i, tree in enumerate(trees)}
    mean, std = np.zeros(1), np.full(1, UTILITY_STD)
    if names != [PREFERENCE]:
        mean, std = reward_statistics(made, names)
    items = []
    for tree in made:
        at = known[tuple(tree.nodes[0].tokens)]
        rows_by_response = {tuple(tokens): rows for tokens, _, rows in responses_of(trees[at])}
        rows = [rows_by_response[tuple(node.tokens)] for node in tree.nodes[1:]]
        values = np.stack([tree.values(name) for name in names], axis=-1)
        told = np.stack([tree.known(name) for name in names], axis=-1)
        item = tree_rows(tree, (values - mean) / std, told)
        gathered = np.concatenate([[0], *rows])
        np.testing.assert_array_equal(item["tokens"], read[at]["tokens"][gathered])
        items.append({**item, **{n: read[at][n][gathered] for n in READ}, "tree": at})
    return items, std.tolist()


def data_of(
    trees: list[Tree], tokenizer: Any, seed: int
) -> dict[str, list[tuple[list[str], list[Tree]]]]:
    """By type: objectives and trees of depth one; of pairs for each objective."""
    rng = np.random.default_rng(seed)
    scored: list[dict[str, Any]] = []
    pairs: list[tuple[list[str], list[Tree]]] = [([PREFERENCE], []) for _ in OBJECTIVES]
    for tree in trees:
        prompt, found = tree.nodes[0].tokens, responses_of(tree)
        for tokens, scores, _ in found:
            scored.append({"prompt_ids": prompt, "completion_ids": tokens, **scores})
        for name, (_, made) in zip(OBJECTIVES, pairs):
            nodes = [Node(-1, 0, prompt)]
            for i, j in rng.permutation(len(found) // 2 * 2).reshape(-1, 2):
                a, b = sorted((found[i], found[j]), key=lambda one: -one[1][name])
                if a[1][name] > b[1][name]:
                    nodes += [Node(0, 1, tokens, leaf=True) for tokens in (a[0], b[0])]
            worth = np.r_[np.nan, np.tile([WIN, -WIN], len(nodes) // 2)]
            if len(nodes) > 1:
                made.append(Tree(tree.prompt_index, nodes, {PREFERENCE: worth}))
    medians = {name: np.median([row[name] for row in scored]) for name in OBJECTIVES}
    labels = [{**row, **{n: bool(row[n] > medians[n]) for n in OBJECTIVES}} for row in scored]
    found_by_kind = {"scored responses": scored, "labels": labels}
    made_of = {}
    for kind, rows in found_by_kind.items():
        prompts = [row["prompt_ids"] for row in rows]
        data = Dataset.from_list(rows)
        read = read_responses("train", data, OBJECTIVES, prompts, tokenizer, {2}, 48, "smollm2")
        made_of[kind] = [(OBJECTIVES, read.trees)]
    return {**made_of, "pairs": pairs}


@torch.no_grad()
def correlation(model: Any, held_out: list[dict[str, Any]]) -> np.ndarray:
    """Squared, within a prompt, of `V` and the mean reward after every prefix."""
    sums = 0.0
    for item in held_out:
        values = model.value(model.standardize(item["hidden"]))
        labels, share = torch.as_tensor(item["labels"]), torch.as_tensor(item["reach"])
        v, y = (x - (share * x).sum(0) / share.sum(0) for x in (values, labels))
        sums = sums + torch.stack([(share * x).sum(0) for x in (v * y, v * v, y * y)])
    return (sums[0].square() / (sums[1] * sums[2])).numpy()


def of_objective(items: list[dict[str, Any]], i: int) -> list[dict[str, Any]]:
    """Items with one of the objectives."""
    return [{**x, **{n: x[n][:, [i]] for n in ("labels", "reach", "baseline")}} for x in items]


def table(result: dict[str, Any]) -> str:
    """KL efficiency by type of data, in Markdown."""
    lines = [
        "# Heads from trees, scored responses, labels and pairs",
        "",
        "The same responses of the base model as each type of data that `MAVISTrainer` takes: "
        f"{result['responses']} responses to {result['trees']} prompts of the demo, as the trees "
        "that they were sampled in; as scored responses, said to be the base model's or of an "
        "unknown writer; with a label for each, whether it is above the median; and as 8 random "
        f"pairs to a prompt. Heads of {result['members']} member(s), {result['steps']} steps each; "
        f"KL efficiency on the trees of {result['held_out']} held-out prompts, medians of "
        f"{result['seeds']} seed(s), and of the first seed the 95 % interval over these trees. Of "
        "every run the best fifth is kept, by the last column and on the same trees. "
        f"`{result['command']}`.",
        "",
        f"| | {' | '.join(OBJECTIVES)} | mean gain at half a nat |",
        "| --- " * (len(OBJECTIVES) + 2) + "|",
    ]
    kept = {
        arm: [max(curve, key=lambda m: mean_gain(efficiencies(m))) for curve in runs]
        for arm, runs in result["arms"].items()
    }
    for arm, runs in kept.items():
        values = np.median([efficiencies(m) for m in runs], axis=0)
        cells = [
            "{0:.3f} [{low:.3f}, {high:.3f}]".format(x, **m["kl_efficiency"])
            for x, m in zip(values, runs[0])
        ]
        gain = np.median([mean_gain(efficiencies(m)) for m in runs])
        lines.append(f"| {arm} | {' | '.join(cells)} | {gain:.3f} |")
    lines += [
        "",
        "What of the predicted advantages the trees bear out, in standard deviations of the reward "
        "(`C / D`): 1 where `beta` means what it means with values from trees that are right. And "
        "the squared correlation of `V` with the mean reward after a prefix, within a prompt:",
        "",
        f"| | {' | '.join(OBJECTIVES)} |",
        "| --- " * (len(OBJECTIVES) + 1) + "|",
    ]
    for arm, runs in kept.items():
        scales = np.median([[m["scale"]["value"] for m in run] for run in runs], axis=0)
        cells = [
            f"{s:.2f}; {r:.2f}" for s, r in zip(scales, result["correlation of V, squared"][arm])
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="artifacts/smollm2")
    parser.add_argument("--rollouts", type=Path, default=Path("artifacts/rollouts"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trees", type=int, default=240, help="to train on")
    parser.add_argument("--members", type=int, default=4, help="of the ensemble")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/offline.json")
    parser.add_argument("--table", type=Path, default=ROOT / "docs/offline.md")
    args = parser.parse_args()
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    trees = {name: read_rollouts(args.rollouts / name) for name in ("train", "eval")}
    mean, std = reward_statistics(trees["train"], OBJECTIVES)
    read = {}
    for name in trees:
        cache_hidden_states(
            args.rollouts / name, lambda: base, checkpoint_fingerprint(args.base), TOP_K,
            MAX_LENGTH, 2, Accelerator(cpu=True),
        )  # fmt: skip
        read[name] = HeadDataset([args.rollouts / name], OBJECTIVES, mean, std).items
    chosen = np.random.default_rng(0).permutation(len(read["train"]))[: args.trees]
    trees["train"], read["train"] = (
        [x[i] for i in chosen] for x in (trees["train"], read["train"])
    )
    held_out, embedding = read["eval"], base.get_input_embeddings().weight.detach()
    device = torch.device("cpu")
    add_baseline(read["train"], held_out, embedding, device)  # all are measured with this one
    print("trees are read", flush=True)

    data = data_of(trees["train"], tokenizer, seed=0)
    deviations = {"trees": std.tolist()}
    variant = Variant(members=args.members)
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/offline.py", *sys.argv[1:]]),
        "members": args.members,
        "seeds": args.seeds,
        "steps": int(variant.epochs * DEMO / 4),
        "trees": len(trees["train"]),
        "responses": sum(len(tree.leaves()) for tree in trees["train"]),
        "held_out": len(held_out),
        "standard deviations": deviations,
        "arms": {},
        "correlation of V, squared": {},
    }
    unknown = functools.partial(head_loss, on_policy=False)
    models = [(OBJECTIVES, read["train"])]  # objectives and items of each
    for arm in ARMS:
        if arm in data:
            made = [
                items_of(flat, names, trees["train"], read["train"]) for names, flat in data[arm]
            ]
            models = [(names, items) for (names, _), (items, _) in zip(data[arm], made)]
            deviations[arm] = [x for _, stds in made for x in stds]
            for names, items in models:
                if names != [PREFERENCE]:
                    add_baseline(items, [], embedding, device)
                    continue
                for item in items:  # their loss asks for none
                    item["baseline"] = torch.zeros(item["labels"].shape)
        loss = {UNKNOWN: unknown, "pairs": pairs_loss}.get(arm)
        found = result["correlation of V, squared"][arm] = []
        for seed in range(args.seeds):
            curves = []
            for i, (names, items) in enumerate(models):
                own = held_out if len(names) > 1 else of_objective(held_out, i)
                model, curve = train(
                    variant, items, own, base, seed, objectives=names, loss_function=loss
                )
                curves.append([efficiency(sums) for sums in curve])
                if not seed:  # `V` is the same with all
                    found += correlation(model, own).tolist()
                print(arm, seed, i, np.round(efficiencies(curves[-1][-1]), 3), flush=True)
            curve = [[one for part in fifth for one in part] for fifth in zip(*curves)]
            result["arms"].setdefault(arm, []).append(curve)
            args.output.write_text(json.dumps(result, indent=1) + "\n")
    args.table.write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
