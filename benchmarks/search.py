"""What search adds to token-level guidance, at equal compute.

    python benchmarks/search.py

Held-out prompts are answered by the base model, by token-level guidance, by best-of-N with early
rejection and, with `--beams-model`, by beams, for every objective; best-of-N chooses among the
responses of the first two, by value or by reward. Writes `docs/search.json`, `docs/search.md` and
`docs/search.png`; responses are kept in `artifacts/search`, so that an interrupted run goes on.

Guidance and values are those of heads on the base model's hidden state. Compute is in tokens of the
base model, of which prompts are read once; heads, less than a hundredth of its parameters, count
nothing. Beams need a value model that has a backbone, with a state head: a token of it counts as
the ratio of the parameters that a token is multiplied with, and a step of a beam reads `top_k + 1`.
Reward functions cost nothing here. What beams read again after a fork (3 % of their tokens) is left
out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.plugins import MAVISValueHeads, MAVISValueModel, beam_search, best_of_n
from trimtab.plugins.policy import step_kl, top_candidates
from trimtab.plugins.transformers import MAVISLogitsProcessor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import rewards  # noqa: E402

N = 4  # of best-of-N, and beams
# Early rejection, chosen by 32 responses to each of 24 held-out prompts that are not asked here by
# default: about the best reward of 80 schedules at half the tokens of best of `TARGET`.
MANY, KEEP, TARGET = 24, {3: 10, 6: 8, 12: 6}, 16
DRAWS = 4000
LABELS = {
    "guided": "token-level guidance",
    "value": f"best of {N} by value",
    "reward": f"best of {N} by reward",
    "early": f"best of {MANY} by reward, early rejection",
    "guided value": f"guided, best of {N} by value",
    "guided reward": f"guided, best of {N} by reward",
    "beams": f"{N} beams",
}


class KLMeter(MAVISLogitsProcessor):
    """Guidance that notes the exact KL of every step to the base model over its candidates."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start = 0  # of the responses
        self.steps: dict[tuple[int, ...], float] = {}  # by prompt and response so far

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        policy = super().__call__(input_ids, scores)
        candidates, log_probs = top_candidates(scores.float(), self.params.top_k)
        steps = step_kl(policy.gather(1, candidates), log_probs).tolist()
        self.start = self.start or input_ids.shape[1]
        for row, (text, nats) in enumerate(zip(input_ids[:, self.start :].tolist(), steps)):
            self.steps[(row // N, *text)] = nats
        return policy

    def kl(self, prompt: int, response: list[int]) -> float:
        """The steps of one response, summed."""
        return sum(self.steps[(prompt, *response[:t])] for t in range(len(response)))


class Models:
    """The models, the prompts, and the three ways to answer them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.base)
        self.dtype = getattr(torch, args.dtype)
        self.base: Any = AutoModelForCausalLM.from_pretrained(args.base, dtype=self.dtype).eval()
        self.values: Any = MAVISValueHeads.from_pretrained(args.heads)
        self.objectives = args.objectives or self.values.config.objectives
        rows = map(json.loads, (ROOT / "examples/prompts.jsonl").read_text().splitlines())
        self.prompts = [r["prompt"] for r in rows if r["split"] == "test"][: args.prompts]
        self.ids = [
            self.tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"]
            for p in self.prompts
        ]
        self.beams_model: Any = None
        self.value_share = 0.0
        if args.beams_model:
            self.beams_model = MAVISValueModel.load(args.beams_model)
            # What a token is multiplied with: every layer, and of the base model the output matrix.
            base = sum(p.numel() for p in self.base.model.layers.parameters())
            value = sum(p.numel() for p in self.beams_model.backbone.layers.parameters())
            self.value_share = value / (base + self.base.lm_head.weight.numel())

    def sampled(self, objective: str) -> list[dict[str, Any]]:
        """`N` responses to every prompt, guided to an objective or, if it has no name, unguided."""
        how: dict[str, Any] = {"top_k": self.args.top_k}
        if objective:
            meter = KLMeter(
                [self.values], weights={objective: 1.0}, beta=self.args.beta,
                top_k=self.args.top_k, model=self.base,
            )  # fmt: skip
            how = {"top_k": 0, "logits_processor": [meter]}
        found = best_of_n(
            self.base, self.ids, n=N, value_models=[self.values],
            weights={objective or self.objectives[0]: 1.0},
            max_new_tokens=self.args.max_tokens, top_p=1.0, **how,
        )  # fmt: skip
        return [
            self.record(i, response, found.values[i, n], meter.kl(i, response) if objective else 0)
            for i, responses in enumerate(found.sequences)
            for n, response in enumerate(responses)
        ]

    def early(self, objective: str) -> list[dict[str, Any]]:
        """The best by reward of those of `MANY` that early rejection leaves."""
        found = best_of_n(
            self.base, self.ids, n=MANY, value_models=[self.values], weights={objective: 1.0},
            keep=KEEP, reward_funcs={objective: getattr(rewards, objective)},
            tokenizer=self.tokenizer, columns={"prompts": self.prompts},
            max_new_tokens=self.args.max_tokens, top_k=self.args.top_k, top_p=1.0,
        )  # fmt: skip
        assert found.num_tokens is not None
        return [
            self.record(i, responses[0], found.values[i, 0], 0.0) | {"fed": tokens}
            for i, (responses, tokens) in enumerate(zip(found.sequences, found.num_tokens.tolist()))
        ]

    def beams(self, objective: str) -> list[dict[str, Any]]:
        """The best of `N` beams of every prompt."""
        fed = []
        hook = self.base.register_forward_pre_hook(
            lambda module, args, kwargs: fed.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        found = beam_search(
            self.base, self.ids, value_models=[self.beams_model], dtype=self.dtype,
            weights={objective: 1.0}, beta=self.args.beta, num_beams=N, top_k=self.args.top_k,
            max_new_tokens=self.args.max_tokens,
        )  # fmt: skip
        hook.remove()
        steps = sum(fed[1:]) / len(self.ids)  # the first pass reads the prompts
        return [
            # The policy is deterministic: its KL is minus the log-probability of its response.
            self.record(i, responses[0], found.values[i, 0], -float(found.log_probs[i, 0]))
            | {"fed": steps}
            for i, responses in enumerate(found.sequences)
        ]

    def record(
        self, prompt: int, response: list[int], values: torch.Tensor, kl: float
    ) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "text": self.tokenizer.decode(response, skip_special_tokens=True),
            "tokens": len(response),
            "values": dict(zip(self.values.config.objectives, values.tolist())),
            "kl": kl,
        }


def collect(args: argparse.Namespace, models: Models) -> list[dict[str, Any]]:
    """Rewarded responses of every arm, appended to a file as they come."""
    args.artifacts.mkdir(parents=True, exist_ok=True)
    path = args.artifacts / "responses.jsonl"
    text = path.read_text() if path.exists() else ""
    text = text[: text.rfind("\n") + 1]  # without the line that an interruption cut off
    path.write_text(text)
    names = ("base", "heads", "beams_model", "beta", "top_k", "max_tokens", "prompts", "dtype")
    settings = {name: getattr(args, name) for name in names}
    settings["early"] = [MANY, [list(checkpoint) for checkpoint in KEEP.items()]]
    # A line is a job: an arm, an objective, a repeat. Those of other settings stay where they are.
    done = [job for job in map(json.loads, text.splitlines()) if job["settings"] == settings]
    known = {tuple(job["job"]) for job in done}
    jobs = [("plain", "", r) for r in range(args.plain_samples // N)]
    arms = ("guided", "early", "beams") if models.beams_model else ("guided", "early")
    jobs += [(arm, o, 0) for o in models.objectives for arm in arms]
    for number, (arm, objective, repeat) in enumerate(tqdm(jobs, desc="arms")):
        if (arm, objective, repeat) in known:
            continue
        started = time.monotonic()
        torch.manual_seed(number)
        answer = {"early": models.early, "beams": models.beams}.get(arm, models.sampled)
        responses = answer(objective)
        asked = [models.prompts[r["prompt"]] for r in responses]
        texts = [r["text"] for r in responses]
        for o in [objective] if objective else models.objectives:
            found = getattr(rewards, o)(prompts=asked, completions=texts)
            for r, reward in zip(responses, found):
                r[o] = reward
        job = {"job": [arm, objective, repeat], "settings": settings, "responses": responses}
        done.append(job | {"seconds": time.monotonic() - started})
        with path.open("a") as out:
            out.write(json.dumps(done[-1]) + "\n")
    return [job for job in done if tuple(job["job"]) in set(jobs)]


def best_of(values: np.ndarray, rewards: np.ndarray, n: int) -> np.ndarray:
    """Expected reward of the best by value of `n` of the `m` samples of each prompt, `[prompts]`.

    The one of rank `j` (from 0) is the best of `n` drawn without replacement with probability
    `C(m - 1 - j, n - 1) / C(m, n)`.

    Args:
        values: `[prompts, m]`, by which a response is chosen.
        rewards: `[prompts, m]`, what is counted of it.
        n: 1 to `m`.
    """
    m = values.shape[1]
    ranked = np.take_along_axis(rewards, np.argsort(-values, axis=1, kind="stable"), axis=1)
    return ranked @ np.array([math.comb(m - 1 - j, n - 1) / math.comb(m, n) for j in range(m)])


def measure(models: Models, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Gains in unguided standard deviations, with bootstrap intervals over prompts."""
    args, count = models.args, len(models.prompts)
    prompt_tokens = float(np.mean([len(ids) for ids in models.ids]))
    draws = np.random.default_rng(0).integers(0, count, (DRAWS, count))

    def pool(arm: str, objective: str, read: Any) -> np.ndarray:  # [prompts, samples]
        rows: list[list[float]] = [[] for _ in range(count)]
        for job in jobs:
            if job["job"][0] == arm and job["job"][1] in ("", objective):
                for r in job["responses"]:
                    rows[r["prompt"]].append(read(r))
        return np.array(rows)

    def interval(x: np.ndarray) -> dict[str, float]:  # x: [prompts]
        low, high = np.percentile(x[draws].mean(1), [2.5, 97.5])
        return {"mean": float(x.mean()), "low": float(low), "high": float(high)}

    def compute(base: float, value: float = 0.0) -> dict[str, float]:  # tokens read
        total = prompt_tokens + base + models.value_share * value
        return {"base": prompt_tokens + base, "value": value, "total": total}

    result: dict[str, Any] = {}
    for o in models.objectives:
        raw = pool("plain", o, itemgetter(o))
        mean, std = raw.mean(), raw.std()

        def standard(arm: str, o: str = o, mean: float = mean, std: float = std) -> np.ndarray:
            return (pool(arm, o, itemgetter(o)) - mean) / std

        def tokens(arm: str, o: str = o) -> float:
            return float(pool(arm, o, itemgetter("tokens")).mean())

        plain, guided, early = map(standard, ("plain", "guided", "early"))
        plain_values, guided_values = (
            pool(arm, o, lambda r, o=o: r["values"][o]) for arm in ("plain", "guided")
        )
        base = plain.mean(1)
        kl = float(pool("guided", o, itemgetter("kl")).mean())
        of_n = math.log(N) - (N - 1) / N  # the most that choosing among N adds
        t, g = tokens("plain"), tokens("guided")
        begun = float(pool("early", o, itemgetter("fed")).mean())
        found = {
            "guided": (guided.mean(1), kl, g, compute(g)),
            "value": (best_of(plain_values, plain, N), of_n, t, compute(N * t)),
            "reward": (best_of(plain, plain, N), of_n, t, compute(N * t)),
            "early": (early[:, 0], math.log(MANY), tokens("early"), compute(begun)),
            "guided value": (best_of(guided_values, guided, N), kl + of_n, g, compute(N * g)),
            "guided reward": (best_of(guided, guided, N), kl + of_n, g, compute(N * g)),
        }
        if models.beams_model:
            fed = float(pool("beams", o, itemgetter("fed")).mean())
            found["beams"] = (
                standard("beams")[:, 0], float(pool("beams", o, itemgetter("kl")).mean()),
                tokens("beams"), compute(fed, prompt_tokens + (args.top_k + 1) * fed),
            )  # fmt: skip
        # Unguided best-of-n by reward, whose compute any arm can be matched to.
        counts = np.arange(1, plain.shape[1] + 1)
        curve = np.stack([best_of(plain, plain, n) for n in counts])  # [n, prompts]
        by_value = np.stack([best_of(plain_values, plain, n) for n in counts])
        entry: dict[str, Any] = {
            "unguided": {"mean": float(mean), "std": float(std), "tokens": t},
            "best_of_n": [
                {
                    "n": int(n),
                    "by_reward": interval(curve[n - 1] - base),
                    "by_value": interval(by_value[n - 1] - base),
                    "compute": compute(n * t)["total"],
                }
                for n in counts
            ],
        }
        for name, (reward, nats, length, cost) in found.items():
            n = (cost["total"] - prompt_tokens) / t
            at = min(max(n, 1.0), float(counts[-1]))
            low = min(int(at), len(counts) - 1)
            same = curve[low - 1] + (at - low) * (curve[low] - curve[low - 1])  # [prompts]
            entry[name] = {
                "gain": interval(reward - base),
                "kl": nats,
                "tokens": length,
                "compute": cost,
                "best_of_n_at_equal_compute": n,
                "gain_over_it": interval(reward - same),
            }
        many = min(TARGET, len(counts))
        share = [x[draws].mean(1) for x in (early[:, 0] - base, curve[many - 1] - base)]
        low, high = np.percentile(share[0] / share[1], [2.5, 97.5])
        entry["target"] = {
            "best_of": many,
            "tokens": begun / (many * t),
            "gain": {
                "mean": float((early[:, 0] - base).mean() / (curve[many - 1] - base).mean()),
                "low": float(low),
                "high": float(high),
            },
        }
        result[o] = entry
    return result


def markdown(result: dict[str, Any], parameters: dict[str, Any]) -> str:
    """The table of gains, and that of differences at equal compute."""
    p, samples = parameters, parameters["plain_samples"]
    about = f"""# What search adds to token-level guidance

    python benchmarks/search.py

{p["prompts"]} held-out prompts, responses of at most {p["max_tokens"]} tokens, weight 1 on the objective of the column;
guidance by heads{", and beams," if p["beams_model"] else ""} at `beta` {p["beta"]:g} and `top_k` {p["top_k"]}; unguided responses are sampled from the same
{p["top_k"]} candidates, {samples} to a prompt. Gains are in standard deviations of the unguided responses' reward,
with 95 % bootstrap intervals over prompts. Early rejection begins {MANY} responses and goes on with
{", ".join(f"{count} after {length} tokens" for length, count in KEEP.items())}: those of the highest value, of which the reward picks.

*Compute* is in tokens of the base model, prompt and responses that were dropped included; heads and rewards
are free. {f"Beams are of a value model, of which a token counts {p['value_share']:.3f}." if p["beams_model"] else ""}

*KL* to the base model in nats, in brackets: exact at every step and summed for guidance, at most
`log N - (N - 1) / N` more for the choice among `N`, at most `log N` with early rejection; of beams, whose
policy is deterministic, `-log pi_ref` of the response.
"""  # noqa: E501

    def shown(x: dict[str, float]) -> str:
        return f"{x['mean']:+.2f} [{x['low']:+.2f}, {x['high']:+.2f}]"

    objectives = list(result)
    head = "| " + " | ".join(("", "compute", *objectives)) + " |\n" + "| --- " * (2 + len(result))
    lines = [about, "## Gain (KL)", "", head + "|"]
    labels = {name: label for name, label in LABELS.items() if name in result[objectives[0]]}
    for name, label in labels.items():
        entries = [result[o][name] for o in objectives]
        cost = np.mean([e["compute"]["total"] for e in entries])
        cells = [f"{shown(e['gain'])} ({e['kl']:.0f})" for e in entries]
        lines.append(f"| {label} | {cost:.0f} | " + " | ".join(cells) + " |")
    head = head.replace("compute", "N")
    lines += ["", "## Over the unguided best of N by reward, at equal compute", "", head + "|"]
    for name, label in labels.items():
        entries = [result[o][name] for o in objectives]
        n = float(np.mean([e["best_of_n_at_equal_compute"] for e in entries]))
        shown_n = f"{n:.1f}" if n <= samples else f"{n:.1f}, here {samples}"
        cells = [shown(e["gain_over_it"]) for e in entries]
        lines.append(f"| {label} | {shown_n} | " + " | ".join(cells) + " |")
    targets = [result[o]["target"] for o in objectives]
    lines += [
        "", f"## Target: the reward of best of {targets[0]['best_of']} at half of its tokens", "",
        head.replace("| N |", "|") + "|",
        "| tokens of early rejection, share of best of N's | "
        + " | ".join(f"{target['tokens']:.2f}" for target in targets) + " |",
        "| its gain, share of best of N's | "
        + " | ".join(shown(target["gain"]).replace("+", "") for target in targets) + " |",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(result), figsize=(3.8 * len(result), 3.9), layout="constrained", squeeze=False
    )
    for axis, (objective, entry) in zip(axes[0], result.items()):
        for kind in ("reward", "value"):
            points = entry["best_of_n"]
            x = [p["compute"] for p in points]
            axis.plot(x, [p[f"by_{kind}"]["mean"] for p in points], label=f"best of N by {kind}")
        for name, label in LABELS.items():
            if name in ("value", "reward") or name not in entry:
                continue  # a point of the lines, or not measured
            gain = entry[name]["gain"]
            error = [[gain["mean"] - gain["low"]], [gain["high"] - gain["mean"]]]
            x = entry[name]["compute"]["total"]
            axis.errorbar(x, gain["mean"], yerr=error, fmt="o", capsize=2, label=label)
        axis.set_xscale("log")
        axis.set_title(objective)
        axis.set_xlabel("compute, tokens of the base model")
    axes[0][0].set_ylabel("gain in its reward\n(unguided standard deviations)")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", default="artifacts/smollm2")
    add("--heads", default="artifacts/value_model")
    add("--beams-model", help="with a state head; without it, no beams")
    add("--objectives", nargs="+", help="by default all")
    add("--beta", type=float, default=4.0)
    add("--top-k", type=int, default=40)
    add("--max-tokens", type=int, default=48)
    add("--prompts", type=int, default=24)
    add("--plain-samples", type=int, default=16, help=f"a multiple of {N}")
    add("--dtype", default="bfloat16")
    add("--artifacts", type=Path, default=Path("artifacts/search"))
    add("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    if args.plain_samples % N or args.plain_samples < N:
        parser.error(f"--plain-samples must be a multiple of {N}, got {args.plain_samples}")
    models = Models(args)
    jobs = collect(args, models)
    result = measure(models, jobs)
    parameters = {
        "base": args.base, "heads": args.heads, "beams_model": args.beams_model, "beta": args.beta,
        "top_k": args.top_k, "max_tokens": args.max_tokens, "prompts": len(models.prompts),
        "plain_samples": args.plain_samples, "n": N, "value_share": models.value_share,
        "early": {"n": MANY, "keep": KEEP},
        "seconds": {" ".join(map(str, job["job"])): job["seconds"] for job in jobs},
    }  # fmt: skip
    text = json.dumps({"parameters": parameters, "objectives": result}, indent=2)
    table = markdown(result, parameters)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "search.json").write_text(text + "\n")
    (args.out / "search.md").write_text(table)
    plot(result, args.out / "search.png")
    print(table)


if __name__ == "__main__":
    main()
