"""LoRA policies trained with TRL's `GRPOTrainer`, the baselines of `pareto.py`.

    python benchmarks/_policies.py        # one policy per objective, and MORLHF at two mixes

One policy per objective is what Rewarded Soups and MOD combine; MORLHF trains on a weighted sum of
the rewards. A finished policy is found on disk and not trained again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import rewards  # noqa: E402

# The conflicting pair comes first: its front is complete early.
POLICIES: dict[str, dict[str, float]] = {
    "readability": {"readability": 1.0},
    "rarity": {"rarity": 1.0},
    "morlhf 0.5 readability + 0.5 rarity": {"readability": 0.5, "rarity": 0.5},
    "positivity": {"positivity": 1.0},
    "relevance": {"relevance": 1.0},
    "morlhf 0.25 readability + 0.75 rarity": {"readability": 0.25, "rarity": 0.75},
}


@dataclass(frozen=True)
class Budget:
    """Of one policy: `steps * completions * max_tokens` tokens sampled at most."""

    steps: int = 12
    completions: int = 32
    generations: int = 8  # of each prompt
    max_tokens: int = 48
    top_k: int = 40
    learning_rate: float = 1e-3
    beta: float = 0.02  # KL penalty
    rank: int = 16


def standardised(name: str, mean: float, std: float) -> Any:
    """A reward function in standard deviations of the base model's reward."""
    function = getattr(rewards, name)

    def reward(**columns: Any) -> list[float]:
        return [(value - mean) / std for value in function(**columns)]

    reward.__name__ = name
    return reward


class Sampler:
    """Samples completions for `GRPOTrainer` from a bfloat16 copy that holds the merged weights.

    On a CPU this takes half the time of the trainer's own generation with an unmerged adapter.
    """

    def __init__(self, base: Path, tokenizer: Any, budget: Budget) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
        self.tokenizer = tokenizer
        self.budget = budget

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        import torch
        from peft.tuners.lora import LoraLayer

        with torch.inference_mode():
            for name, module in trainer.model.named_modules():
                if isinstance(module, LoraLayer):
                    target = self.model.get_submodule(name.removeprefix("base_model.model."))
                    merged = module.base_layer.weight + module.get_delta_weight("default")
                    target.weight.copy_(merged)
            batch = self.tokenizer.apply_chat_template(
                prompts,
                add_generation_prompt=True,
                padding=True,
                return_dict=True,
                return_tensors="pt",
            )
            # The trainer's training step runs under autocast, which would cast every weight again.
            with torch.autocast("cpu", enabled=False):
                output = self.model.generate(
                    **batch,
                    do_sample=True,
                    temperature=1.0,
                    top_k=self.budget.top_k,
                    top_p=1.0,
                    max_new_tokens=self.budget.max_tokens,
                    pad_token_id=self.tokenizer.eos_token_id,
                )
        eos = self.tokenizer.eos_token_id
        rows = output[:, batch["input_ids"].shape[1] :].tolist()
        completions = [row[: row.index(eos) + 1] if eos in row else row for row in rows]
        prompt_ids = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"])
        ]
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}


def train(
    folder: Path,
    base: Path,
    prompts: list[Any],
    weights: dict[str, float],
    scale: dict[str, tuple[float, float]],
    budget: Budget,
) -> dict[str, Any]:
    """Trains one policy into `folder`, or reads the record of one that is there.

    Args:
        folder: Adapters after half of the steps and all, `checkpoint-N`, and `training.json`, which
            is written last.
        base: The base model.
        prompts: Conversations.
        weights: Of the objectives.
        scale: Mean and standard deviation of every objective's reward under the base model.
        budget: What training may cost.

    Returns:
        The record: budget, tokens sampled, minutes, rewards by step.
    """
    record = folder / "training.json"
    wanted = {"weights": weights, "budget": asdict(budget)}
    if record.exists():
        found: dict[str, Any] = json.loads(record.read_text())
        if {key: found[key] for key in wanted} != wanted:
            raise ValueError(f"{folder} was trained with other settings: remove it to train again")
        return found

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    trainer = GRPOTrainer(
        # On a CPU, three times as fast under bfloat16 autocast as bfloat16 weights.
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        reward_funcs=[standardised(name, *scale[name]) for name in weights],
        args=GRPOConfig(
            output_dir=str(folder),
            reward_weights=list(weights.values()),
            learning_rate=budget.learning_rate,
            lr_scheduler_type="constant",
            max_steps=budget.steps,
            per_device_train_batch_size=budget.completions,
            num_generations=budget.generations,
            max_completion_length=budget.max_tokens,
            temperature=1.0,
            top_k=budget.top_k,
            beta=budget.beta,
            gradient_checkpointing=False,
            logging_steps=1,
            save_steps=budget.steps // 2,
            save_only_model=True,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            seed=0,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        rollout_func=Sampler(base, tokenizer, budget),
        peft_config=LoraConfig(
            r=budget.rank,
            lora_alpha=2 * budget.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    started = time.monotonic()
    trainer.train()
    minutes = (time.monotonic() - started) / 60
    log = [row for row in trainer.state.log_history if "reward" in row]
    result = {
        **wanted,
        "minutes": minutes,
        "tokens": sum(row["completions/mean_length"] * budget.completions for row in log),
        "reward": [row["reward"] for row in log],
        "kl": [row.get("kl", 0.0) for row in log],
    }
    record.write_text(json.dumps(result, indent=2) + "\n")
    return result


def train_all(
    folder: Path, base: Path, prompts: list[Any], value_model: Path, budget: Budget
) -> dict[str, dict[str, Any]]:
    """The record of every policy, trained where it is not there yet."""
    config = json.loads((value_model / "config.json").read_text())
    scale = dict(zip(config["objectives"], zip(config["reward_mean"], config["reward_std"])))
    records = {}
    for name, weights in POLICIES.items():
        if set(weights) <= set(scale):
            target = folder / name.replace(" ", "_")
            records[name] = train(target, base, prompts, weights, scale, budget)
            print(name, f"{records[name]['minutes']:.1f} min", flush=True)
    return records


def read_prompts(split: str) -> list[Any]:
    """The demo's prompts of a split."""
    rows = map(json.loads, (ROOT / "examples/prompts.jsonl").read_text().splitlines())
    return [row["prompt"] for row in rows if row["split"] == split]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=Path("artifacts/smollm2"))
    parser.add_argument("--value-model", type=Path, default=Path("artifacts/state"))
    parser.add_argument("--folder", type=Path, default=Path("artifacts/pareto/policies"))
    parser.add_argument("--steps", type=int, default=Budget.steps)
    args = parser.parse_args()
    budget = Budget(steps=args.steps)
    train_all(args.folder, args.base, read_prompts("train"), args.value_model, budget)


if __name__ == "__main__":
    main()
