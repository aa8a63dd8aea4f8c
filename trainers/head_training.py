"""What heads on the base model's hidden state learn, and the measure of how well they guide.

`V` is a regression in closed form. `A` learns from the tokens that were sampled what their returns
exceed a *baseline* by: a better `V`, since it may read more than what is served, and cross-fitted,
of a regression that has not seen the tree.

Pure functions of the rows of [`~trimtab.trainers.hidden_states.collate_rows`]. The measure is *KL
efficiency*: with `A` the predicted advantage of the sampled token, centred under the base model,
and `B` the baseline, `C = E[sum_t A(s_t, a_t) (G_t - B(s_t))]` and
`D = E[sum_t Var_{a ~ pi_ref} A(s_t, a)]` of a response, guidance with a small `beta` gains `beta C`
at a KL of `beta^2 D / 2`, so that `C^2 / D` is the squared gain by two nats, in variances of the
reward, and `C / D` the scale with which `beta` means the same for every model. Any baseline gives
the same `C` in expectation, and a better one with less noise.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.utils import logging

from trimtab.plugins.heads import HeadGuide, MAVISValueHeads
from trimtab.plugins.value_config import MAVISValueConfig
from trimtab.plugins.value_model import MAVISValueModel

from .data import as_given
from .hidden_states import HeadDataset, cache_hidden_states, collate_rows
from .mapped_arrays import MappedArrays
from .preferences import pair_loss, running_sums
from .statistics import interval, prompt_draws

logger = logging.get_logger(__name__)

FOLDS = 5  # of the cross-validation of `V`
STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of its penalty, in features' variances
WIDEST_SUM = 1024  # features of a sum along a branch
MIN_STD = 1e-3  # of a feature
BEST = "best_heads.safetensors"  # of a checkpoint
HELD_OUT = 8  # one prompt in so many is held out where no others are given


class BranchFeatures:
    """
    What the baseline reads of a row: its hidden state, and how many tokens the response has so far,
    and their sums of hidden states and of embeddings; standardised.

    A reward of the whole response (how positive, how rare its words) gathers along it, and a hidden
    state that is there to predict the next token tells little of what was said ten tokens ago.

    Args:
        items (`list[dict[str, Any]]`):
            To standardise by, of a [`~trimtab.trainers.hidden_states.HeadDataset`].
        embedding (`torch.Tensor`):
            The base model's, `[vocab, embedding_size]`.
        device (`torch.device`):
            Where to compute.
    """

    def __init__(
        self, items: Sequence[dict[str, Any]], embedding: torch.Tensor, device: torch.device
    ) -> None:
        self.embedding, self.device = embedding, device
        generator = torch.Generator().manual_seed(0)
        widths = {items[0]["hidden"].shape[1], embedding.shape[1]}
        # Sums of wide models are told by projections: the regression is cubic in the features.
        self.projections = {
            width: torch.randn(width, WIDEST_SUM, generator=generator) / width**0.5
            for width in sorted(widths)
            if width > WIDEST_SUM
        }
        total = square = torch.zeros(1, dtype=torch.float64, device=device)
        count = sum(len(item["tokens"]) for item in items)
        for item in items:
            x = self.read(item).double()
            total, square = total + x.sum(0), square + x.square().sum(0)
        self.mean = (total / count).float()
        self.std = (square / count - (total / count).square()).clamp(min=0).sqrt().float()
        self.std.clamp_(min=MIN_STD)

    def read(self, item: Mapping[str, Any]) -> torch.Tensor:
        """Before they are standardised, `[n, features]` float32."""
        previous, depths = (torch.as_tensor(item[name]) for name in ("previous", "depths"))
        hidden = item["hidden"].float()
        embedded = self.embedding[torch.as_tensor(item["tokens"])].float()
        parts = [hidden, depths[:, None].float()]
        for each in (hidden, embedded):
            if each.shape[1] in self.projections:
                each = each @ self.projections[each.shape[1]]
            sums = torch.zeros_like(each)
            for rows in depths.argsort(stable=True).split(depths.bincount().tolist())[1:]:
                sums[rows] = sums[previous[rows]] + each[rows]
            parts.append(sums)
        return torch.cat(parts, dim=1).to(self.device)

    def __call__(self, item: Mapping[str, Any]) -> torch.Tensor:
        """Of an item, `[n, features]` float32."""
        return (self.read(item) - self.mean) / self.std


def with_bias(features: torch.Tensor) -> torch.Tensor:
    """The features and a column of ones."""
    return torch.cat((features, features.new_ones(len(features), 1)), dim=1)


def fit_values(
    items: Sequence[dict[str, Any]],
    features: Callable[[Mapping[str, Any]], torch.Tensor],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """
    `V`, linear in features of a row, by ridge regression in closed form.

    The strength of the penalty is the best by cross-validation. (The one that explains most of the
    variance within a prompt is ten times as large, and heads learnt from it gain a tenth less.)
    Objectives of other responses, since some have no reward, are regressions of their own.

    Args:
        items (`list[dict[str, Any]]`):
            Of a [`~trimtab.trainers.hidden_states.HeadDataset`].
        features (`Callable[[Mapping[str, Any]], torch.Tensor]`):
            Of an item's rows, standardised, `[n, width]` float32.

    Returns:
        `tuple`: weights and bias, `[width + 1, n_objectives]` float32; and of every item the values
        after its rows by a regression that has not seen it, `[n, n_objectives]` float32: those of
        one that has would flatter what is learnt from the same rollouts.
    """
    count = items[0]["labels"].shape[1]
    # Objectives whose rows have the same weights are solved together.
    alike: dict[bytes, list[int]] = {}
    for i in range(count):
        digest = hashlib.sha256()
        for item in items:
            digest.update(np.ascontiguousarray(item["reach"][:, i]).tobytes())
        alike.setdefault(digest.digest(), []).append(i)
    if len(alike) == 1:
        return _fit_alike(items, features, list(range(count)))
    parts = [_fit_alike(items, features, columns) for columns in alike.values()]
    order = np.argsort(np.concatenate(list(alike.values())))
    values = [torch.cat(of_item, dim=1)[:, order] for of_item in zip(*(v for _, v in parts))]
    return torch.cat([weights for weights, _ in parts], dim=1)[:, order], values


def _fit_alike(
    items: Sequence[dict[str, Any]],
    features: Callable[[Mapping[str, Any]], torch.Tensor],
    columns: list[int],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """[`fit_values`] of objectives that are known of the same responses."""

    def labels(item: dict[str, Any]) -> torch.Tensor:
        return torch.as_tensor(item["labels"])[:, columns].nan_to_num()

    def reach(item: dict[str, Any]) -> torch.Tensor:
        return torch.as_tensor(item["reach"])[:, columns[:1]]

    count = len(columns)
    told = [bool((reach(item) > 0).any()) for item in items]
    folds = min(FOLDS, sum(told))
    fold_of = np.cumsum([0, *told[:-1]]) % folds  # each has as many items that say something
    first = with_bias(features(items[0]))
    device, width = first.device, first.shape[1]
    grams = torch.zeros(folds, width, width, dtype=torch.float64, device=device)
    moments = torch.zeros(folds, width, count, dtype=torch.float64, device=device)
    for i, item in enumerate(items):
        x = with_bias(features(item))
        weighted = (x * reach(item).to(device)).T
        grams[fold_of[i]] += weighted @ x
        moments[fold_of[i]] += weighted @ labels(item).to(device)
    gram, moment = grams.sum(0), moments.sum(0)
    ridge = gram[-1, -1].expand(width).clone()
    ridge[-1] = 0  # the bias is free

    def solve(left_out: int | None, strength: float) -> torch.Tensor:
        g, m = gram.clone(), moment
        if left_out is not None:
            g, m = g - grams[left_out], m - moments[left_out]
            if g[-1, -1] < 1e-6 * gram[-1, -1]:  # no other fold knows anything
                return torch.zeros_like(m, dtype=torch.float32)
        g.diagonal().add_(strength * ridge)
        return torch.cholesky_solve(m, torch.linalg.cholesky(g)).float()

    # Of every fold those of all strengths side by side: features are read once.
    solved = [
        torch.cat([solve(fold if folds > 1 else None, s) for s in STRENGTHS], dim=1)
        for fold in range(folds)
    ]

    def values(i: int) -> torch.Tensor:
        """Of an item by all strengths, `[n, strengths, n_objectives]`."""
        return (with_bias(features(items[i])) @ solved[fold_of[i]]).cpu().unflatten(1, (-1, count))

    errors = torch.zeros(len(STRENGTHS))
    for i, item in enumerate(items):
        squares = (values(i) - labels(item)[:, None]).square()
        errors += (reach(item)[:, None] * squares).sum((0, 2))
    best = int(errors.argmin())
    return solve(None, STRENGTHS[best]), [values(i)[:, best].clone() for i in range(len(items))]


def lambda_returns(
    batch: dict[str, torch.Tensor], values: torch.Tensor, gae_lambda: float
) -> torch.Tensor:
    """
    Returns after every token: of a finished response its reward, of others `1 - gae_lambda` parts
    of the predicted value and `gae_lambda` parts of the mean over what follows.

    Args:
        batch (`dict[str, torch.Tensor]`):
            Of [`~trimtab.trainers.hidden_states.collate_rows`].
        values (`torch.Tensor`):
            `V(s)` after every token, `[n, n_objectives]`.
        gae_lambda (`float`):
            1 for the mean reward of the responses below, 0 for the value of the token itself.

    Returns:
        `torch.Tensor`: `[n, n_objectives]` float32.
    """
    labels, depths = batch["labels"], batch["depths"]
    returns, ahead = labels.clone(), torch.zeros_like(labels)
    order = depths.argsort(descending=True)
    for rows in order.split(depths.bincount().flip(0).tolist()):
        mixed = (1 - gae_lambda) * values[rows] + gae_lambda * ahead[rows]
        known = ~labels[rows].isnan() & ~batch["ends"][rows, None]
        returns[rows] = torch.where(known, mixed, labels[rows])
        below = rows[depths[rows] > 0]
        shares = batch["shares"][below]
        shared = torch.where(shares > 0, shares * returns[below], 0.0)  # what is unknown is NaN
        ahead.index_add_(0, batch["previous"][below], shared)
    return returns


def add_baseline(
    items: Sequence[dict[str, Any]],
    held_out: Sequence[dict[str, Any]],
    embedding: torch.Tensor,
    device: torch.device,
    keep: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> None:
    """
    Adds to every item its `baseline`, `[n, n_objectives]` float32: of a regression on the others,
    or for those held out, on all of `items`. `keep` is that of [`MappedArrays`].
    """
    features = BranchFeatures(items, embedding, device)
    weights, values = fit_values(items, features)
    for item, value in zip(items, values):
        item["baseline"] = keep(value.numpy())
    for item in held_out:
        item["baseline"] = keep((with_bias(features(item)) @ weights).cpu().numpy())


def add_excess(
    items: Sequence[dict[str, Any]],
    gae_lambda: float,
    keep: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> None:
    """
    Adds to every item `excess`, what a token's return exceeds the baseline before it by. `keep` is
    that of [`MappedArrays`].
    """
    for item in items:
        batch = collate_rows([item])
        baseline = batch["baseline"]
        returns = lambda_returns(batch, baseline, gae_lambda)
        item["excess"] = keep((returns - baseline[batch["previous"]]).numpy())


def sampled_shares(
    log_probs: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """
    Probabilities that candidates are sampled with.

    Args:
        log_probs (`torch.Tensor`):
            The base model's, `[..., k]`; with `top_p` below 1, likeliest first.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of the sampling.
        top_p (`float`, *optional*, defaults to `1.0`):
            Of the sampling.

    Returns:
        `torch.Tensor`: `[..., k]`, which sum to 1.
    """
    shares = torch.softmax(log_probs / temperature, dim=-1)
    if top_p == 1:
        return shares
    before = shares.cumsum(-1) - shares
    shares = shares.masked_fill(before >= top_p, 0.0)
    return shares / shares.sum(-1, keepdim=True)


def centred_advantages(
    batch: dict[str, torch.Tensor],
    advantages: torch.Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Of every sampled token, its advantage and the variance of those of the candidates.

    Args:
        batch (`dict[str, torch.Tensor]`):
            Of [`~trimtab.trainers.hidden_states.collate_rows`].
        advantages (`torch.Tensor`):
            `A(s, a)` of the candidates after every token, `[n, k, n_objectives]`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of the sampling.
        top_p (`float`, *optional*, defaults to `1.0`):
            Of the sampling.

    Returns:
        `tuple`: `A` centred under the base model, and its variance, `[n, n_objectives]` each; and
        which rows are tokens that were sampled among the candidates, `[n]` bool. By rounding, one
        on the edge may not be.
    """
    weights = sampled_shares(batch["log_probs"], temperature, top_p)[..., None]
    centred = advantages - (weights * advantages).sum(1, keepdim=True)
    variances = (weights * centred.square()).sum(1)
    previous = batch["previous"]
    hits = batch["candidates"][previous] == batch["tokens"][:, None]
    of_token = (centred[previous] * hits[..., None]).sum(1)
    return of_token, variances[previous], hits.any(1) & (batch["depths"] > 0)


def head_loss(
    batch: dict[str, torch.Tensor],
    advantages: torch.Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    on_policy: bool | torch.Tensor = True,
) -> torch.Tensor:
    """
    Mean squared error of `A` against the excess of the sampled tokens' returns, up to a constant,
    summed over the members of the ensemble.

    `E[A^2]` of the sampled token is taken as the candidates' variance, which it is in expectation:
    the minimum is that of `D - 2 C`, the highest KL efficiency with a scale of 1. Of tokens that
    another policy may have chosen it is their own square: advantages of what that policy prefers
    would be exaggerated by as much as it does. Tokens that are no candidates are left out, since
    guidance cannot choose them.

    Args:
        batch (`dict[str, torch.Tensor]`):
            Of [`~trimtab.trainers.hidden_states.collate_rows`], of items with [`add_excess`].
        advantages (`torch.Tensor`):
            `[ensemble_size, n, k, n_objectives]`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of the sampling.
        top_p (`float`, *optional*, defaults to `1.0`):
            Of the sampling.
        on_policy (`bool` or `torch.Tensor`, *optional*, defaults to `True`):
            Whether the tokens were sampled from the policy that `log_probs` are of; for every
            objective, since each may have responses of its own, `[n_objectives]` bool.
    """
    on_policy = torch.as_tensor(on_policy, device=advantages.device)
    loss = advantages.new_zeros(())
    for member in advantages:
        of_token, variances, sampled = centred_advantages(batch, member, temperature, top_p)
        squares = torch.where(on_policy, variances, of_token.square())
        # What is not known is left out before it is multiplied: its gradient would be NaN.
        known = sampled[:, None] & ~batch["excess"].isnan()
        errors = (squares - 2 * of_token * batch["excess"].nan_to_num())[known]
        loss = loss + errors.sum() / known.sum().clamp(min=1)
    return loss


def pairs_loss(
    batch: dict[str, torch.Tensor], advantages: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """
    [`pair_loss`] of every two responses of a batch, whose utility is the sum of the advantages of
    their tokens, summed over the members of the ensemble.

    A response's return less the prompt's value is that sum, and noise of mean 0. Tokens that are no
    candidates add nothing, since guidance cannot choose them.

    Args:
        batch (`dict[str, torch.Tensor]`):
            Of [`~trimtab.trainers.hidden_states.collate_rows`], of pairs.
        advantages (`torch.Tensor`):
            `[ensemble_size, n, k, 1]`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of the sampling.
    """
    depths = batch["depths"]
    ends = batch["ends"].nonzero()[:, 0].view(-1, 2)
    margins = batch["margins"][ends[:, 0]] if "margins" in batch else torch.zeros(len(ends))
    loss = advantages.new_zeros(())
    for member in advantages:
        of_token, _, sampled = centred_advantages(batch, member, temperature)
        utilities = running_sums(of_token[:, 0], sampled, depths)
        loss = loss + pair_loss(utilities, ends, depths, margins.to(utilities))
    return loss


@torch.no_grad()
def efficiency_sums(
    batch: dict[str, torch.Tensor],
    values: torch.Tensor,
    advantages: torch.Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    on_policy: bool | torch.Tensor = True,
) -> torch.Tensor:
    """
    What KL efficiency and explained variance are computed from.

    Args:
        batch (`dict[str, torch.Tensor]`):
            Of [`~trimtab.trainers.hidden_states.collate_rows`], of items with [`add_baseline`].
        values (`torch.Tensor`):
            `V` after every token, `[n, n_objectives]`, of which the variance explained is measured.
        advantages (`torch.Tensor`):
            `A` of the candidates there, `[n, k, n_objectives]`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of the sampling.
        top_p (`float`, *optional*, defaults to `1.0`):
            Of the sampling.
        on_policy (`bool` or `torch.Tensor`, *optional*, defaults to `True`):
            See [`head_loss`].

    Returns:
        `torch.Tensor`: of every tree `C`, `D`, and the squared error and the variance of `V`, both
        within the tree, `[n_trees, 4, n_objectives]` float64, of its responses whose label is known
        (not NaN); NaN of objectives of which none is.
    """
    labels, trees = batch["labels"].double(), batch["trees"]
    of_token, variances, sampled = centred_advantages(batch, advantages, temperature, top_p)
    on_policy = torch.as_tensor(on_policy, device=advantages.device)
    squares = torch.where(on_policy, variances, of_token.square())
    used = sampled[:, None] * batch["reach"].double()
    excess = labels - batch["baseline"][batch["previous"]].double()
    labels, excess = (torch.where(used > 0, x, 0.0) for x in (labels, excess))
    columns = torch.stack([used * of_token * excess, used * squares], 1)
    count = int(trees.max()) + 1

    def summed(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(count, *x.shape[1:], dtype=x.dtype, device=x.device).index_add_(
            0, trees, x
        )

    spread = []
    for x in (values.double() - labels, labels):
        weighted = used * x
        mean = summed(weighted) / summed(used).clamp(min=1e-9)
        spread.append(summed(used * (x - mean[trees]).square()))
    sums = torch.cat([summed(columns), torch.stack(spread, 1)], 1)
    told = summed(batch["reach"].double() * (batch["depths"] == 0)[:, None])
    return sums / told.masked_fill(told == 0, torch.nan)[:, None]


def efficiency(sums: np.ndarray) -> list[dict[str, dict[str, float]]]:
    """
    The measures of heads, from the sums of held-out trees.

    Args:
        sums (`np.ndarray`):
            Of [`efficiency_sums`], `[n_trees, 4, n_objectives]`.

    Returns:
        `list[dict]`: for every objective `kl_efficiency` (`C^2 / D`, of the sign of `C`), `scale`
        (`C / D`) and `explained_variance` (within a prompt), each with `value`, `low` and `high`, a
        95 % bootstrap interval over the trees.
    """
    found = []
    for i in range(sums.shape[2]):
        known = sums[~np.isnan(sums[:, 0, i]), :, i]
        c, d, error, variance = known[prompt_draws(len(known))].mean(1).T
        # Heads that say nothing of any candidate gain nothing; what is left is rounding.
        says = d > 1e-12
        safe = np.where(says, d, 1.0)
        measures = {
            "kl_efficiency": np.where(says, c * np.abs(c) / safe, 0.0),
            "scale": np.where(says, c / safe, 0.0),
            "explained_variance": 1 - error / np.where(variance > 0, variance, np.nan),
        }
        found.append({name: interval(column) for name, column in measures.items()})
    return found


def read_heads(
    model: Any, batch: dict[str, torch.Tensor], embedding: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`V` `[n, n_objectives]` and each member's `A` `[ensemble_size, n, k, n_objectives]`, with the
    base model's `embedding`."""
    tokens, candidates = batch["candidates"].long().unique(return_inverse=True)
    rows = embedding[tokens.to(embedding.device)].to(candidates.device)
    return model(batch["hidden"], rows, candidates)


@torch.no_grad()
def set_values(model: Any, items: Sequence[dict[str, Any]]) -> None:
    """Sets the model's `V` by [`fit_values`], for good."""
    device = model.value.weight.device
    weights, _ = fit_values(items, lambda item: model.standardize(item["hidden"].to(device)))
    model.value.weight.copy_(weights[:-1].T)
    model.value.bias.copy_(weights[-1])
    model.value.requires_grad_(False)


def further_heads(kept: MAVISValueHeads, objectives: Sequence[str]) -> MAVISValueHeads:
    """
    Untrained heads of further objectives, on the features of those that there are.

    What the layers and tokens have in common is that of `kept`: the statistics of hidden states,
    the first layers, which are not trained, and `P`, which [`keep_actions`] keeps.
    """
    config = copy.deepcopy(kept.config)
    config.objectives, count = list(objectives), len(objectives)
    config.reward_mean, config.reward_std = [0.0] * count, [1.0] * count
    config.candidate_scale = config.candidate_range = config.provenance = None
    made = MAVISValueHeads(config)
    made.hidden_mean.copy_(kept.hidden_mean)
    made.hidden_std.copy_(kept.hidden_std)
    for own, theirs in ((made.query, kept.query), (made.action, kept.action)):
        own.expand.load_state_dict(theirs.expand.state_dict())
        own.expand.requires_grad_(False)
    keep_actions(made, kept)
    return made


@torch.no_grad()
def keep_actions(model: MAVISValueHeads, kept: MAVISValueHeads) -> None:
    """Sets `P`, which shares its parameters with the `b` that are trained, to that of `kept`."""
    rank = kept.config.action_rank
    model.action.weight[..., :rank] = kept.action.weight[..., :rank]
    model.action.bias[..., :rank] = kept.action.bias[..., :rank]


def joined_heads(
    kept: MAVISValueHeads, weights: Mapping[str, torch.Tensor], config: MAVISValueConfig
) -> MAVISValueHeads:
    """The heads of `kept`, bit for bit, and after them those of [`further_heads`] with these
    `weights` and this `config`."""
    rank = config.action_rank
    # Where the objectives' own parts are: their axis, and what all have in common before them.
    own = {
        "value.weight": (0, 0),
        "value.bias": (0, 0),
        "query.weight": (-1, 0),
        "query.bias": (-1, 0),
        "action.weight": (-1, rank),
        "action.bias": (-1, rank),
        "action_table": (-1, config.ensemble_size * rank),
    }
    joined = {}
    for name, there in kept.state_dict().items():
        joined[name] = there
        if name in own:
            axis, common = own[name]
            added = weights[name].to(there)
            added = added.narrow(axis, common, added.shape[axis] - common)
            joined[name] = torch.cat((there, added), dim=axis)
    made = MAVISValueHeads(joined_config(kept.config, config))
    made.load_state_dict(joined)
    return made


def joined_config(kept: MAVISValueConfig, added: MAVISValueConfig) -> MAVISValueConfig:
    """That of [`joined_heads`]; what made the objectives that were added is listed for itself."""
    config = copy.deepcopy(kept)
    for field, default in (("reward_mean", 0.0), ("reward_std", 1.0), ("candidate_scale", 1.0)):
        numbers = [getattr(x, field) or [default] * len(x.objectives or []) for x in (kept, added)]
        setattr(config, field, [*numbers[0], *numbers[1]])
    config.objectives = [*(kept.objectives or []), *(added.objectives or [])]
    made, before = dict(added.provenance or {}), dict(kept.provenance or {})
    measured = {**before.get("held_out", {}), **made.pop("held_out", {})}
    others = [*before.get("added", []), {"objectives": added.objectives, **made}]
    config.provenance = {**before, "added": others}
    if measured:
        config.provenance["held_out"] = measured
    return config


class HeadMetrics:
    """
    KL efficiency and explained variance over any number of batches.

    Args:
        objectives (`list[str]`):
            Names of the values.
    """

    def __init__(self, objectives: Sequence[str]) -> None:
        self.objectives = objectives
        self.sums: list[np.ndarray] | None = None

    def add(self, sums: torch.Tensor) -> None:
        """Adds what [`efficiency_sums`] made of a batch."""
        self.sums = [*(self.sums or []), sums.cpu().numpy()]

    def measures(self) -> dict[str, dict[str, dict[str, float]]]:
        """By objective of which something is known, of what all processes have added; see
        [`efficiency`]."""
        sums = np.concatenate(gather_object(self.sums or []))
        self.sums = None
        known = ~np.isnan(sums[:, 0]).all(0)
        names = [name for name, told in zip(self.objectives, known) if told]
        return dict(zip(names, efficiency(sums[..., known])))

    def compute(self, accelerator: Any) -> dict[str, float]:
        """Metrics of all that was added by all processes since the last call."""
        return flat_metrics(self.measures())


def flat_metrics(measures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """`measure/objective` and its interval's ends, for the log."""
    found = {
        f"{measure}/{name}" + ("" if end == "value" else f"/{end}"): x
        for name, of_objective in measures.items()
        for measure, ends in of_objective.items()
        for end, x in ends.items()
    }
    return {key: x for key, x in found.items() if x == x}


class HeadTraining(TrainerCallback):
    """
    How [`MAVISTrainer`] trains heads on the base model's hidden state.

    After every epoch they are measured on held-out trees; the best are kept, by the mean over the
    objectives of the gain at equal KL, `sqrt(C^2 / D)`. In an iteration these are trees of the last
    iteration's policies, so that the scale is right at the KL that they have.

    Args:
        trainer ([`MAVISTrainer`]):
            Whose rollouts and arguments it uses.
    """

    metrics = HeadMetrics

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.best: tuple[float, dict[str, Any], dict[str, torch.Tensor]] | None = None
        self.held_out: list[dict[str, Any]] = []
        self.embedding = torch.empty(0)

    def prepare(self, model: Any, args: Any, peft_config: Any) -> tuple[Any, Any]:
        """The model as it is trained, and its collator. Raises `ValueError` where it cannot be."""
        sources = self.trainer._sources
        if peft_config is not None:
            raise ValueError(
                "`peft_config` is for a backbone, and heads on the base model's hidden state "
                "have none: leave it out, or set head_type='state'"
            )
        count = len(sources.prompt_ids["train"])
        if sources.responses:
            count = min(count, len(sources.responses["train"].trees))
        if len(sources.sets) == 1 and count < HELD_OUT:
            raise ValueError(
                f"`train_dataset` has {count} prompts, and heads are chosen and "
                f"scaled by held-out ones: give an `eval_dataset`, or at least {HELD_OUT} "
                "prompts, of which one in so many is held out"
            )
        return model, collate_rows

    def pack(self, trees: Iterable[str]) -> None:
        """
        Makes the trainer's datasets of the base model's rollouts, of which `trees` names the
        datasets, with their hidden states.
        """
        trainer = self.trainer
        self._keep = MappedArrays(Path(trainer.args.output_dir)).keep
        items, held_out = self._read({name: trainer._collection.folders(name) for name in trees})
        self.held_out = list(chain(*held_out.values()))
        for i, name in enumerate(trainer.objectives):
            told = [
                sum(not np.isnan(item["labels"][:, i]).all() for item in part)
                for part in (items, self.held_out)
            ]
            if not all(told):
                raise ValueError(
                    f"{name!r} is known of responses to {told[0]} prompts to learn from and to "
                    f"{told[1]} held-out ones; give scores of both, or remove the objective"
                )
        trainer.train_dataset = self._dataset(items)
        trainer.eval_dataset = as_given({n: self._dataset(part) for n, part in held_out.items()})
        model = trainer.accelerator.unwrap_model(trainer.model)
        if trainer._kept is None:
            model.set_statistics(item["hidden"] for item in items)
        set_values(model, items)
        device = model.value.weight.device
        add_baseline(items, self.held_out, self.embedding, device, self._keep)
        add_excess(items, trainer.args.gae_lambda, self._keep)

    def pack_policies(
        self, trees: Mapping[str, Iterable[str]], iteration: int, value_model: Path
    ) -> None:
        """
        Adds rollouts of each objective's own policy to those that are learnt from.

        Advantages are centred under the policy that a token was sampled from, and learnt from what
        its returns exceed that policy's values by.

        Args:
            trees (`dict[str, dict[str, StoredTrees]]`):
                By dataset, then by objective, of which they are read again from their folders.
            iteration (`int`):
                That they were sampled for.
            value_model (`Path`):
                Folder of the heads that guided them.
        """
        trainer, folder_of = self.trainer, self.trainer._collection.policy_folder
        device = trainer.accelerator.unwrap_model(trainer.model).value.weight.device
        heads: Any = MAVISValueModel.load(str(value_model))
        guide = HeadGuide([heads], 1, device)
        by_name: dict[str, list[Any]] = {}
        for i, name in enumerate(trainer.objectives):
            items, parts = self._read(
                {split: [folder_of(iteration, name, split)] for split in trees}
            )
            held_out = list(chain(*parts.values()))
            weights = torch.zeros(1, len(trainer.objectives), device=device)
            weights[0, i] = trainer.args.beta * heads.config.candidate_scale[i]
            for item in (*items, *held_out):
                hidden, candidates = (item[key].to(device) for key in ("hidden", "candidates"))
                scores = guide.scores(hidden, candidates.long(), weights.expand(len(hidden), -1))
                guided = (item["log_probs"] + scores.cpu()).log_softmax(-1)
                item["log_probs"] = torch.from_numpy(self._keep(guided.numpy()))
            # Alike but for the labels: what is not known of them has no baseline.
            learnt, kept = (
                [{**x, **{name: x[name][:, [i]] for name in ("labels", "reach")}} for x in part]
                for part in (items, held_out)
            )
            add_baseline(learnt, kept, self.embedding, device)
            for item, of_own in zip((*items, *held_out), (*learnt, *kept)):
                item["baseline"] = self._keep(np.full_like(item["labels"], np.nan))
                item["baseline"][:, i] = of_own["baseline"][:, 0]
            add_excess(items, trainer.args.gae_lambda, self._keep)
            trainer.train_dataset.items += items
            for split, part in parts.items():
                by_name.setdefault(split, []).extend(part)
        self.held_out = list(chain(*by_name.values()))
        trainer.eval_dataset = as_given({n: self._dataset(part) for n, part in by_name.items()})

    def _read(
        self, folders: Mapping[str, Sequence[Path]]
    ) -> tuple[list[Any], dict[str, list[Any]]]:
        """Items to learn from, and held-out ones by dataset."""
        trainer, config = self.trainer, self.trainer.value_config
        learnt: list[Any] = []
        held_out: dict[str, list[Any]] = {}
        for name, folder in ((name, folder) for name, of in folders.items() for folder in of):
            self.embedding = cache_hidden_states(
                folder,
                trainer.load_base_model,
                config.base_checkpoint_fingerprint,
                config.top_k,
                trainer.args.max_length,
                min(trainer.eos_token_ids),
                trainer.accelerator,
            )
            items = self._dataset(folder=folder).items
            if name != "train":
                held_out.setdefault(name, []).extend(items)
            elif len(folders) > 1:
                learnt += items
            else:
                learnt += [x for i, x in enumerate(items) if i % HELD_OUT]
                held_out.setdefault("eval", []).extend(items[::HELD_OUT])
        return learnt, held_out

    def _dataset(self, items: Sequence[Any] = (), folder: Path | None = None) -> HeadDataset:
        trainer, config = self.trainer, self.trainer.value_config
        made = HeadDataset(
            [] if folder is None else [folder],
            trainer.objectives,
            np.array(config.reward_mean),
            np.array(config.reward_std),
            trainer.args.kl_penalty,
            self._keep,
        )
        made.items += items
        return made

    def _on_policy(self) -> torch.Tensor:
        """Of every objective, whether its responses are the base model's."""
        trainer = self.trainer
        return torch.tensor(
            [trainer.on_policy or n in trainer.reward_funcs for n in trainer.objectives]
        )

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[Any, Any]:
        """The loss of a batch, and the values; in evaluation its measures are added."""
        args = self.trainer.args
        values, advantages = read_heads(model, inputs, self.embedding)
        if model.training and self.trainer._sources.pairs:
            loss = pairs_loss(inputs, advantages, args.temperature)
        elif model.training:
            sampling = (args.temperature, args.top_p, self._on_policy())
            loss = head_loss(inputs, advantages, *sampling)
        else:
            loss = (
                (values - inputs["labels"]).square().nanmean()
            )  # of `V`: `A` has its own measures
            sums = self._sums(inputs, values, advantages)
            self.trainer._metrics["eval"].add(sums)
        return loss, values

    def _sums(
        self, batch: dict[str, torch.Tensor], values: torch.Tensor, advantages: torch.Tensor
    ) -> torch.Tensor:
        trainer = self.trainer
        sampling = (trainer.args.temperature, trainer.args.top_p, self._on_policy())
        return efficiency_sums(batch, values, advantages.mean(0), *sampling)

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """The measures of the heads as they are on the held-out trees, which processes share."""
        trainer = self.trainer
        accelerator, model = trainer.accelerator, trainer.accelerator.unwrap_model(trainer.model)
        training = model.training
        model.eval()
        metrics = HeadMetrics(trainer.objectives)
        for item in self.held_out[accelerator.process_index :: accelerator.num_processes]:
            batch = trainer._prepare_inputs(collate_rows([item]))
            values, advantages = read_heads(model, batch, self.embedding)
            metrics.add(self._sums(batch, values, advantages))
        model.train(training)
        measures = metrics.measures()
        if unknown := [name for name in trainer.objectives if name not in measures]:
            raise ValueError(
                f"no held-out prompt has a reward of {unknown[0]!r}, on which its heads are chosen "
                "and scaled: give an `eval_dataset` with prompts that it applies to"
            )
        return measures

    def _consider(self) -> dict[str, Any]:
        """Keeps the heads as they are if they are the best so far; returns their measures."""
        measures = self.measure()
        found = [of_objective["kl_efficiency"]["value"] for of_objective in measures.values()]
        score = float(np.mean(np.sign(found) * np.sqrt(np.abs(found))))
        if self.best is None or score > self.best[0]:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            weights = {
                name: x.detach().clone().contiguous() for name, x in model.state_dict().items()
            }
            self.best = (score, measures, weights)
        return measures

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epochs = state.epoch or 0.0
        # What an iteration begins with may be the best; and so may the end of an epoch, at which a
        # checkpoint may have been made before it was measured.
        if (epochs or self.trainer._iterations.current) and abs(epochs - round(epochs)) < 1e-6:
            self._consider()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer._kept is not None:
            keep_actions(trainer.accelerator.unwrap_model(trainer.model), trainer._kept)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        measures = self._consider()
        self.trainer.log({f"held_out/{k}": x for k, x in flat_metrics(measures).items()})

    def save(self, folder: Path) -> None:
        """Keeps the best heads so far with a checkpoint."""
        if self.best is not None:
            score, measures, weights = self.best
            metadata = {"score": json.dumps(score), "measures": json.dumps(measures)}
            save_file(weights, folder / BEST, metadata=metadata)

    def resume(self, folder: str | None) -> None:
        """Takes up the best heads of a checkpoint; None begins anew."""
        self.best = None
        if folder is not None and (Path(folder) / BEST).exists():
            with safe_open(Path(folder) / BEST, framework="pt") as file:
                found = file.metadata()
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.best = (json.loads(found["score"]), json.loads(found["measures"]), weights)

    def finish(self) -> None:
        """Takes the best heads up, with their scale and their table."""
        trainer, config = self.trainer, self.trainer.value_config
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self.best is not None:
            _, measures, weights = self.best
            model.load_state_dict(weights)
            self.best = None
        else:  # nothing was trained
            measures = self.measure()
        scales = [of_objective["scale"]["value"] for of_objective in measures.values()]
        config.candidate_scale = [max(0.0, scale) * trainer.args.temperature for scale in scales]
        config.provenance = {**(config.provenance or {}), "held_out": measures}
        for name, of_objective in measures.items():
            if of_objective["kl_efficiency"]["low"] <= 0:
                logger.warning(
                    f"the heads of {name!r} tell candidates apart hardly better than chance: "
                    "their KL efficiency on held-out prompts is {value:.2g} [{low:.2g}, "
                    "{high:.2g}]. More prompts or larger trees (`layers`) help".format(
                        **of_objective["kl_efficiency"]
                    )
                )
        model.write_table(self.embedding)

    def conclude(self, kept: MAVISValueConfig | None) -> None:
        """Takes up the measures of the heads that are kept of several iterations."""
        if kept is not None:
            held_out = (kept.provenance or {})["held_out"]
            self.trainer.value_config.provenance["held_out"] = held_out
