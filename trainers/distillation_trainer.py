"""The trainer that distils value models into one: another head, fewer layers, several in one.

Checkpoints, resuming, logging, distribution and the hub are those of [`~transformers.Trainer`].
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging

from trimtab.plugins.probe import check_servable
from trimtab.plugins.value_model import (
    MAVISValueModel,
    provenance,
    tokenizer_fingerprint,
)

from .candidates import RANGE_SEQUENCES, add_candidates, read_candidates
from .distillation_config import MAVISDistillationConfig
from .fingerprints import digest_of, state_fingerprint
from .mavis_trainer import (
    ValueModelTrainer,
    check_tree_attention,
    end_tokens,
    load_base_model,
    read_weights_in_every_process,
    refuse_data_parallel,
    set_candidate_range,
    tree_collator,
)
from .packing import TreeDataset
from .rollouts import Tree, read_rollouts
from .run_state import trees_fingerprint

logger = logging.get_logger(__name__)


class MAVISDistillationTrainer(ValueModelTrainer):
    """
    Trainer that distils one or several MAVIS value models into one.

    Along stored rollouts, the student learns the differences between the teachers' values of the
    base model's likeliest next tokens, which is what guides. A teacher with a `"state"` head and a
    student with an `"action"` head make guidance nearly free; several teachers of an objective each
    make one student of them all (the distillation of
    [arXiv 2508.13415](https://huggingface.co/papers/2508.13415)).

    This class is a wrapper around the [`~transformers.Trainer`] class and inherits all of its
    attributes and methods.

    Example:

    ```python
    >>> from trimtab.trainers import MAVISDistillationConfig, MAVISDistillationTrainer

    >>> trainer = MAVISDistillationTrainer(
    ...     model="HuggingFaceTB/SmolLM2-135M-Instruct",
    ...     teachers="value-model",
    ...     args=MAVISDistillationConfig(output_dir="action-model"),
    ...     train_dataset="value-model/rollouts/train",
    ... )
    >>> trainer.train()
    >>> trainer.save_model()
    ```

    Args:
        model (`str` or [`~trimtab.plugins.MAVISValueModel`]):
            Student to be trained. Can be either:

            - A string, being the id or path of the *base model* to guide. The student has the head
              and the depth that `args` say. It starts from the teacher's backbone if there is a
              single teacher of equal depth, else from the base model's first blocks.
            - A value model, whose objectives are those of the teachers, in order.
        teachers (`str`, [`~trimtab.plugins.MAVISValueModel`] or a list of them):
            Value models to learn from, or their ids or paths. The student's objectives are all of
            theirs, in order.
        args ([`MAVISDistillationConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset (`str`, `Path` or `list` of [`Tree`]):
            Rollouts, or the folder where [`MAVISTrainer`] stored them. Their rewards are not used.
        eval_dataset (`str`, `Path` or `list` of [`Tree`], *optional*):
            Rollouts to evaluate on.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The base model's tokenizer. If `None`, it is loaded with
            [`~transformers.AutoTokenizer.from_pretrained`].
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            List of callbacks to customize the training loop.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            A tuple containing the optimizer and the scheduler to use.
    """

    def __init__(
        self,
        model: str | MAVISValueModel,
        teachers: str | MAVISValueModel | Sequence[str | MAVISValueModel],
        args: MAVISDistillationConfig | None = None,
        train_dataset: str | Path | Sequence[Tree] | None = None,
        eval_dataset: str | Path | Sequence[Tree] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[
            torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None
        ] = (None, None),
    ) -> None:
        read_weights_in_every_process()
        base_model = model if isinstance(model, str) else getattr(model.config, "base_model", None)
        if base_model is None:
            raise ValueError(
                "`model` is a value model that names no base model, whose candidates are compared; "
                "make it with MAVISValueModel.from_base_model"
            )
        if args is None:
            args = MAVISDistillationConfig(f"{base_model.split('/')[-1]}-MAVIS-distilled")
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(base_model)
        self.base_model = base_model
        self.teachers = load_teachers(teachers, tokenizer_fingerprint(processing_class))
        configs = [teacher.config for teacher in self.teachers]
        self.objectives = [name for config in configs for name in config.objectives or []]
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(
                f"two teachers have an objective of one name, their objectives are "
                f"{self.objectives}; train them with distinct names"
            )
        self.top_k = args.top_k or max(config.top_k for config in configs)

        set_seed(args.seed)
        student = model if isinstance(model, MAVISValueModel) else self._make_student(args)
        if list(student.config.objectives or []) != self.objectives:
            raise ValueError(
                f"the student has the objectives {student.config.objectives}, the teachers "
                f"{self.objectives}; they must be the same in the same order"
            )
        longest = getattr(student.config.text_config, "max_position_embeddings", args.max_length)
        check_servable(student, min(longest, args.max_length))
        student.backbone.requires_grad_(not args.freeze_backbone)
        student.get_input_embeddings().requires_grad_(False)
        self.value_config = student.config
        self.value_config.tokenizer_fingerprint = tokenizer_fingerprint(processing_class)
        self.value_config.top_k = self.top_k
        self.value_config.reward_mean = [x for c in configs for x in c.reward_mean or []]
        self.value_config.reward_std = [x for c in configs for x in c.reward_std or []]
        scales = [x for c in configs for x in c.candidate_scale or [1.0] * len(c.objectives or [])]
        scaled = any(c.candidate_scale for c in configs)
        self.value_config.candidate_scale = scales if scaled else None
        self.value_config.provenance = provenance(
            teachers=[{"name": c.name_or_path, "provenance": c.provenance} for c in configs],
            training={
                name: getattr(args, name)
                for name in (
                    "learning_rate",
                    "head_learning_rate",
                    "num_train_epochs",
                    "per_device_train_batch_size",
                    "freeze_backbone",
                    "positions_per_sequence",
                    "uniform_weight",
                    "value_weight",
                )
            },
        )
        self.eos_token_ids = end_tokens(base_model, processing_class)
        collator = tree_collator(student, self.eos_token_ids)
        self.args = args  # before `Trainer` sets it: the rollouts are checked by the base model
        self._data: dict[str, Any] = {}  # fingerprints of the rollouts
        self._added_candidates = False

        super().__init__(
            model=student,
            args=args,
            data_collator=collator,
            train_dataset=self._pack("train", train_dataset, args),
            eval_dataset=(None if eval_dataset is None else self._pack("eval", eval_dataset, args)),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        refuse_data_parallel(args)
        for teacher in self.teachers:
            torch.nn.Module.to(teacher, args.device)
        # Evaluation computes the loss only if both are set.
        self.can_return_loss = True
        self.label_names = []
        self._metrics = {
            "train": DifferenceMetrics(self.objectives),
            "eval": DifferenceMetrics(self.objectives),
        }

    def _make_student(self, args: MAVISDistillationConfig) -> MAVISValueModel:
        """A student of the base model's blocks, or of the only teacher's if they are as many."""
        student = MAVISValueModel.from_base_model(
            load_base_model(self.base_model, args),
            self.objectives,
            num_hidden_layers=args.num_hidden_layers,
            head_type=args.head_type,
            action_rank=args.action_rank,
        )
        teacher = self.teachers[0]
        shapes = [
            {name: weight.shape for name, weight in m.backbone.state_dict().items()}
            for m in (student, teacher)
        ]
        if len(self.teachers) == 1 and shapes[0] == shapes[1]:
            student.backbone.load_state_dict(teacher.backbone.state_dict())
            student.head.load_state_dict(teacher.head.state_dict())
            # Left to train, Adam would make steps of the rounding errors of its gradient.
            student.head.requires_grad_(not (args.freeze_backbone and args.head_type == "action"))
        return student

    def _pack(self, name: str, rollouts: Any, args: MAVISDistillationConfig) -> TreeDataset:
        trees = rollouts
        if isinstance(rollouts, (str, Path)):
            self._check_rollouts(name, Path(rollouts))
            trees = read_rollouts(rollouts)
        if not trees or not all(isinstance(tree, Tree) for tree in trees):
            raise ValueError(
                f"`{name}_dataset` has no rollouts, got {rollouts!r}; give the folder where "
                "MAVISTrainer stored them (`rollout_dir` and in it 'train' or 'eval'), or a list "
                "of trees"
            )
        trees = [dataclasses.replace(tree, rewards={}) for tree in trees]  # they are not needed
        self._data[f"{name} rollouts"] = trees_fingerprint(trees)
        nothing = np.zeros(0)
        return TreeDataset(
            trees, [], nothing, nothing, args.max_length, args.leaf_fraction, args.seed
        )

    def _check_rollouts(self, name: str, folder: Path) -> None:
        """Refuses rollouts of another tokenizer, warns of those of another base model."""
        path = folder / "rollouts.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        vocabulary = self.value_config.tokenizer_fingerprint
        if found.get("tokenizer_fingerprint", vocabulary) != vocabulary:
            raise ValueError(
                f"`{name}_dataset` {str(folder)!r} holds rollouts of {found.get('base_model')!r}, "
                f"whose tokenizer is not that of {self.base_model!r}; sample them from this model"
            )
        if found.get("base_model_weights", self._base_weights) != self._base_weights:
            logger.warning(
                f"`{name}_dataset` {str(folder)!r} holds rollouts of {found.get('base_model')!r}, "
                f"whose weights are not those of {self.base_model!r}: the student learns where "
                "that model goes, not this one"
            )

    def add_candidates(self) -> None:
        """
        Finds the base model's candidates and the teachers' values along the rollouts, once.

        [`~MAVISDistillationTrainer.train`] and [`~MAVISDistillationTrainer.evaluate`] call it; a
        second call does nothing.
        """
        if self._added_candidates:
            return
        check_tree_attention(self, self.train_dataset.sequences)
        base_model = load_base_model(self.base_model, self.args)
        for dataset in (self.train_dataset, self.eval_dataset):
            if dataset is not None:
                add_candidates(
                    dataset.sequences,
                    base_model,
                    self.teachers,
                    self.data_collator,
                    self.top_k,
                    self.args.positions_per_sequence,
                    self.eos_token_ids,
                    self.accelerator,
                    self.args.seed,
                )
        self._added_candidates = True

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """
        Finds the candidates, trains on them and measures the student's `candidate_range`.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                If `True`, goes on with the last complete checkpoint; or the path of one. It must
                have been made from the same rollouts, teachers and arguments.
            args, kwargs:
                Further arguments of [`~transformers.Trainer.train`].
        """
        self.add_candidates()
        teachers = [
            f"{state_fingerprint(teacher)} {digest_of(teacher.config.candidate_scale)}"
            for teacher in self.teachers
        ]
        self._inputs = {**self._begin_run(), **self._data, "teachers": teachers}
        output = self._train_once(0, resume_from_checkpoint, *args, **kwargs)
        self._run.finish(0, {}, self.is_world_process_zero())
        set_candidate_range(self, self.train_dataset.sequences[:RANGE_SEQUENCES])
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """
        Evaluates on the rollouts of the trainer's `eval_dataset`. Arguments are those of
        [`~transformers.Trainer.evaluate`].
        """
        self.add_candidates()
        return super().evaluate(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of [`~transformers.Trainer`], with a learning rate for the heads."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created:
            trained = model if model is not None else self.model
            student = self.accelerator.unwrap_model(trained)
            heads = {id(p) for n, p in student.named_parameters() if not n.startswith("backbone.")}
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in heads]
                if own:
                    group["params"] = [p for p in group["params"] if id(p) not in heads]
                    settings = {k: v for k, v in group.items() if k != "params"}
                    optimizer.add_param_group(
                        {**settings, "params": own, "lr": self.args.head_learning_rate}
                    )
        return optimizer

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        outputs = read_candidates(model, inputs)
        known = inputs["candidate_known"]
        weights = candidate_weights(inputs["candidate_log_probs"][known], self.args.uniform_weight)
        student = centre(outputs.candidate_logits[known], weights)
        teacher = centre(inputs["teacher_candidate_values"][known], weights)
        # [n_prefixes, n_objectives]
        error = (weights[..., None] * (student - teacher).square()).sum(-2)
        responses = inputs["depths"] > 0
        values = (outputs.logits - inputs["teacher_values"])[responses]
        loss = error.mean() + self.args.value_weight * values.square().mean()
        with torch.no_grad():
            variance = (weights[..., None] * teacher.square()).sum(-2)
            agreement = student.argmax(-2) == teacher.argmax(-2)
            mode = "train" if self.model.training else "eval"
            self._metrics[mode].add(error, variance, agreement)
        return (loss, outputs) if return_outputs else loss


class DifferenceMetrics:
    """
    Sums from which the explained variance of candidate differences is computed, over any number of
    batches.

    Args:
        objectives (`list[str]`):
            Names of the values.
    """

    def __init__(self, objectives: list[str]) -> None:
        self.objectives = objectives
        self.sums: torch.Tensor | None = None

    def add(self, error: torch.Tensor, variance: torch.Tensor, agreement: torch.Tensor) -> None:
        """
        Adds a batch.

        Args:
            error (`torch.Tensor`):
                Weighted mean square of the error in the candidates' centred values,
                `[n_prefixes, n_objectives]`.
            variance (`torch.Tensor`):
                Weighted variance of the teachers' values, `[n_prefixes, n_objectives]`.
            agreement (`torch.Tensor`):
                Whether student and teachers prefer the same candidate,
                `[n_prefixes, n_objectives]`.
        """
        terms = (torch.ones_like(error), error, variance, agreement)
        sums = torch.stack([term.double().sum(0) for term in terms])
        self.sums = sums if self.sums is None else self.sums + sums

    def compute(self, accelerator: Any) -> dict[str, float]:
        """Metrics of all that was added by all processes since the last call."""
        count, error, variance, agreement = accelerator.reduce(self.sums, reduction="sum").cpu()
        self.sums = None
        metrics = {"difference_loss": float((error / count).mean())}
        for i, name in enumerate(self.objectives):
            if variance[i] > 0:
                explained = 1 - error[i] / variance[i]
                metrics[f"difference_explained_variance/{name}"] = float(explained)
            metrics[f"top_candidate_agreement/{name}"] = float(agreement[i] / count[i])
        return metrics


def candidate_weights(log_probs: torch.Tensor, uniform_weight: float) -> torch.Tensor:
    """`uniform_weight / k + (1 - uniform_weight) pi_ref(a | s)`, `[..., k]`."""
    return uniform_weight / log_probs.shape[-1] + (1 - uniform_weight) * log_probs.exp()


def centre(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Values without their weighted mean over the candidates of a prefix.

    Args:
        values (`torch.Tensor`):
            `[..., k, n_objectives]`.
        weights (`torch.Tensor`):
            `[..., k]`, which sum to 1.
    """
    return values - (weights[..., None] * values).sum(-2, keepdim=True)


def load_teachers(
    teachers: str | MAVISValueModel | Sequence[str | MAVISValueModel], vocabulary: str
) -> list[MAVISValueModel]:
    """The teachers, frozen; refuses one that was made for another tokenizer."""
    if isinstance(teachers, (str, MAVISValueModel)):
        teachers = [teachers]
    if not teachers:
        raise ValueError("`teachers` is empty: give at least one value model")
    loaded = [MAVISValueModel.load(t) if isinstance(t, str) else t for t in teachers]
    for teacher in loaded:
        if (teacher.config.tokenizer_fingerprint or vocabulary) != vocabulary:
            raise ValueError(
                f"the teacher for {teacher.config.objectives} was made for another tokenizer, that "
                f"of {teacher.config.base_model!r}; train it on the same base model"
            )
        teacher.requires_grad_(False).eval()
    return loaded
