"""What raises the KL efficiency of heads on the base model's hidden state, by rollouts alone.

    python benchmarks/hidden_heads.py --sample_more    # trees of 720 further prompts
    python benchmarks/hidden_heads.py                  # on these and the rollouts of `make demo`

Every variant is trained as `MAVISTrainer` trains heads, on the same trees for as many steps (more
trees than the demo's 240: for as many epochs), and measured on the held-out prompts' trees:
`C^2 / D`, the squared gain by two nats of weak guidance, in variances of the reward. State heads on
the same rollouts (`heads.py` says how to train one; `--data_seed 1` and `2` make the others) are
measured at a fifth of the prefixes, and the default heads there too. Writes
`benchmarks/results/hidden_heads.json`, in which runs are kept that were made of the same rollouts,
and `docs/hidden_heads.md`. `heads.py` measures what both gain when they are sampled with.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForCausalLM

from trimtab.plugins import MAVISValueHeads, MAVISValueModel
from trimtab.plugins.hidden_states import checkpoint_fingerprint
from trimtab.trainers import MAVISConfig, MAVISTrainer, read_rollouts
from trimtab.trainers.head_training import (
    add_baseline,
    add_excess,
    centred_advantages,
    efficiency,
    efficiency_sums,
    fit_values,
    head_loss,
    read_heads,
    set_values,
)
from trimtab.trainers.hidden_states import (
    HeadDataset,
    cache_hidden_states,
    collate_rows,
    packed_rows,
    tree_collator,
)
from trimtab.trainers.rewards import reward_statistics
from trimtab.trainers.run_state import trees_fingerprint

ROOT = Path(__file__).parents[1]
OBJECTIVES = ["positivity", "rarity", "readability", "relevance"]
TOP_K, MAX_LENGTH = 40, 1024
DEMO = 240  # trees to train on
EVERY = 5  # prefix of which the state head is measured at


@dataclass(frozen=True)
class Variant:
    """How heads are trained; the defaults are those of `MAVISTrainer`."""

    gae_lambda: float = 0.5
    centred: bool = False  # excesses less their mean within a prompt
    sampled_square: bool = False  # of the advantage, instead of the candidates' variance
    sums: bool = True  # read by the baseline; else the hidden state alone, as `V` does
    width: int = 128
    rank: int = 32
    members: int = 4  # of the ensemble
    weight_decay: float = 0.0
    learning_rate: float = 1e-3
    epochs: float = 3.0  # of 240 trees: the number of steps is the same with fewer
    trees: int = 240


VARIANTS = {
    "default": Variant(),
    "gae_lambda 0": Variant(gae_lambda=0.0),
    "gae_lambda 0.8": Variant(gae_lambda=0.8),
    "gae_lambda 1": Variant(gae_lambda=1.0),
    "centred within a prompt": Variant(centred=True),
    "baseline of the hidden state alone": Variant(sums=False),
    "square of the sampled advantage": Variant(sampled_square=True),
    "1 member": Variant(members=1),
    "2 members": Variant(members=2),
    "8 members": Variant(members=8),
    "width 32, rank 8": Variant(width=32, rank=8),
    "width 512, rank 64": Variant(width=512, rank=64),
    "weight decay 0.1": Variant(weight_decay=0.1),
    "10 epochs": Variant(epochs=10),
    "60 trees": Variant(trees=60),
    "120 trees": Variant(trees=120),
    "180 trees": Variant(trees=180),
    "480 trees": Variant(trees=480),
    "960 trees": Variant(trees=960),
}
# As those of the demo, in pairs of which a topic has one
TEMPLATES = (
    "Write two sentences about {}.", "Give me your honest opinion about {}.",
    "Tell me a very short story about {}.", "What should I know about {}?",
    "Describe {} to someone who has never heard of it.", "Write a short review of {}.",
    "What do people usually feel about {}?", "Explain why {} can matter to people.",
)  # fmt: skip


def loss_of(
    variant: Variant, batch: dict[str, torch.Tensor], advantages: torch.Tensor
) -> torch.Tensor:
    """The trainer's loss, or what a variant has in its place."""
    if not variant.sampled_square:
        return head_loss(batch, advantages)
    parts = [centred_advantages(batch, member) for member in advantages]
    return sum((one - batch["excess"])[sampled].square().mean() for one, _, sampled in parts)


def train(
    variant: Variant,
    items: list[dict[str, Any]],
    held_out: list[dict[str, Any]],
    base: Any,
    seed: int,
    batch_size: int = 4,
    objectives: Sequence[str] = OBJECTIVES,
    loss_function: Callable[..., torch.Tensor] | None = None,
) -> tuple[MAVISValueHeads, list[np.ndarray]]:
    """Heads, and the sums of the held-out trees after every fifth of the steps."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    embedding = base.get_input_embeddings().weight.detach()
    model = MAVISValueHeads.from_base_model(
        base,
        objectives,
        head_width=variant.width,
        action_rank=variant.rank,
        ensemble_size=variant.members,
    )
    chosen = [dict(items[i]) for i in rng.permutation(min(len(items), max(DEMO, variant.trees)))]
    chosen = chosen[: variant.trees]
    model.set_statistics(item["hidden"] for item in chosen)
    set_values(model, chosen)
    if variant.sums and not min(len(items), DEMO) <= len(chosen) <= DEMO:  # else they have it
        add_baseline(chosen, [], embedding, torch.device("cpu"))
    elif not variant.sums:
        values = fit_values(chosen, lambda item: model.standardize(item["hidden"]))[1]
        chosen = [item | {"baseline": value} for item, value in zip(chosen, values)]
    add_excess(chosen, variant.gae_lambda)
    if variant.centred:
        for item in chosen:
            item["excess"] = item["excess"] - item["excess"].mean(0)
    optimizer = torch.optim.AdamW(
        model.parameters(), variant.learning_rate, weight_decay=variant.weight_decay
    )
    steps = int(variant.epochs * max(DEMO, variant.trees) / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    queue: list[int] = []
    curve = []
    for step in range(1, steps + 1):
        if len(queue) < batch_size:
            queue = rng.permutation(len(chosen)).tolist()
        batch = collate_rows([chosen[queue.pop()] for _ in range(batch_size)])
        advantages = read_heads(model, batch, embedding)[1]
        if loss_function is None:
            loss = loss_of(variant, batch, advantages)
        else:
            loss = loss_function(batch, advantages)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 5) == 0:
            curve.append(measure(model, held_out, embedding))
    return model, curve


@torch.no_grad()
def measure(
    model: MAVISValueHeads, held_out: list[dict[str, Any]], embedding: torch.Tensor
) -> np.ndarray:
    """The sums of every held-out tree, `[n_trees, 4, n_objectives]`."""
    model.eval()
    sums = []
    for item in held_out:
        batch = collate_rows([item])
        values, advantages = read_heads(model, batch, embedding)
        sums.append(efficiency_sums(batch, values, advantages.mean(0)).numpy())
    model.train()
    return np.concatenate(sums)


@torch.no_grad()
def measure_at_some_prefixes(
    folder: Path, held_out: list[dict[str, Any]], value_model: MAVISValueModel, other: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The sums of a state head and of heads at the same prefixes, every `EVERY`-th of each tree."""
    order = [(value_model.config.objectives or []).index(name) for name in OBJECTIVES]
    collate = tree_collator(value_model.backbone, 0)
    found: list[list[np.ndarray]] = [[], []]
    for tree, item in zip(read_rollouts(folder), held_out):
        n = len(item["tokens"])
        values, advantages = torch.zeros(n, 4), torch.zeros(n, TOP_K, 4)
        used = torch.zeros(n, dtype=torch.bool)
        for sequence, at, rows in packed_rows(tree, MAX_LENGTH):
            some = torch.arange(tree.prompt_index % EVERY, len(rows), EVERY)
            used[rows[some]] = True
            batch = collate([sequence])
            for part in some.split(16):
                output = value_model(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    position_ids=batch["position_ids"],
                    candidates=item["candidates"][rows[part]].long()[None],
                    candidate_positions=at[part][None],
                )
                values[rows[part]] = output.logits[0, at[part]][:, order]
                advantages[rows[part]] = output.candidate_logits[0][..., order]
        rows = collate_rows([item])
        rows["reach"] *= (used[rows["previous"]] | (rows["depths"] == 0))[:, None]
        found[0].append(efficiency_sums(rows, values, advantages).numpy())
        values, advantages = read_heads(other[0], rows, other[1])
        found[1].append(efficiency_sums(rows, values, advantages.mean(0)).numpy())
    return np.concatenate(found[0]), np.concatenate(found[1])


def efficiencies(measures: list[dict[str, Any]]) -> np.ndarray:
    """Of every objective."""
    return np.array([m["kl_efficiency"]["value"] for m in measures])


def mean_gain(values: np.ndarray) -> float:
    """What the trainer chooses an epoch by: the mean gain at half a nat."""
    return float((np.sign(values) * np.abs(values) ** 0.5).mean())


def table(result: dict[str, Any]) -> str:
    """Every variant's efficiency by objective, median and range over seeds, in Markdown."""
    lines = [
        "# KL efficiency of heads on the base model's hidden state",
        "",
        f"Held-out prompts of the demo ({result['held_out']} trees), medians of {result['seeds']} "
        "seeds and their range; the interval over the trees, about as large as half of the value, "
        "is in `hidden_heads.json`. As the trainer does, of every run the best fifth is kept, by "
        "the last column and on the same trees. The demo has 240 trees; 480 and 960 are of further "
        "prompts, in the same words on other topics. `python benchmarks/hidden_heads.py`.",
        "",
        f"| | {' | '.join(OBJECTIVES)} | mean gain at half a nat |",
        "| --- " * (len(OBJECTIVES) + 2) + "|",
    ]
    for name, runs in result["variants"].items():
        kept = [max(map(efficiencies, run["curve"]), key=mean_gain) for run in runs]
        values = np.array(kept)
        cells = [f"{np.median(v):.3f}" for v in values.T]
        if len(values) > 1:
            cells = [f"{c} [{v.min():.3f}, {v.max():.3f}]" for c, v in zip(cells, values.T)]
        gain = np.median([mean_gain(v) for v in values])
        lines.append(f"| {name} | {' | '.join(cells)} | {gain:.3f} |")
    for name, runs in result.get("some_prefixes", {}).items():
        values = np.array([efficiencies(run) for run in runs])
        cells = [f"{np.median(v):.3f} [{v.min():.3f}, {v.max():.3f}]" for v in values.T]
        gain = np.median([mean_gain(v) for v in values])
        lines.append(f"| {name}, at one prefix in {EVERY} | {' | '.join(cells)} | {gain:.3f} |")
    return "\n".join(lines) + "\n"


def sample_more(args: argparse.Namespace) -> None:
    """Samples trees to further prompts as the demo does, and reads their hidden states."""
    sys.path.insert(0, str(ROOT / "examples"))
    import rewards

    topics = (ROOT / "benchmarks/topics.txt").read_text().splitlines()
    prompts = [
        [{"role": "user", "content": template.format(topic)}]
        for i, topic in enumerate(topics)
        for template in TEMPLATES[i % 2 :: 2]
    ]
    config = yaml.safe_load((ROOT / "examples/train_value_models.yaml").read_text())
    for name in ("model_name_or_path", "dataset_name", "reward_funcs"):
        config.pop(name)
    more = {"output_dir": str(args.more), "rollout_dir": str(args.more)}
    trainer = MAVISTrainer(
        args.base,
        MAVISConfig(**{**config, **more}),
        {name: getattr(rewards, name) for name in OBJECTIVES},
        Dataset.from_dict({"prompt": prompts}),
    )
    trainer.collect_rollouts()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="artifacts/smollm2")
    parser.add_argument("--rollouts", type=Path, default=Path("artifacts/rollouts"))
    parser.add_argument("--more", type=Path, default=Path("artifacts/more_rollouts"))
    parser.add_argument("--sample_more", action="store_true")
    parser.add_argument(
        "--value-models", nargs="*", default=[f"artifacts/state{seed}" for seed in ("", "_1", "_2")]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/results/hidden_heads.json"
    )
    parser.add_argument("--table", type=Path, default=ROOT / "docs/hidden_heads.md")
    args = parser.parse_args()
    if args.sample_more:
        sample_more(args)
        return
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype="auto")
    fingerprint, datasets = checkpoint_fingerprint(args.base), {}
    folders = {"train": args.rollouts / "train", "eval": args.rollouts / "eval"}
    if max(VARIANTS[name].trees for name in args.variants) > DEMO:
        folders["more"] = args.more / "train"
    trees = {name: read_rollouts(folder) for name, folder in folders.items()}
    mean, std = reward_statistics(trees["train"], OBJECTIVES)
    for name, folder in folders.items():
        cache_hidden_states(
            folder, lambda: base, fingerprint, TOP_K, MAX_LENGTH, 2, Accelerator(cpu=True)
        )
        datasets[name] = HeadDataset([folder], OBJECTIVES, mean, std).items
    items, held_out = datasets["train"], datasets["eval"]
    embedding = base.get_input_embeddings().weight.detach()
    add_baseline(items, held_out, embedding, torch.device("cpu"))  # all are measured with this one
    items = items + datasets.get("more", [])
    made_of = {name: trees_fingerprint(trees[name]) for name in ("train", "eval")}
    for more in {variant.trees - DEMO for variant in VARIANTS.values()}:
        if 0 < more <= len(trees.get("more", [])):
            made_of[f"{more} more"] = trees_fingerprint(trees["more"][:more])
    result: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    if any(result.get("rollouts", {}).get(name) != made_of[name] for name in ("train", "eval")):
        result = {}
    known, stored = result.get("rollouts", {}), result.get("variants", {})
    for name in list(stored):
        which = f"{VARIANTS[name].trees - DEMO} more"
        if known.get(which, made_of.get(which)) != made_of.get(which, known.get(which)):
            del stored[name]  # made of other further rollouts
    result |= {"rollouts": known | made_of, "seeds": args.seeds, "held_out": len(held_out)}
    result["variants"] = {name: stored[name] for name in VARIANTS if name in stored}
    models: list[MAVISValueHeads] = []
    for name in args.variants:
        alike = [r for r in stored.get(name, []) if r["variant"] == asdict(VARIANTS[name])]
        result["variants"][name] = []
        for seed in range(args.seeds):
            found = [run for run in alike if run["seed"] == seed]
            if not found or (name == "default" and args.value_models):
                started = time.monotonic()
                model, curve = train(VARIANTS[name], items, held_out, base, seed)
                models += [model.eval()] if name == "default" else []
                found = [
                    {
                        "seed": seed,
                        "variant": asdict(VARIANTS[name]),
                        "seconds": time.monotonic() - started,
                        "curve": [efficiency(sums) for sums in curve],
                    }
                ]
            result["variants"][name] += found
            last = [m["kl_efficiency"]["value"] for m in found[0]["curve"][-1]]
            print(f"{name}, seed {seed}: {np.round(last, 3)}", flush=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")
    for model, path in zip(models, args.value_models):
        if model is models[0]:
            result["some_prefixes"] = {"4-layer state head": [], "default": []}
        state = MAVISValueModel.load(path).eval()
        heads = (model, embedding)
        both = measure_at_some_prefixes(folders["eval"], held_out, state, heads)
        for runs, sums in zip(result["some_prefixes"].values(), both):
            runs.append(efficiency(sums))
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    args.table.write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
