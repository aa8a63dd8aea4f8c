"""What iterations of MAVIS gain on SmolLM2: reward, KL and `reward - KL / beta` on unseen prompts.

    python benchmarks/iterations.py            # half an hour a seed on two cores, resumable
    python benchmarks/iterations.py --head_type state --out docs/iterations.json

Each seed trains heads, or a four-layer state head, of four objectives from nothing: trees of the
base model, then trees of each objective's own policy, sampled by vLLM. They guide with the scale
that responses to held-out prompts bear out: with heads, of the policy before, with a state head, of
the base model. Writes docs/iterations_heads.json, its plot and table: medians over the seeds, each
policy with the bootstrap interval of its median seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.trainers.iterations import plot_policies

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
MEASURES = ("reward", "kl", "objective", "improvement")


def folder_of(seed: int, args: argparse.Namespace) -> Path:
    """Where a seed's rollouts and value models are."""
    kind = f"{args.head_type}-{args.train_prompts}-prompts"
    return args.artifacts / "iterations" / kind / f"seed-{seed}"


def make_trainer(seed: int, args: argparse.Namespace, model: Any = None, **config: Any) -> Any:
    """The trainer of a seed, of a new value model if none is given."""
    sys.path.insert(0, str(EXAMPLES))
    import rewards
    from datasets import Dataset
    from smollm2 import smollm2

    from trimtab.trainers import MAVISConfig, MAVISTrainer

    rows = [json.loads(line) for line in (EXAMPLES / "prompts.jsonl").read_text().splitlines()]
    rng = np.random.default_rng(seed)

    def prompts(split: str, count: int) -> Dataset:
        chosen = [row["prompt"] for row in rows if row["split"] == split]
        return Dataset.from_dict(
            {"prompt": [chosen[i] for i in rng.permutation(len(chosen))[:count]]}
        )

    fields = {"output_dir": str(folder_of(seed, args)), "num_iterations": args.num_iterations}
    if args.head_type == "state":
        fields |= {"learning_rate": 4e-4, "num_train_epochs": 3}
    return MAVISTrainer(
        model=model or str(smollm2(args.artifacts / "smollm2")),
        args=MAVISConfig(
            **{**fields, **config},
            head_type=args.head_type,
            beta=args.beta,
            max_completion_length=args.tokens,
            layers=2,
            top_k=args.top_k,
            rollout_batch_size=16,
            use_vllm=True,
            vllm_init_kwargs={"enforce_eager": True, "distributed_executor_backend": "uni"},
            warmup_steps=0.05,
            save_strategy="no",
            report_to="none",
            seed=seed,
        ),
        reward_funcs={
            name: getattr(rewards, name)
            for name in ("positivity", "relevance", "readability", "rarity")
        },
        train_dataset=prompts("train", args.train_prompts),
        eval_dataset=prompts("test", args.test_prompts),
    )


def train(seed: int, args: argparse.Namespace) -> None:
    """One seed, in this process."""
    make_trainer(seed, args).train(resume_from_checkpoint=True)
    out = folder_of(seed, args)
    measured = json.loads((out / "iterations.json").read_text())
    result = {"parameters": parameters_of(args), **measured}
    (out / "result.json").write_text(json.dumps(result))


def parameters_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the results depend on, but for the seeds."""
    return {
        k: v for k, v in vars(args).items() if k not in ("artifacts", "out", "train_seed", "seeds")
    }


def stored(path: Path, args: argparse.Namespace) -> dict[str, Any] | None:
    """The result of a seed, if there is one of these parameters."""
    result = json.loads(path.read_text()) if path.exists() else {}
    return result if result.get("parameters") == parameters_of(args) else None


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By policy and objective, the measures of the seed with the median value."""
    policies = []
    for i, policy in enumerate(results[0]["policies"]):
        summary: dict[str, Any] = {}
        for name, measured in policy.items():
            summary[name] = {}
            for measure in (m for m in MEASURES if m in measured):
                seeds = sorted(
                    (r["policies"][i][name][measure] for r in results), key=lambda x: x["value"]
                )
                summary[name][measure] = seeds[len(seeds) // 2]
            if "candidate_scale" in measured:
                scales = [r["policies"][i][name]["candidate_scale"] for r in results]
                summary[name]["candidate_scale"] = float(np.median(scales))
        policies.append(summary)
    return policies


def table(policies: list[dict[str, Any]], beta: float) -> str:
    """Markdown: a row for every objective and policy."""

    def cell(x: dict[str, float]) -> str:
        return f"{x['value']:+.2f} [{x['low']:+.2f}, {x['high']:+.2f}]"

    lines = [
        f"| objective | policy | scale | reward | KL, nats | reward - KL / {beta:g} | change |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in policies[0]:
        for i, policy in enumerate(policies):
            m = policy[name]
            label = f"iteration {i - 1}" if i else "base model"
            change = cell(m["improvement"]) if "improvement" in m else ""
            scale = f"{m['candidate_scale']:.2f}" if "candidate_scale" in m else ""
            lines.append(
                f"| {name} | {label} | {scale} | {cell(m['reward'])} | {m['kl']['value']:.2f} "
                f"| {cell(m['objective'])} | {change} |"
            )
    return "\n".join(lines) + "\n"


def make_parser(description: str, out: str, head_type: str) -> argparse.ArgumentParser:
    """What a seed depends on."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"))
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--head_type", choices=["hidden", "state"], default=head_type)
    parser.add_argument("--num_iterations", type=int, default=3)
    parser.add_argument("--beta", type=float, default=8.0)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--top_k", type=int, default=20)
    parser.add_argument("--train_prompts", type=int, default=128)
    parser.add_argument("--test_prompts", type=int, default=48)
    return parser


def main() -> None:
    parser = make_parser(__doc__ or "", "docs/iterations_heads.json", "hidden")
    parser.add_argument("--train-seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train_seed is not None:
        train(args.train_seed, args)
        return
    results = []
    for seed in args.seeds:
        path = folder_of(seed, args) / "result.json"
        if stored(path, args) is None:
            # A process of its own: vLLM and the random state begin anew.
            command = [sys.executable, __file__, *sys.argv[1:], "--train-seed", str(seed)]
            subprocess.run(command, check=True)
        results.append(json.loads(path.read_text()))
    policies = summarise(results)
    found = {"parameters": parameters_of(args), "policies": policies, "seeds": results}
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    text = table(policies, args.beta)
    args.out.with_suffix(".md").write_text(text)
    plot_policies(policies, args.beta, args.out.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
