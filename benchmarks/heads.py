"""What a cheaper head costs: gain in reward at equal KL to the base model, for each objective.

    python benchmarks/heads.py        # a state head, and heads on the base model's own state

Held-out prompts are answered under every value model, objective and beta; the KL of a response is
exact at every step and summed along it. The gain of each model is read off its curve at the KL that
the first model has at `--at-beta`. Writes `benchmarks/results/heads.json` and `docs/heads.png`;
responses are kept in `artifacts/head_responses`, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

from trimtab.plugins import MAVISValueModel
from trimtab.plugins.guidance import step_kl, top_candidates
from trimtab.plugins.transformers import MAVISLogitsProcessor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import rewards  # noqa: E402

MODELS = ("state=artifacts/value_model", "heads=artifacts/heads")
FIRST_BETAS, BETAS = (4.0, 8.0), (4.0, 8.0, 12.0)  # of the first model and of the others
TOP_K, MAX_TOKENS, BATCH = 40, 48, 96
DRAWS = 2000


class KLMeter(LogitsProcessor):
    """Runs a logits processor and notes the KL of its policy to the base model's at every step."""

    def __init__(self, processor: MAVISLogitsProcessor) -> None:
        self.processor = processor
        self.steps: list[torch.Tensor] = []  # [batch] of each step

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        policy = self.processor(input_ids, scores)
        candidates, log_probs = top_candidates(scores.float(), TOP_K)
        self.steps.append(step_kl(policy.gather(1, candidates), log_probs))
        return policy


def answer(
    base: Any,
    tokenizer: Any,
    prompts: list[Any],
    values: MAVISValueModel | None,
    weights: dict[str, float],
    beta: float,
) -> list[dict[str, Any]]:
    """A response to every prompt: its text and its KL to the base model in nats."""
    batch = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    meter = None
    if values is not None:
        meter = KLMeter(
            MAVISLogitsProcessor(
                [values],
                weights=weights,
                beta=beta,
                top_k=TOP_K,
                attention_mask=batch["attention_mask"],
                model=base,
                dtype=torch.bfloat16,
            )
        )
    output = base.generate(
        **batch,
        do_sample=True,
        top_k=TOP_K if meter is None else 0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=MAX_TOKENS,
        pad_token_id=tokenizer.eos_token_id,
        logits_processor=[meter] if meter else None,
    )[:, batch["input_ids"].shape[1] :]
    ended = (output == tokenizer.eos_token_id).long().cumsum(1)
    lengths = ((ended - (output == tokenizer.eos_token_id).long()) == 0).sum(1)
    kl = torch.zeros(len(prompts))
    if meter:
        steps = torch.stack(meter.steps, 1)  # [batch, steps]
        kl = (steps * (torch.arange(steps.shape[1]) < lengths[:, None])).sum(1)
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [
        {"text": text, "kl": float(nats), "tokens": int(length)}
        for text, nats, length in zip(texts, kl, lengths)
    ]


def sample(args: argparse.Namespace, prompts: list[Any]) -> list[dict[str, Any]]:
    """Scored responses of every setting, appended to a file as they come."""
    args.artifacts.mkdir(parents=True, exist_ok=True)
    path = args.artifacts / "responses.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    done = [json.loads(line) for line in lines]
    known = {(r["model"], r["objective"], r["beta"], r["sample"]) for r in done}

    tokenizer = AutoTokenizer.from_pretrained(args.base, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16).eval()
    models = {}
    for spec in args.models:
        name, _, folder = spec.partition("=")
        models[name] = MAVISValueModel.load(folder)
    objectives = args.objectives or models[next(iter(models))].config.objectives
    per_batch = max(1, BATCH // len(prompts))
    jobs = [("unguided", "", 0.0, s) for s in range(0, args.samples, per_batch)]
    jobs += [
        (name, objective, beta, s)
        for s in range(0, args.samples, per_batch)
        for beta in sorted({*args.first_betas, *args.betas}, key=lambda b: (b != args.at_beta, b))
        for objective in objectives
        for name in models
        if beta in betas_of(args, name)
    ]
    for number, (name, objective, beta, s) in enumerate(jobs):
        if (name, objective, beta, s) in known:
            continue
        started = time.monotonic()
        torch.manual_seed(number)
        samples = range(s, min(s + per_batch, args.samples))
        asked = prompts * len(samples)
        found = answer(base, tokenizer, asked, models.get(name), {objective: 1.0}, beta)
        of = [objective] if objective else next(iter(models.values())).config.objectives
        scores = {
            o: getattr(rewards, o)(prompts=asked, completions=[r["text"] for r in found])
            for o in of
        }
        with path.open("a") as out:
            for i, r in enumerate(found):
                r |= {"model": name, "objective": objective, "beta": beta}
                r |= {"prompt": i % len(prompts), "sample": samples[i // len(prompts)]}
                r |= {"rewards": {o: scores[o][i] for o in of}}
                done.append(r)
                out.write(json.dumps(r) + "\n")
        print(
            f"{number + 1}/{len(jobs)} {name} {objective} beta {beta:g}: "
            f"KL {np.mean([r['kl'] for r in found]):.1f}, "
            f"{sum(r['tokens'] for r in found) / (time.monotonic() - started):.0f} tokens/s",
            flush=True,
        )
    return done


def betas_of(args: argparse.Namespace, name: str) -> list[float]:
    """The betas that a model is measured at."""
    return args.first_betas if name == args.models[0].split("=")[0] else args.betas


def at_kl(kls: np.ndarray, gains: np.ndarray, kl: float) -> float:
    """The gain at a KL, on straight lines through the origin and the points of every beta."""
    order = np.argsort(kls)
    return float(np.interp(kl, np.append(0.0, kls[order]), np.append(0.0, gains[order])))


def measure(args: argparse.Namespace, responses: list[dict[str, Any]], count: int) -> dict:
    """Gains in unguided standard deviations, with bootstrap intervals over prompts."""
    names = [m.split("=")[0] for m in args.models]
    objectives = args.objectives or sorted({r["objective"] for r in responses} - {""})
    plain = [r for r in responses if r["model"] == "unguided"]
    draws = np.random.default_rng(0).integers(0, count, (DRAWS, count))
    draws = np.concatenate([np.arange(count)[None], draws])  # the first is the data itself

    def means(select: Any, value: Any) -> np.ndarray:  # [1 + DRAWS], over the prompts drawn
        rows: list[list[float]] = [[] for _ in range(count)]
        for r in responses:
            if select(r):
                rows[r["prompt"]].append(value(r))
        return np.array([np.mean(row) for row in rows])[draws].mean(1)

    def interval(x: np.ndarray) -> dict[str, float]:
        low, high = np.percentile(x[1:], [2.5, 97.5])
        return {"mean": float(x[0]), "low": float(low), "high": float(high)}

    result: dict[str, Any] = {}
    for objective in objectives:
        unguided = [r["rewards"][objective] for r in plain if objective in r["rewards"]]
        std = np.std(unguided)
        base = means(
            lambda r, o=objective: r["model"] == "unguided" and o in r["rewards"],
            lambda r, o=objective: r["rewards"][o],
        )
        entry: dict[str, Any] = {"unguided": {"mean": float(np.mean(unguided)), "std": float(std)}}
        curves = {}
        for name in names:
            kls, gains, counts = [], [], []
            for beta in betas_of(args, name):
                key = (name, objective, beta)
                chosen = lambda r, key=key: (r["model"], r["objective"], r["beta"]) == key  # noqa: E731
                counts.append(sum(map(chosen, responses)))
                kls.append(means(chosen, lambda r: r["kl"]))
                mean = means(chosen, lambda r, o=objective: r["rewards"][o])
                gains.append((mean - base) / std)
            curves[name] = np.stack(kls), np.stack(gains)
            entry[name] = {
                "curve": [
                    {"beta": beta, "responses": n, "kl": interval(kl), "gain": interval(gain)}
                    for beta, n, kl, gain in zip(betas_of(args, name), counts, kls, gains)
                ]
            }
        reference = args.first_betas.index(args.at_beta)
        target = curves[names[0]][0][reference]
        of_first = curves[names[0]][1][reference]
        entry["kl"] = interval(target)
        for name in names:
            kls, gains = curves[name]
            read = np.array([at_kl(kls[:, i], gains[:, i], target[i]) for i in range(len(target))])
            entry[name]["gain_at_kl"] = interval(read)
            entry[name]["share"] = interval(read / of_first)
        result[objective] = entry
    return result


def plot(result: dict[str, Any], names: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(result), figsize=(3.6 * len(result), 3.6), layout="constrained", squeeze=False
    )
    for axis, (objective, entry) in zip(axes[0], result.items()):
        for name in names:
            points = entry[name]["curve"]
            kl = [0.0] + [p["kl"]["mean"] for p in points]
            gain = np.array([0.0] + [p["gain"]["mean"] for p in points])
            low = np.array([0.0] + [p["gain"]["low"] for p in points])
            high = np.array([0.0] + [p["gain"]["high"] for p in points])
            axis.errorbar(kl, gain, yerr=[gain - low, high - gain], fmt="o-", capsize=2, label=name)
        axis.axvline(entry["kl"]["mean"], color="grey", lw=0.8, ls=":")
        axis.set_title(objective)
        axis.set_xlabel("KL to the base model, nats a response")
    axes[0][0].set_ylabel("gain in its reward\n(unguided standard deviations)")
    axes[0][0].legend(title="head")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="artifacts/smollm2")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME=FOLDER")
    parser.add_argument("--objectives", nargs="+", help="by default all")
    parser.add_argument("--first-betas", nargs="+", type=float, default=list(FIRST_BETAS))
    parser.add_argument("--betas", nargs="+", type=float, default=list(BETAS))
    parser.add_argument("--at-beta", type=float, default=8.0)
    parser.add_argument("--samples", type=int, default=4, help="responses to each prompt")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts/head_responses"))
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/heads.json")
    parser.add_argument("--png", type=Path, default=ROOT / "docs/heads.png")
    args = parser.parse_args()
    names = [m.split("=")[0] for m in args.models]
    if taken := {"kl", "unguided"} & set(names):
        parser.error(f"--models: {taken} are keys of the result, take other names")
    rows = map(json.loads, (ROOT / "examples/prompts.jsonl").read_text().splitlines())
    prompts = [row["prompt"] for row in rows if row["split"] == "test"][: args.prompts]
    responses = sample(args, prompts)
    result = measure(args, responses, len(prompts))
    parameters = {
        "models": args.models, "at_beta": args.at_beta, "top_k": TOP_K,
        "max_tokens": MAX_TOKENS, "prompts": len(prompts), "samples": args.samples,
    }  # fmt: skip
    text = json.dumps({"parameters": parameters, "objectives": result}, indent=2)
    args.json.write_text(text + "\n")
    plot(result, names, args.png)
    for objective, entry in result.items():
        print(f"{objective}, at {entry['kl']['mean']:.1f} nats a response")
        for name in names:
            gain, share = entry[name]["gain_at_kl"], entry[name]["share"]
            print(
                f"  {name:10s} gain {gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}], "
                f"{share['mean']:.0%} [{share['low']:.0%}, {share['high']:.0%}] of {names[0]}'s"
            )


if __name__ == "__main__":
    main()
