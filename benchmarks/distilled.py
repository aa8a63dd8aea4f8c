"""One value model distilled from four: what it keeps of their front, at one model's cost.

    python benchmarks/distilled.py            # an hour on one core; an interrupted run goes on

Trains a value model for each of the demo's objectives on the demo's rollouts, distils one model of
four objectives from them, and sweeps the weights with the four, with the distilled one and with the
demo's own, which learnt all objectives at once. Needs the rollouts and the value model of
`make demo`. Writes docs/distilled.json, .md, .png and .html.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import _judges
from _policies import ROOT, Budget, read_prompts, rewards
from pareto import CONFLICT, OBJECTIVES, REFERENCES, TOP_K, Arms, all_weights, claim, digest

from trimtab.plugins import GuidanceParams, MAVISValueModel, ValueEngine
from trimtab.plugins.guide import Guide
from trimtab.trainers import Policy, Response, evaluate, sweep, write_report

KL_BUDGETS = (2.5, 5.0, 10.0)  # a model may keep the front by moving the policy further


def train(args: argparse.Namespace) -> dict[str, list[Path]]:
    """The value models of every arm; what there is not is trained by the examples' scripts."""

    def script(name: str, folder: Path, *options: str) -> None:
        if (folder / "model.safetensors").exists():
            return
        command = [sys.executable, str(ROOT / "examples" / name), *options]
        subprocess.run([*command, "--output_dir", str(folder)], check=True)

    separate = [args.artifacts / "separate" / name for name in OBJECTIVES]
    for name, folder in zip(OBJECTIVES, separate):
        config = str(ROOT / "examples/train_value_models.yaml")
        script(
            "train_value_models.py", folder, "--config", config,
            "--reward_funcs", f"{name}=rewards:{name}",
        )  # fmt: skip
    distilled = args.artifacts / "distilled"
    script(
        "distill_value_models.py", distilled,
        "--model_name_or_path", str(args.base), "--teachers", *map(str, separate),
        "--rollout_dir", str(args.rollouts), "--head_type", "state", "--num_hidden_layers", "4",
        "--positions_per_sequence", "16", "--num_train_epochs", "3", "--learning_rate", "4e-4",
        "--value_weight", "0.5", "--warmup_steps", "0.05",
        "--save_strategy", "no", "--report_to", "none",
    )  # fmt: skip
    return {"separate": separate, "distilled": [distilled], "joint": [args.value_model]}


class Fronts(Arms):
    """Guidance by several sets of value models, each with those that the weights need."""

    @cache  # noqa: B019 - one instance a run
    def guide_of(self, models: tuple[Path, ...]) -> Guide:
        rows = self.args.prompts
        values = [MAVISValueModel.load(str(path)) for path in models]
        engine = ValueEngine(
            values, num_slots=rows, max_length=512, device=self.device, dtype=torch.bfloat16
        )
        return Guide(engine, rows)

    def guided(self, models: Sequence[Path], beta: float) -> Callable[..., list[Response]]:
        named = {path: MAVISValueModel.load(str(path)).config.objectives or [] for path in models}

        def respond(prompts: Sequence[Any], weights: Mapping[str, float], seed: int) -> Any:
            needed = tuple(path for path, names in named.items() if set(names) & set(weights))
            guide = self.guide_of(needed)
            chosen = tuple(weights.get(name, 0.0) for name in guide.engine.objectives)
            for slot in range(len(prompts)):
                guide.start(slot, GuidanceParams(chosen, beta=beta, top_k=TOP_K))
            return self.answer(prompts, (), guide, seed=seed)

        return respond


def table(result: Mapping[str, Any], beta: float) -> str:
    """Markdown: what share of the separate models' hypervolume the one model keeps."""
    lines = [
        "# One value model distilled from four",
        "",
        f"Made by `python benchmarks/distilled.py` on {result['parameters']['device'].upper()}: "
        f"{result['prompts']} held-out prompts, {result['parameters']['seeds']} seeds, `beta` "
        f"{beta:g}. All models have four layers and a state head and learnt from the same "
        "rollouts: the four separately, one distilled from them, one of all rewards at once. With "
        "all objectives in a request the four cost four times what one does.",
        "",
        "| objectives | value models | hypervolume | of the separate ones' | behind them by |",
        "| --- | --- | --- | --- | --- |",
    ]
    for plane in result["planes"]:
        rows = {row["method"]: row for row in plane["hypervolume"] if row["strength"] == beta}
        whole = rows["separate"]["value"]
        for method, row in rows.items():
            behind = "{value:+.2f} [{low:+.2f}, {high:+.2f}]".format(**row["behind"])
            lines.append(
                f"| {', '.join(plane['objectives'])} | {method} | "
                + "{value:.2f} [{low:.2f}, {high:.2f}]".format(**row)
                + f" | {row['value'] / whole:.0%} | {behind} |"
            )
    return "\n".join([*lines, "", ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=Path("artifacts/smollm2"))
    parser.add_argument("--value-model", type=Path, default=Path("artifacts/value_model"))
    parser.add_argument("--rollouts", type=Path, default=Path("artifacts/rollouts"))
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--beta", type=float, default=8.0)
    parser.add_argument("--report", type=Path, default=ROOT / "docs/distilled")
    args = parser.parse_args()
    args.max_tokens = Budget.max_tokens
    models = train(args)
    prompts = read_prompts("test")[: args.prompts]
    args.prompts = len(prompts)
    args.artifacts = args.artifacts / "pareto"  # whose unguided responses are the same
    claim(args.artifacts, {"base": str(args.base), "top_k": TOP_K, "max_tokens": args.max_tokens})
    arms = Fronts(args)
    policies = [Policy("unguided", arms.unguided, weights=[{}])]
    for name, paths in models.items():
        identity = ",".join(digest(path / "model.safetensors") for path in paths)
        policies.append(Policy(name, arms.guided(paths, args.beta), args.beta, identity=identity))
    points = sweep(
        policies,
        prompts,
        all_weights(),
        {o: getattr(rewards, o) for o in OBJECTIVES},
        args.artifacts / "points",
        seeds=args.seeds,
        judges={o: getattr(_judges, o) for o in OBJECTIVES},
    )
    against = ("separate", args.beta)
    result = evaluate(points, [CONFLICT], KL_BUDGETS, against=against, references=REFERENCES)
    result["parameters"] = {
        "base": str(args.base),
        "device": arms.device,
        "seeds": args.seeds,
        "top_k": TOP_K,
        "max_tokens": args.max_tokens,
    }
    for file in write_report(result, args.report, table(result, args.beta)):
        print(file)


if __name__ == "__main__":
    main()
