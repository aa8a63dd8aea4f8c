"""What training a state head takes: its backbone, whether trees are followed, its metrics."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from trimtab.plugins.value_model import MAVISValueModel

from .packing import DataCollatorForTrees

if TYPE_CHECKING:
    from peft import PeftConfig

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
