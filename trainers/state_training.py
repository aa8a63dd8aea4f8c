"""What training a state head takes: its backbone, its datasets and loss, its metrics and scale."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.utils import logging

from trimtab.plugins.engine import check_servable
from trimtab.plugins.value_config import MAVISValueConfig
from trimtab.plugins.value_model import MAVISValueModel

from .candidates import (
    RANGE_POSITIONS,
    RANGE_SEQUENCES,
    add_candidates,
    advantage_slopes,
    candidate_differences,
)
from .data import as_given
from .mapped_arrays import MappedArrays
from .packing import DataCollatorForTrees, TreeDataset
from .preferences import pair_loss
from .trees import StoredTrees

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.get_logger(__name__)

QUARTERS = 4  # of a response, for the metrics by depth


class ValueMetrics:
    """
    Sums from which explained variance and ranking of siblings are computed, over any number of
    batches.

    Args:
        objectives (`list[str]`):
            Names of the values.
    """

    def __init__(self, objectives: list[str]) -> None:
        self.objectives = objectives
        self.sums: torch.Tensor | None = None

    def add(
        self,
        values: torch.Tensor,
        labels: torch.Tensor,
        quarters: torch.Tensor,
        differences: torch.Tensor,
        sibling_labels: torch.Tensor,
        distinct: torch.Tensor,
    ) -> None:
        """
        Adds a batch.

        Args:
            values (`torch.Tensor`):
                Predicted values, `[n, n_objectives]`.
            labels (`torch.Tensor`):
                Observed values, `[n, n_objectives]`, NaN where there is none.
            quarters (`torch.Tensor`):
                Quarter of the response that each is in, `[n]`; `-1` at the end of the prompt.
            differences (`torch.Tensor`):
                Predicted differences between siblings at their first and last tokens,
                `[2, n_pairs, n_objectives]`.
            sibling_labels (`torch.Tensor`):
                Observed differences, `[n_pairs, 2, n_objectives]`, NaN where there is none.
            distinct (`torch.Tensor`):
                Whether the siblings' first tokens differ, `[n_pairs]`; else these cannot be ranked.
        """
        values, labels, sibling_labels = values.double(), labels.double(), sibling_labels.double()
        known = ~labels.isnan()
        labels, sibling_labels = labels.nan_to_num(), sibling_labels.nan_to_num()
        error = (values - labels).square() * known
        rows = []
        for quarter in range(QUARTERS):
            inside = (quarters == quarter)[:, None] & known
            for term in (torch.ones_like(labels), labels, labels.square(), error):
                rows.append((term * inside).sum(0))
        for i, counted in enumerate((distinct, torch.ones_like(distinct))):
            observed = sibling_labels[:, i]
            decided = (observed != 0) & counted[:, None]
            agreement = differences[i].double().sign() * observed.sign()
            rows += [((agreement + 1) / 2 * decided).sum(0), decided.sum(0).double()]
        rows += [error.sum(0), known.sum(0).double()]
        sums = torch.stack(rows)  # [rows, n_objectives]
        self.sums = sums if self.sums is None else self.sums + sums

    def compute(self, accelerator: Any) -> dict[str, float]:
        """Metrics of all that was added by all processes since the last call."""
        sums = accelerator.reduce(self.sums, reduction="sum").cpu()
        self.sums = None
        moments = sums[: 4 * QUARTERS].view(QUARTERS, 4, -1)
        ranks = sums[4 * QUARTERS : 4 * QUARTERS + 4].view(2, 2, -1)
        metrics = {"value_loss": float(sums[-2].sum() / sums[-1].sum())}
        for i, name in enumerate(self.objectives):
            metrics[f"explained_variance/{name}"] = explained_variance(moments[..., i].sum(0))
            for quarter in range(QUARTERS):
                metrics[f"explained_variance/{name}/quarter_{quarter + 1}"] = explained_variance(
                    moments[quarter, :, i]
                )
            for place, (right, count) in zip(("first_token", "last_token"), ranks[..., i].tolist()):
                metrics[f"sibling_accuracy/{name}/{place}"] = (
                    right / count if count else float("nan")
                )
        return {key: value for key, value in metrics.items() if value == value}


def explained_variance(moments: torch.Tensor) -> float:
    """`1 - squared error / variance` from the count, sum, sum of squares and squared error."""
    count, total, squares, error = moments.tolist()
    variance = squares - total**2 / count if count else 0.0
    return 1.0 - error / variance if variance > 0 else float("nan")


class StateTraining:
    """
    How [`MAVISTrainer`] trains state heads; [`HeadTraining`] is its counterpart.

    Args:
        trainer ([`MAVISTrainer`]):
            Whose rollouts and arguments it uses.
    """

    metrics = ValueMetrics

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        # Of the base model, to scale by; None before the first are packed
        self._scale_sequences: list[dict[str, Any]] | None = None

    def prepare(self, model: Any, args: Any, peft_config: PeftConfig | None) -> tuple[Any, Any]:
        """The model as it is trained, and its collator. Raises `ValueError` where it cannot be."""
        check_servable(model, self.trainer._sources.longest)
        model.get_input_embeddings().requires_grad_(args.train_embeddings)
        if peft_config is not None:
            model = wrap_backbone(model, peft_config)
            model.get_input_embeddings().requires_grad_(args.train_embeddings)
        return model, tree_collator(model, self.trainer.eos_token_ids)

    def pack(self, trees: Mapping[str, StoredTrees]) -> None:
        """Makes the trainer's datasets: all trees so far to train on, these to evaluate."""
        trainer, args, config = self.trainer, self.trainer.args, self.trainer.value_config
        pack = functools.partial(
            TreeDataset,
            objectives=trainer.objectives,
            mean=np.array(config.reward_mean),
            std=np.array(config.reward_std),
            max_length=args.max_length,
            kl_penalty=args.kl_penalty,
            pairs=trainer._sources.pairs,
            keep=MappedArrays(Path(trainer.args.output_dir)).keep,
        )
        sampled, of_data = trainer._sources.split(trainer._iterations.trees)
        trainer.train_dataset = pack(sampled, leaf_fraction=args.leaf_fraction, seed=args.seed)
        # The bottom layer of responses that are there already is all that there is.
        trainer.train_dataset.sequences += pack(of_data).sequences
        packed = {name: pack(of) for name, of in trees.items() if name != "train"}
        if packed:
            trainer.eval_dataset = as_given(packed)
        if self._scale_sequences is None:
            check_tree_attention(trainer, trainer.train_dataset.sequences)
            several = args.num_iterations > 1
            self._scale_sequences = [
                dict(s) for part in packed.values() for s in part.sequences if several
            ]

    def pack_policies(
        self, trees: Mapping[str, Mapping[str, StoredTrees]], iteration: int, value_model: Path
    ) -> None:
        """The same of an iteration's trees, by dataset and objective."""
        self.pack({name: sum(of.values(), StoredTrees([])) for name, of in trees.items()})

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[Any, Any]:
        """The loss of a batch, and the model's outputs; its measures are added."""
        trainer = self.trainer
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"],
        )
        values, labels = outputs.logits, inputs["labels"]
        known = ~labels.isnan()
        if trainer._sources.pairs:
            ends, depths = inputs["siblings"][:, 2:], inputs["depths"].flatten()
            loss = pair_loss(values.flatten(), ends, depths, inputs["margins"])
        else:
            # 0 where a batch knows nothing
            loss = (values[known] - labels[known]).square().sum() / known.sum().clamp(min=1)
        # Siblings at their first and at their last tokens
        first_a, first_b, last_a, last_b = inputs["siblings"].unbind(-1)
        tokens = inputs["input_ids"].flatten()
        distinct = tokens[first_a] != tokens[first_b]
        flat = values.flatten(0, 1)
        with torch.no_grad():
            # [2, n_pairs, n_objectives]
            differences = torch.stack([flat[first_a] - flat[first_b], flat[last_a] - flat[last_b]])
            labelled = known.any(-1)
            trainer._metrics["train" if trainer.model.training else "eval"].add(
                values[labelled],
                labels[labelled],
                # The first quarter holds depths 1 to a quarter of the longest response.
                (inputs["depths"][labelled] - 1) * QUARTERS // trainer.args.max_completion_length,
                differences,
                inputs["sibling_labels"],
                distinct,
            )
        return loss, outputs

    def save(self, folder: Path) -> None:
        """A checkpoint needs nothing but the weights."""

    def resume(self, folder: str | None) -> None:
        """A checkpoint holds nothing but the weights."""

    def finish(self) -> None:
        """Sets the scale with which values guide, from the base model's `eval_dataset` rollouts."""
        if not self._scale_sequences:
            return
        trainer = self.trainer
        if "candidates" not in self._scale_sequences[0]:
            self._add_candidates(self._scale_sequences, None)
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        with trainer.accelerator.autocast():
            slopes = advantage_slopes(
                model,
                self._scale_sequences,
                trainer.data_collator,
                trainer.args.temperature,
                trainer.is_world_process_zero(),
            )
        trainer.value_config.candidate_scale = [float(np.clip(s["value"], 0, 1)) for s in slopes]
        for name, slope in zip(trainer.objectives, slopes):
            trainer.log({f"candidate_scale/{name}/{key}": x for key, x in slope.items()})
            if slope["low"] <= 0:
                logger.warning(
                    f"the values of {name!r} tell candidates apart hardly better than chance: "
                    f"responses to `eval_dataset` bear out {slope['value']:.2g} [{slope['low']:.2g}"
                    f", {slope['high']:.2g}] of the differences. More prompts or larger trees "
                    "(`layers`) make values less noisy"
                )

    def conclude(self, kept: MAVISValueConfig | None) -> None:
        """Measures the `candidate_range` of the model that is kept."""
        trainer = self.trainer
        # Copies: the candidates are not for the training that may go on.
        sequences = [dict(s) for s in trainer.train_dataset.sequences[:RANGE_SEQUENCES]]
        self._add_candidates(sequences, RANGE_POSITIONS)
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        with trainer.accelerator.autocast():
            ranges = candidate_differences(model, sequences, trainer.data_collator).float()
        trainer.value_config.candidate_range = ranges.amax(0).tolist()
        levels = torch.tensor([0.5, 0.99, 1.0], device=ranges.device)
        for name, row in zip(trainer.objectives, torch.quantile(ranges, levels, dim=0).T.tolist()):
            trainer.log({f"candidate_range/{name}/{p}": x for p, x in zip((50, 99, 100), row)})

    def _add_candidates(self, sequences: list[dict[str, Any]], positions: int | None) -> None:
        trainer = self.trainer
        add_candidates(
            sequences,
            trainer.load_base_model(),
            trainer.data_collator,
            trainer.value_config.top_k,
            positions,
            trainer.eos_token_ids,
            trainer.accelerator,
        )


def tree_collator(model: MAVISValueModel, eos_token_ids: set[int]) -> DataCollatorForTrees:
    """The collator whose masks the model's backbone takes."""
    attention = model.backbone.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"the backbone uses attn_implementation={attention!r}, which takes no mask of a "
            "tree; set model_init_kwargs={'attn_implementation': 'sdpa'}"
        )
    return DataCollatorForTrees(
        pad_token_id=min(eos_token_ids),  # any token will do, the mask hides it
        additive_mask=attention == "eager",
    )


def refuse_data_parallel(args: Any) -> None:
    """Raises where `Trainer` would wrap the model in `nn.DataParallel`."""
    if args.n_gpu > 1:
        raise ValueError(
            "value models are not trained with `nn.DataParallel`, which `Trainer` uses when "
            "several GPUs are visible to a single process; use `accelerate launch`, or make "
            "one visible with `CUDA_VISIBLE_DEVICES`"
        )


@torch.no_grad()
def check_tree_attention(trainer: Any, sequences: list[dict[str, Any]]) -> None:
    """
    Compares a response's hidden state in its tree with that of the response alone: a backbone that
    ignores the mask (a recurrent one, a sliding window) would be trained on nonsense.
    """
    sequence = max(sequences, key=lambda s: s["position_ids"][-1])
    batch = trainer._prepare_inputs(trainer.data_collator([sequence]))
    seen = batch["attention_mask"][0, 0, -1]  # the last token's branch
    seen = seen == 0 if seen.is_floating_point() else seen
    backbone = trainer.accelerator.unwrap_model(trainer.model).backbone
    training = backbone.training
    backbone.eval()
    packed = backbone(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        use_cache=False,
    ).last_hidden_state[0, -1]
    alone = backbone(input_ids=batch["input_ids"][:, seen], use_cache=False)
    alone = alone.last_hidden_state[0, -1]
    backbone.train(training)
    error = (packed - alone).norm() / alone.norm()
    if not error < 0.05:
        raise ValueError(
            f"the backbone {trainer.value_config.text_config.model_type!r} does not follow "
            f"the mask of a tree (relative error {error:.2g}), so it cannot be trained on "
            "trees; use a backbone with full attention"
        )


def wrap_backbone(model: MAVISValueModel, peft_config: PeftConfig) -> Any:
    """A PEFT model with the adapter in the backbone and the heads trained in full."""
    try:
        from peft import get_peft_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`peft_config` needs peft; pip install 'trimtab[trl]'", name="peft"
        ) from error
    config: Any = copy.deepcopy(peft_config)
    config.task_type = None  # TRL's is that of a language model, which generates
    heads = {name for name, _ in model.named_children() if name != "backbone"}
    config.modules_to_save = sorted({*(config.modules_to_save or []), *heads})
    if getattr(config, "target_modules", None) is None:
        # PEFT knows no default for this model type.
        config.target_modules = sorted(
            {
                name.rsplit(".", 1)[-1]
                for name, module in model.backbone.named_modules()
                if isinstance(module, torch.nn.Linear)
            }
        )
    return get_peft_model(model, config)
