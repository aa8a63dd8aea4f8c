"""Fronts of the demo's four rewards: value heads, best-of-N, and both together.

    python benchmarks/fronts.py            # ten minutes on two cores, an interrupted run goes on

Held-out prompts of the demo, sampled by vLLM from the 40 likeliest tokens; a method's figure at a
KL is read off along its strengths. `pareto.py` has fine-tuned policies and prompting, beside a
state head. Writes `docs/fronts.json`, `.md` and `.png`.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from trimtab.plugins.value_config import load_config
from trimtab.trainers import Policy, Response, evaluate, sweep, write_report
from trimtab.trainers.base_model import end_tokens
from trimtab.trainers.fingerprints import guidance_fingerprint
from trimtab.trainers.samplers import VLLMSampler
from trimtab.trainers.trees import TreeConfig

sys.path.insert(0, str(Path(__file__).parent))
from _policies import ROOT, read_prompts, rewards
from pareto import CONFLICT, OBJECTIVES, REFERENCES, TOP_K, all_weights, claim

BETAS = (4.0, 8.0)
BEST_OF = (4, 16)
OF_GUIDED = 4
KL_BUDGETS = (2.0, 5.0, 10.0)  # nats a response


def bound(count: int) -> float:
    """What choosing the best of so many adds to the KL at most, in nats."""
    return math.log(count) - (count - 1) / count


class Arms:
    """The methods, over one engine that is made when something is left to sample."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.base)
        config = load_config(str(args.value_model))
        statistics = zip(config.objectives or (), config.reward_mean or (), config.reward_std or ())
        self.scale = {name: (mean, std) for name, mean, std in statistics}

    @functools.cached_property
    def sampler(self) -> Any:
        """Of `beta` 1, which weights are multiplied by."""
        ends = end_tokens(str(self.args.base), self.tokenizer)
        return VLLMSampler(
            str(self.args.base),
            TreeConfig(top_k=TOP_K),
            ends,
            max_model_len=512,
            value_models=[str(self.args.value_model)],
            init_kwargs={"enforce_eager": True, "distributed_executor_backend": "uni"},
        )

    @functools.cache  # noqa: B019
    def responses(self, beta: float, weights: tuple[tuple[str, float], ...], sample: int) -> Any:
        """A response to every prompt."""
        prefixes = [
            self.tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False)
            for p in self.args.prompts
        ]
        count = len(prefixes)
        scaled = {name: beta * weight for name, weight in weights if beta * weight}
        pieces = self.sampler(
            prefixes,
            [self.args.max_tokens] * count,
            [100_000 * sample + i for i in range(count)],
            scaled or None,
        )
        texts = self.tokenizer.batch_decode([p.tokens for p in pieces], skip_special_tokens=True)
        return [
            Response(text, p.tokens, log_ratio=sum(p.log_ratios), kl=sum(p.kls))
            for text, p in zip(texts, pieces)
        ]

    def plain(self, beta: float) -> Callable[..., Sequence[Response]]:
        def respond(prompts: Any, weights: Mapping[str, float], seed: int) -> Sequence[Response]:
            return self.responses(beta, tuple(weights.items()) if beta else (), seed)

        return respond

    def best_of(self, count: int, beta: float = 0.0) -> Callable[..., Sequence[Response]]:
        """The best of `count` by the weighted rewards; its KL is an upper bound."""

        def respond(prompts: Any, weights: Mapping[str, float], seed: int) -> Sequence[Response]:
            chosen = tuple(weights.items()) if beta else ()
            rounds = [self.responses(beta, chosen, seed * count + i) for i in range(count)]
            total = np.zeros((count, len(prompts)))
            for name, weight in weights.items():
                mean, std = self.scale[name]
                for i, found in enumerate(rounds):
                    texts = [[{"role": "assistant", "content": r.text}] for r in found]
                    scores = getattr(rewards, name)(prompts=prompts, completions=texts)
                    total[i] += weight * (np.array(scores) - mean) / std
            return [
                Response(
                    group[best].text,
                    group[best].token_ids,
                    kl=float(np.mean([r.kl for r in group])) + bound(count),
                    cost=sum(len(r.token_ids) for r in group),
                )
                for group, best in zip(zip(*rounds), total.argmax(0))
            ]

        return respond

    def policies(self) -> list[Policy]:
        seeds, largest = self.args.seeds, max(self.args.best_of)
        arms = [Policy("unguided", self.plain(0.0), weights=[{}])]
        for beta in self.args.betas:
            arms.append(Policy("heads", self.plain(beta), beta))
            name = f"heads, best of {OF_GUIDED}"
            few = max(1, seeds // OF_GUIDED)  # the same responses, in groups
            respond = self.best_of(OF_GUIDED, beta)
            arms.append(Policy(name, respond, beta, seeds=few))
        for count in self.args.best_of:
            few = max(1, min(seeds, largest // count))  # disjoint parts of one pool
            arms.append(Policy(f"best of {count}", self.best_of(count), count, seeds=few))
        return arms


def intro(result: Mapping[str, Any]) -> str:
    """What the tables compare, and the hypervolumes that matter most."""
    given = result["parameters"]
    lines = [
        "# Fronts of the demo's rewards: heads and best-of-N",
        "",
        f"{given['prompts']} held-out prompts of the demo, up to {given['seeds']} responses of at "
        f"most {given['max_tokens']} tokens each, from the {given['top_k']} likeliest tokens; "
        f"`beta` {', '.join(f'{b:g}' for b in given['betas'])}. `python benchmarks/fronts.py`.",
        "",
        "* KL to the base model of guided responses is exact; best-of-N adds at most "
        "`log N - (N - 1) / N` nats.",
        "* Best-of-N chooses by the weighted rewards themselves. Strength: `beta`, or N.",
        "",
        "| hypervolume in | at most, nats | " + " | ".join(given["methods"]) + " |",
        "|" + " --- |" * (2 + len(given["methods"])),
    ]
    for plane in result["planes"]:
        for budget in given["kl_budgets"]:
            found = {r["method"]: r for r in plane["matched"] if r["kl"] == budget}
            cells = [
                "{value:.2f} [{low:.2f}, {high:.2f}]".format(**found[m]) if m in found else ""
                for m in given["methods"]
            ]
            lines.append(f"| {', '.join(plane['objectives'])} | {budget:g} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=Path("artifacts/smollm2"))
    parser.add_argument("--value-model", type=Path, default=Path("artifacts/value_model"))
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts/fronts"))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--betas", nargs="+", type=float, default=list(BETAS))
    parser.add_argument("--best-of", nargs="+", type=int, default=list(BEST_OF))
    parser.add_argument("--report", type=Path, default=ROOT / "docs/fronts")
    args = parser.parse_args()
    settings = {
        "base": str(args.base), "value_model": guidance_fingerprint(args.value_model),
        "top_k": TOP_K, "max_tokens": args.max_tokens,
    }  # fmt: skip
    claim(args.artifacts, settings)  # responses of others are not taken for theirs
    args.prompts = read_prompts("test")[: args.prompts]
    policies = Arms(args).policies()
    points = sweep(
        policies,
        args.prompts,
        all_weights(),
        {o: getattr(rewards, o) for o in OBJECTIVES},
        args.artifacts / "points",
        seeds=args.seeds,
    )
    result = evaluate(
        points,
        [CONFLICT],
        KL_BUDGETS,
        against=("heads", args.betas[-1]),
        references=REFERENCES,
    )
    result["parameters"] = {
        "base": str(args.base), "value_model": str(args.value_model),
        "prompts": len(args.prompts), "seeds": args.seeds, "max_tokens": args.max_tokens,
        "top_k": TOP_K, "betas": args.betas, "kl_budgets": KL_BUDGETS,
        "methods": list(dict.fromkeys(p.method for p in policies if p.method != "unguided")),
    }  # fmt: skip
    *files, page = write_report(result, args.report, intro(result))
    page.unlink()  # of pareto.py alone
    print(*files, sep="\n")
    print(intro(result))


if __name__ == "__main__":
    main()
