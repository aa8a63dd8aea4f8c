"""The iterations of MAVIS: what each learns from and ends with, and what its policies have gained.

Iteration `n` samples from the policy of iteration `n - 1`. With exact values it ends with a policy
of a higher `reward - KL / beta` (arXiv 2508.13415, section 4); with learnt ones that has to be
measured, and [`PolicyHistory`] does, on held-out prompts.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import is_peft_model
from transformers import Trainer, set_seed
from transformers.utils import logging

from trimtab.plugins.cards import provenance
from trimtab.plugins.value_config import load_config

from .fingerprints import state_fingerprint
from .run_state import RunState, adapter_of, arguments_of, trees_fingerprint
from .statistics import interval, prompt_draws
from .trees import StoredTrees, Tree

logger = logging.get_logger(__name__)


class Iterations:
    """
    Collects, trains, saves and measures for a [`MAVISTrainer`], an iteration after the other.

    Args:
        trainer ([`MAVISTrainer`]):
            Whose rollouts, model and arguments it uses.

    Attributes:
        current (`int`):
            The iteration that is made.
        base_trees (`dict[str, StoredTrees]`):
            The first one's trees by dataset, once they are collected.
        trees (`StoredTrees`):
            Those of all iterations so far to train on.
        history ([`PolicyHistory`]):
            Measures of the policies.
        run ([`RunState`]):
            What the training that runs is made from, and how far it is.
    """

    run: RunState

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.current = 0
        self.base_trees: dict[str, StoredTrees] = {}
        self.trees = StoredTrees([])
        self.history = PolicyHistory(trainer.args.beta)
        self._trainings = 0  # that have begun

    @functools.cached_property
    def _first_weights(self) -> str:
        """Of the model as it was given, or made from the base model."""
        return state_fingerprint(self.trainer.model)

    def collect(self) -> None:
        """Collects the trees of the first iteration, once, and the statistics of their rewards."""
        trainer, config = self.trainer, self.trainer.value_config
        if not self.base_trees:
            trees = trainer._collection.of_base_model(trainer.state)
            statistics = trainer._sources.statistics(trees["train"])
            config.reward_mean, config.reward_std = statistics
            self.base_trees = trees
            self._begin()

    def _begin(self) -> None:
        """Everything as before the first iteration, but for the weights."""
        trainer, config, trees = self.trainer, self.trainer.value_config, self.base_trees
        self.current, self.trees = 0, trees["train"]
        config.candidate_scale = None  # what it came with is of other values
        rollouts, within = trainer._sources.describe(trainer.tree_config)
        training = {
            name: getattr(trainer.args, name)
            for name in ("learning_rate", "num_train_epochs", "per_device_train_batch_size")
        }
        training["leaf_fraction"] = trainer.args.leaf_fraction
        config.provenance = provenance(rollouts=rollouts, training=training, reward_std=within)
        trainer._training.pack(trees)
        self.history = PolicyHistory(trainer.args.beta)
        if len(trees) > 1 and trainer.args.num_iterations > 1:
            base = dict.fromkeys(trainer.objectives, held_out(trees))
            self.history.add(base, config.reward_mean, config.reward_std)

    def train(self, resume: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        """Trains every iteration that `resume` does not find finished, and takes up the best;
        `args` and `kwargs` are of [`~transformers.Trainer.train`], whose last output it returns."""
        trainer = self.trainer
        several = trainer.args.num_iterations > 1
        if self._trainings:
            self._begin()
        made_from = self._made_from()
        main = trainer.is_world_process_zero()
        merged = is_peft_model(trainer.model) and trainer.args.merge_adapter
        self.run = RunState.read(trainer.args, main, merged)
        trainer.accelerator.wait_for_everyone()  # before one of the processes writes it
        self._trainings += 1
        warmup_steps = trainer.args.warmup_steps
        output = None
        try:
            for iteration in range(trainer.args.num_iterations):
                if several:
                    trainer.optimizer = trainer.lr_scheduler = None
                    trainer.model_wrapped = trainer.model
                if iteration:
                    # A schedule of its own, without warm-up: the values are near already.
                    trainer.args.warmup_steps = 0
                    before = self.run.iterations[iteration - 1]
                    made_from["start"] = before["weights"]["value_model"]
                self.run.inputs = {**made_from, **self._data()}
                if resume and self.run.is_finished(iteration):
                    trainer._load_from_checkpoint(str(self.run.weights(iteration)))
                else:
                    checkpoint = self.run.begin(iteration, resume, trainer._get_output_dir(None))
                    trainer._training.resume(checkpoint)
                    # Engines and reward functions have drawn random numbers, or not where all is
                    # stored.
                    set_seed(trainer.args.seed)
                    output = Trainer.train(trainer, checkpoint, *args, **kwargs)
                    resume = False
                    trainer._training.finish()
                    if several:
                        self._save()
                    self.run.finish(iteration, several)
                if several:
                    self._collect_from_policy()
        finally:
            trainer.args.warmup_steps = warmup_steps
        self._keep_best()
        return output

    def _made_from(self) -> dict[str, Any]:
        """What all iterations of this call of `train` are made from, of [`RunState`]'s inputs."""
        trainer, start = self.trainer, self._first_weights
        if self._trainings:
            start = f"{start}, trained {self._trainings} times before"
        return {
            "arguments": arguments_of(trainer.args),
            "base model": trainer._collection.base_weights,
            "start": start,
            **adapter_of(trainer.model),
        }

    def _data(self) -> dict[str, Any]:
        """What the iteration learns from, of [`RunState`]'s inputs."""
        data: dict[str, Any] = {"rollouts": trees_fingerprint(self.trees)}
        if not self.trainer.on_policy:
            data["on policy"] = False
        if len(self.base_trees) > 1:
            data["eval rollouts"] = trees_fingerprint(held_out(self.base_trees))
        return data

    def _save(self) -> None:
        """Saves what the iteration has ended with, each folder whole or not at all."""
        trainer = self.trainer
        for folder in self.run.folders(self.current):
            partial = folder.with_name(f"{folder.name}.partial")
            if trainer.is_world_process_zero():
                shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
            trainer.accelerator.wait_for_everyone()
            trainer.save_model(str(partial), _internal_call=True)
            trainer.accelerator.wait_for_everyone()
            if trainer.is_world_process_zero():
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
        trainer.accelerator.wait_for_everyone()

    def _collect_from_policy(self) -> None:
        """Measures the policy of the last iteration, and samples from it for the next one."""
        trainer, value_model = self.trainer, self.run.value_model(self.current)
        self.current += 1
        names = list(trainer._sources.prompts)
        if self.current == trainer.args.num_iterations:
            names.remove("train")
        by_name = trainer._collection.of_policies(names, trainer.state, self.current, value_model)
        if set(names) - {"train"}:
            self._measure(by_name, value_model)
        if "train" in names:
            self.trees = sum(by_name["train"].values(), self.trees)
            trainer._training.pack_policies(by_name, self.current, value_model)

    def _measure(self, by_name: dict[str, dict[str, StoredTrees]], value_model: Path) -> None:
        """Measures the policies that a value model guides, on trees by dataset and objective."""
        trainer, config = self.trainer, self.trainer.value_config
        measures = {
            objective: held_out({name: of[objective] for name, of in by_name.items()})
            for objective in trainer.objectives
        }
        self.history.add(measures, config.reward_mean, config.reward_std)
        measured = self.history.policies[-1]
        scales = load_config(str(value_model)).candidate_scale
        for name, scale in zip(trainer.objectives, scales or []):
            measured[name]["candidate_scale"] = scale
        trainer.log(
            {
                f"policy/{measure}/{name}": measured[name][measure]["value"]
                for name in trainer.objectives
                for measure in ("reward", "kl", "objective", "improvement")
            }
        )
        if trainer.is_world_process_zero():
            self.history.write(Path(trainer.args.output_dir))
        if trainer.args.monotonic_check:
            for message in self.history.warnings():
                logger.warning(message)

    def _keep_best(self) -> None:
        """Takes up the weights of the best iteration, where that has been measured."""
        trainer, config, last = self.trainer, self.trainer.value_config, self.current - 1
        measured = len(self.history.policies) > 1
        found = None
        if measured or (last >= 0 and config.head_type == "hidden"):
            kept = self.history.best() if measured else last
            trainer._load_from_checkpoint(str(self.run.weights(kept)))
            found = load_config(str(self.run.value_model(kept)))
            config.candidate_scale = found.candidate_scale
        if measured:
            logger.info(f"the policies of iteration {kept} are the best")
            config.provenance["iterations"] = {
                **self.history.to_json(),
                "kl_penalty": trainer.args.kl_penalty,
                "kept": kept,
            }
        trainer._training.conclude(found)


def held_out(by_name: Mapping[str, StoredTrees]) -> StoredTrees:
    """Of trees by dataset those of all that are evaluated on."""
    return sum((trees for name, trees in by_name.items() if name != "train"), StoredTrees([]))


class PolicyHistory:
    """
    Measures of the policies of all iterations, the base model's first.

    Every second prompt is held back to choose the best iteration on; the measures are those on the
    others. A single prompt serves both. Prompts without a reward of an objective are left out of
    its measures.

    Args:
        beta (`float`):
            Of the regularised objective `reward - KL / beta`.
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.policies: list[dict[str, Any]] = []  # by objective
        self.prompts = {"chosen on": 0, "reported on": 0}
        self._objectives: list[dict[str, np.ndarray]] = []  # each prompt's, of every policy
        self._choices: list[float] = []  # mean objective on the prompts held back

    def add(
        self,
        trees: Mapping[str, Sequence[Tree]],
        mean: Sequence[float] | np.ndarray,
        std: Sequence[float] | np.ndarray,
    ) -> None:
        """
        Adds a policy.

        Args:
            trees (`dict[str, list[Tree]]`):
                For every objective, rollouts of the policy of that objective alone, of the same
                prompts as those of the other policies.
            mean (`list[float]`):
                Of every objective's reward, as in the value model.
            std (`list[float]`):
                Of every objective's reward.
        """
        count = len(next(iter(trees.values())))
        held_back = np.arange(count) % 2 == 1
        reported = ~held_back if count > 1 else np.ones(1, dtype=bool)
        held_back = held_back if count > 1 else reported
        self.prompts = {"chosen on": int(held_back.sum()), "reported on": int(reported.sum())}
        draws = prompt_draws(int(reported.sum()))
        policy: dict[str, Any] = {}
        regularised = {}
        for (name, of_objective), m, s in zip(trees.items(), mean, std):
            reward = np.array([(tree.values(name)[0] - m) / s for tree in of_objective])
            kl = np.array([tree.kl() for tree in of_objective])
            regularised[name] = reward - kl / self.beta
            measured = {"reward": reward, "kl": kl, "objective": regularised[name]}
            if self._objectives:
                measured["improvement"] = regularised[name] - self._objectives[-1][name]
            policy[name] = {
                k: interval(np.nanmean(x[reported][draws], 1)) for k, x in measured.items()
            }
        self.policies.append(policy)
        self._objectives.append(regularised)
        self._choices.append(
            float(np.mean([np.nanmean(x[held_back]) for x in regularised.values()]))
        )

    def best(self) -> int:
        """The iteration whose policies have the highest mean objective on prompts held back."""
        return int(np.argmax(self._choices[1:]))

    def warnings(self) -> list[str]:
        """What to say of objectives that the last iteration did not improve."""
        messages = []
        for name, measured in self.policies[-1].items():
            gained = measured["improvement"]
            if gained["value"] > 0:
                continue
            messages.append(
                f"iteration {len(self.policies) - 2} did not improve the regularised objective of "
                f"{name!r} (reward - KL / beta, beta={self.beta:g}): it changed by "
                f"{gained['value']:.3g} [{gained['low']:.3g}, {gained['high']:.3g}], at a KL of "
                f"{measured['kl']['value']:.3g} nats. More prompts or larger trees (`layers`) make "
                "values less noisy; a smaller `beta` keeps the policy nearer to the responses "
                "that the values were learnt from"
            )
        return messages

    def to_json(self) -> dict[str, Any]:
        """All measures, each with its 95 % bootstrap interval over the prompts."""
        return {
            "beta": self.beta,
            "prompts": self.prompts,
            "choice": self._choices[1:],
            "policies": self.policies,
        }

    def write(self, folder: Path) -> None:
        """Writes `iterations.json`, and `iterations.png` if matplotlib is installed."""
        (folder / "iterations.json").write_text(json.dumps(self.to_json(), indent=2) + "\n")
        if find_spec("matplotlib"):
            plot_policies(self.policies, self.beta, folder / "iterations.png")


def plot_policies(policies: Sequence[dict[str, Any]], beta: float, path: Path) -> None:
    """
    Plots the regularised objective, the reward and the KL of every iteration's policies.

    Args:
        policies (`list[dict]`):
            Of a [`PolicyHistory`].
        beta (`float`):
            Of the regularised objective.
        path (`Path`):
            PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    labels = ["base", *map(str, range(len(policies) - 1))]
    titles = {
        "objective": f"reward - KL / {beta:g}",
        "reward": "reward (the base model's deviations within a prompt)",
        "kl": "KL to the base model (nats a response)",
    }
    for axis, (measure, title) in zip(axes, titles.items()):
        for name in policies[0]:
            points = [policy[name][measure] for policy in policies]
            values = np.array([p["value"] for p in points])
            ends = np.array([[p["low"], p["high"]] for p in points]).T
            axis.errorbar(labels, values, np.abs(ends - values), marker="o", capsize=3, label=name)
        axis.set_xlabel("iteration")
        axis.set_title(title, fontsize=10)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
