"""What value models gain in reward at equal KL to the base model, for each objective.

    python benchmarks/heads.py        # heads, and a state head trained on the same rollouts

The state head, the paper's form, is trained by

    trimtab train --config examples/train_value_models.yaml \\
        --head_type state --learning_rate 4e-4 --num_train_epochs 3 --output_dir artifacts/state

Held-out prompts are answered under every value model, objective and beta; the KL of a response is
exact at every step and summed along it. The gain at a KL is read off each model's curve. Writes
`benchmarks/results/heads.json`, `docs/heads.md` and `docs/heads.png`; responses are kept in
`artifacts/heads_benchmark`, so that an interrupted run goes on.
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
from trimtab.plugins.policy import step_kl, top_candidates
from trimtab.plugins.transformers import MAVISLogitsProcessor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import rewards  # noqa: E402

# Values of heads are scaled down to what responses bear out, so that it takes more beta.
MODELS = ("state=artifacts/state@2,4,8", "heads=artifacts/value_model@4,8,16")
KLS = (1.0, 2.0, 5.0, 10.0)  # nats a response that gains are read off at
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
    for name, (folder, _) in args.models.items():
        models[name] = MAVISValueModel.load(folder)
    objectives = args.objectives or models[next(iter(models))].config.objectives
    per_batch = max(1, BATCH // len(prompts))
    jobs = [("unguided", "", 0.0, s) for s in range(0, args.samples, per_batch)]
    jobs += [
        (name, objective, beta, s)
        for s in range(0, args.samples, per_batch)
        for place in range(max(len(betas) for _, betas in args.models.values()))
        for objective in objectives
        for name, (_, betas) in args.models.items()
        for beta in betas[place : place + 1]
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


def at_kl(kls: np.ndarray, gains: np.ndarray, kl: float) -> float:
    """The gain at a KL, on straight lines through the origin and the points of every beta over the
    root of the KL, as it rises for weak guidance; NaN beyond the last point."""
    order = np.argsort(kls)
    x, y = np.append(0.0, np.sqrt(kls[order])), np.append(0.0, gains[order])
    return float(np.interp(np.sqrt(kl), x, y, right=np.nan))


def measure(args: argparse.Namespace, responses: list[dict[str, Any]], count: int) -> dict:
    """Gains in unguided standard deviations, with bootstrap intervals over prompts."""
    names = list(args.models)
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

    def interval(x: np.ndarray) -> dict[str, float | None]:
        if np.isnan(x).any():  # a draw's curve ends before
            return {"mean": None, "low": None, "high": None}
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
        read = {}
        for name in names:
            kls, gains, counts = [], [], []
            betas = args.models[name][1]
            for beta in betas:
                key = (name, objective, beta)
                chosen = lambda r, key=key: (r["model"], r["objective"], r["beta"]) == key  # noqa: E731
                counts.append(sum(map(chosen, responses)))
                kls.append(means(chosen, lambda r: r["kl"]))
                mean = means(chosen, lambda r, o=objective: r["rewards"][o])
                gains.append((mean - base) / std)
            entry[name] = {
                "curve": [
                    {"beta": beta, "responses": n, "kl": interval(kl), "gain": interval(gain)}
                    for beta, n, kl, gain in zip(betas, counts, kls, gains)
                ]
            }
            points = list(zip(np.stack(kls).T, np.stack(gains).T))
            read[name] = {kl: np.array([at_kl(*point, kl) for point in points]) for kl in KLS}
            entry[name]["gain_at_kl"] = {f"{kl:g}": interval(x) for kl, x in read[name].items()}
        for name in names[1:]:
            entry[name]["lead"] = {
                f"{kl:g}": interval(read[name][kl] - read[names[0]][kl]) for kl in KLS
            }
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
        axis.set_title(objective)
        axis.set_xlabel("KL to the base model, nats a response")
    axes[0][0].set_ylabel("gain in its reward\n(unguided standard deviations)")
    axes[0][0].legend(title="head")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def table(result: dict[str, Any], names: list[str], parameters: dict[str, Any]) -> str:
    """Gains at equal KL of every model and objective, in Markdown."""
    first, *others = names
    lines = [
        "# Gain in reward at equal KL",
        "",
        f"{parameters['prompts']} held-out prompts of the demo, {parameters['samples']} responses "
        f"of at most {MAX_TOKENS} tokens to each under three `beta`, all weight "
        "on one objective; gains in standard deviations of the base model's reward, read "
        "off each model's curve (no figure: it does not reach that far), 95 % intervals over "
        f"prompts. `python benchmarks/heads.py --samples {parameters['samples']}`.",
        "",
        "| objective | KL, nats a response | "
        + " | ".join([*names, *(f"{n} less {first}" for n in others)])
        + " |",
        "| --- " * (2 + len(names) + len(others)) + "|",
    ]
    for objective, entry in result.items():
        for kl in (f"{kl:g}" for kl in KLS):
            found = [entry[n]["gain_at_kl"][kl] for n in names]
            found += [entry[n]["lead"][kl] for n in others]
            cells = [
                "{mean:+.2f} [{low:+.2f}, {high:+.2f}]".format(**x) if x["low"] is not None else ""
                for x in found
            ]
            lines.append(f"| {objective} | {kl} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="artifacts/smollm2")
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), metavar="NAME=FOLDER@BETA,BETA"
    )
    parser.add_argument("--objectives", nargs="+", help="by default all")
    parser.add_argument("--samples", type=int, default=4, help="responses to each prompt")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts/heads_benchmark"))
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/heads.json")
    parser.add_argument("--png", type=Path, default=ROOT / "docs/heads.png")
    parser.add_argument("--table", type=Path, default=ROOT / "docs/heads.md")
    args = parser.parse_args()
    specs = [spec.replace("@", "=").split("=") for spec in args.models]
    args.models = {n: (folder, [float(b) for b in betas.split(",")]) for n, folder, betas in specs}
    names = list(args.models)
    if "unguided" in names:
        parser.error("--models: unguided is a key of the result, take another name")
    rows = map(json.loads, (ROOT / "examples/prompts.jsonl").read_text().splitlines())
    prompts = [row["prompt"] for row in rows if row["split"] == "test"][: args.prompts]
    responses = sample(args, prompts)
    result = measure(args, responses, len(prompts))
    parameters = {
        "models": args.models, "top_k": TOP_K,
        "max_tokens": MAX_TOKENS, "prompts": len(prompts), "samples": args.samples,
    }  # fmt: skip
    text = json.dumps({"parameters": parameters, "objectives": result}, indent=2)
    args.json.write_text(text + "\n")
    plot(result, names, args.png)
    args.table.write_text(table(result, names, parameters))
    print(args.table.read_text())


if __name__ == "__main__":
    main()
