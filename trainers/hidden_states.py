"""The base model's hidden states along trees of responses, kept beside the rollouts.

Heads on the base model's hidden state train on what the frozen base model computes once: the hidden
state after every token of a tree, and the likeliest next tokens there. They are stored by file of
rollouts, read by memory mapping, and are of one checkpoint and one set of trees: what does not fit
is computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from trimtab.plugins.hidden_states import OutputLayerInput

from .packing import DataCollatorForTrees, pack_tree
from .trees import MARGIN, Tree, read_trees

FORMAT = 1  # of the files
TOLERANCE = 0.05  # relative, of a hidden state computed in its tree


def row_starts(tree: Tree) -> np.ndarray:
    """
    Row of every node's first token, `[n_nodes + 1]`; row 0 is the prompt's last token.
    """
    lengths = [1, *(len(node.tokens) for node in tree.nodes[1:])]
    return np.concatenate([[0], np.cumsum(lengths)])


def tree_rows(tree: Tree, values: np.ndarray, known: np.ndarray) -> dict[str, np.ndarray]:
    """
    The tokens of a tree as rows: the prompt's last token, then every node's.

    Args:
        tree (`Tree`):
            Responses to one prompt.
        values (`np.ndarray`):
            Standardised value of every node, `[n_nodes, n_objectives]`.
        known (`np.ndarray`):
            Share of the responses below every node that have a reward, `[n_nodes, n_objectives]`.

    Returns:
        `dict[str, np.ndarray]`: of every row

        - `tokens`, `previous` (row of the token before it on its branch; its own for row 0),
          `depths` (tokens since the prompt): `[n]` int64
        - `shares` (weight of its return in that of the row before it) and `reach` (probability that
          a response passes it and has a reward): `[n, n_objectives]` float32
        - `ends` (whether it finishes a response, or a step with a label): `[n]` bool
        - `labels` (mean return of the responses that pass it): `[n, n_objectives]` float32, NaN of
          objectives that are not known
    """
    starts = row_starts(tree)
    total, shares_of_nodes = tree.total_weights(), tree.shares()
    n, count = int(starts[-1]), values.shape[1]
    rows: dict[str, np.ndarray] = {
        "tokens": np.empty(n, dtype=np.int64),
        "previous": np.arange(-1, n - 1),
        "depths": np.zeros(n, dtype=np.int64),
        "shares": np.ones((n, count), dtype=np.float32),
        "reach": np.empty((n, count), dtype=np.float32),
        "ends": np.zeros(n, dtype=bool),
        "labels": np.empty((n, count), dtype=np.float32),
    }
    rows["tokens"][0], rows["previous"][0] = tree.nodes[0].tokens[-1], 0
    rows["labels"][0], rows["reach"][0] = values[0], known[0]
    for i, node in enumerate(tree.nodes[1:], start=1):
        first, end = starts[i], starts[i + 1]
        own, parent = slice(first, end), node.parent
        rows["tokens"][own] = node.tokens
        before = rows["previous"][first] = starts[parent + 1] - 1
        rows["depths"][own] = rows["depths"][before] + np.arange(1, end - first + 1)
        of_parent = np.where(known[parent] > 0, known[parent], 1)
        rows["shares"][first] = node.weight / total[parent] * (known[i] / of_parent)
        rows["reach"][own] = shares_of_nodes[i] * known[i]
        rows["ends"][end - 1] = node.leaf
        rows["labels"][own] = values[i]
    return rows


def cache_path(rollouts: Path) -> Path:
    """The file of hidden states that belongs to a file of rollouts."""
    return rollouts.with_suffix(".hidden.safetensors")


def cache_hidden_states(
    folder: str | Path,
    load_base_model: Callable[[], Any],
    checkpoint_fingerprint: str | None,
    top_k: int,
    max_length: int,
    pad_token_id: int,
    accelerator: Any,
) -> torch.Tensor:
    """
    Computes what is missing of a folder's hidden states. The processes share the files.

    Args:
        folder (`str` or `Path`):
            Where [`collect_rollouts`] wrote.
        load_base_model (`Callable[[], PreTrainedModel]`):
            Called when something is missing.
        checkpoint_fingerprint (`str`, *optional*):
            Tells the base model's checkpoint from others.
        top_k (`int`):
            Number of candidates after every prefix.
        max_length (`int`):
            Maximum number of tokens of a sequence that the base model reads; larger trees are cut.
        pad_token_id (`int`):
            Any token.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's.

    Returns:
        `torch.Tensor`: the base model's token embedding, `[vocab, embedding_size]`, memory-mapped.
    """
    of_embedding = Path(folder) / "embedding.hidden.safetensors"
    paths = sorted(Path(folder).glob("trees-*.parquet"))
    base_model: Any = None
    mine = paths[accelerator.process_index :: accelerator.num_processes]
    show = accelerator.is_main_process
    for path in tqdm(mine, desc="Hidden states of the base model", unit="file", disable=not show):
        trees = read_trees(path)[0]
        identity = _identity(trees, checkpoint_fingerprint, top_k)
        if _stored_identity(cache_path(path)) == identity:
            continue
        if base_model is None:
            base_model = load_base_model().eval()
            if not hasattr(base_model, "hf_device_map"):
                base_model = base_model.to(accelerator.device)
            _check_trees_are_followed(base_model, trees, max_length, pad_token_id)
        columns = [read_tree(base_model, t, top_k, max_length, pad_token_id) for t in trees]
        tensors = {name: torch.cat([c[name] for c in columns]) for name in columns[0]}
        _write(cache_path(path), tensors, identity)
    of_checkpoint = f"{FORMAT} {checkpoint_fingerprint}"
    if show and _stored_identity(of_embedding) != of_checkpoint:
        base_model = load_base_model() if base_model is None else base_model
        embedding = base_model.get_input_embeddings().weight.detach().cpu().contiguous()
        _write(of_embedding, {"embedding": embedding.clone()}, of_checkpoint)
    accelerator.wait_for_everyone()
    with _open(of_embedding) as file:
        return file.get_tensor("embedding")


def packed_rows(
    tree: Tree, max_length: int
) -> Iterator[tuple[dict[str, Any], torch.Tensor, torch.Tensor]]:
    """
    A tree's sequences of [`pack_tree`], each with the positions of the rows of [`tree_rows`] that
    it is the first to hold, and these rows, `[m]` int64 both.
    """
    starts = row_starts(tree)
    # The labels say which node a token is of; a repeated one has none.
    numbers = np.arange(len(tree.nodes), dtype=float)[:, None]
    for sequence in pack_tree(tree, numbers, max_length):
        of_node = sequence["labels"][:, 0]
        at = np.flatnonzero(~np.isnan(of_node))
        nodes = of_node[at].astype(np.int64)
        first = np.r_[True, nodes[1:] != nodes[:-1]]  # a node's tokens lie together
        places = np.arange(len(at))
        offsets = places - np.maximum.accumulate(np.where(first, places, 0))
        yield sequence, torch.from_numpy(at), torch.from_numpy(starts[nodes] + offsets)


@torch.no_grad()
def read_tree(
    base_model: Any, tree: Tree, top_k: int, max_length: int, pad_token_id: int
) -> dict[str, torch.Tensor]:
    """
    What the base model computes after every row of [`tree_rows`].

    Returns:
        `dict[str, torch.Tensor]`: `hidden`, `[n, hidden_size]` in the base model's dtype, what its
        output layer reads; `candidates`, `[n, k]` int32, the likeliest next tokens, likeliest
        first; `log_probs`, `[n, k]` float32, normalised over them.
    """
    length = int(row_starts(tree)[-1])
    found: dict[str, torch.Tensor] = {}
    collate = tree_collator(base_model, pad_token_id)
    for sequence, at, rows in packed_rows(tree, max_length):
        hidden, logits = _run(base_model, collate([sequence]), at)
        for part, read, scores in zip(rows.split(512), hidden.split(512), logits.split(512)):
            top, candidates = scores.float().topk(min(top_k, scores.shape[-1]))
            for name, column in (
                ("hidden", read),
                ("candidates", candidates.int()),
                ("log_probs", top.log_softmax(-1)),
            ):
                if name not in found:
                    shape = (length, column.shape[1])
                    found[name] = torch.empty(shape, dtype=column.dtype)
                found[name][part] = column.cpu()
    return found


def tree_collator(base_model: Any, pad_token_id: int) -> DataCollatorForTrees:
    """The collator whose masks the base model takes."""
    attention = base_model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"the base model uses attn_implementation={attention!r}, which takes no mask of a "
            "tree; set model_init_kwargs={'attn_implementation': 'sdpa'}"
        )
    return DataCollatorForTrees(pad_token_id, additive_mask=attention == "eager")


def _run(
    base_model: Any, batch: dict[str, torch.Tensor], at: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and logits of one sequence at the positions `at`."""
    device = base_model.get_input_embeddings().weight.device
    read: list[torch.Tensor] = []
    handle = base_model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: read.append(args[0])
    )
    try:
        logits = base_model(
            **{n: batch[n].to(device) for n in ("input_ids", "attention_mask", "position_ids")},
            use_cache=False,
            logits_to_keep=at.to(device),
        ).logits[0]
    finally:
        handle.remove()
    return read[0][0], logits


@torch.no_grad()
def _check_trees_are_followed(
    base_model: Any, trees: Sequence[Tree], max_length: int, pad_token_id: int
) -> None:
    """
    Compares a response's last hidden state in its tree with that of the response alone: heads would
    be trained on nonsense by a model that ignores the mask (a recurrent one, a sliding window).
    """
    tree = max(trees, key=lambda tree: len(tree.nodes[0].tokens))
    leaf = tree.leaves()[-1]
    watched = OutputLayerInput(base_model)
    ids = torch.tensor([tree.nodes[0].tokens + tree.response(leaf)])
    base_model(ids.to(base_model.get_input_embeddings().weight.device), use_cache=False)
    alone = watched.take()
    assert alone is not None
    packed = read_tree(base_model, tree, 1, max_length, pad_token_id)["hidden"]
    alone, packed = alone[0].float().cpu(), packed[row_starts(tree)[leaf + 1] - 1].float()
    error = float((packed - alone).norm() / alone.norm())
    if not error < TOLERANCE:
        raise ValueError(
            f"the base model {base_model.config.model_type!r} does not follow the mask of a tree "
            f"(relative error {error:.2g}), so that its hidden states along trees are not those "
            "that it is served with; use a base model with full attention"
        )


def _identity(trees: Sequence[Tree], checkpoint_fingerprint: str | None, top_k: int) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, checkpoint_fingerprint, top_k]).encode())
    for tree in trees:
        digest.update(json.dumps([[n.parent, n.tokens] for n in tree.nodes]).encode())
    return digest.hexdigest()


def _write(path: Path, tensors: dict[str, torch.Tensor], identity: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, metadata={"identity": identity})
    partial.replace(path)


def _stored_identity(path: Path) -> str | None:
    if not path.exists():
        return None
    with _open(path) as file:
        return (file.metadata() or {}).get("identity")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"the hidden states in {str(path)!r} are cut off or damaged ({error}); remove the file "
            "to compute them again"
        ) from error


class HeadDataset(Dataset):
    """
    Trees with the base model's hidden states, memory-mapped.

    Args:
        folders (`list` of `str` or `Path`):
            Whose hidden states [`cache_hidden_states`] computed.
        objectives (`list[str]`):
            Rewards to learn, in the order of the heads' outputs.
        mean (`np.ndarray`):
            Subtracted from the rewards, `[n_objectives]`.
        std (`np.ndarray`):
            Divides the rewards, `[n_objectives]`.
        kl_penalty (`float`, *optional*, defaults to `0.0`):
            Standard deviations that a nat of KL to the base model costs, on trees of a policy.
        keep (`Callable[[np.ndarray], np.ndarray]`, *optional*):
            Of [`MappedArrays`], for the other arrays; by default they are in memory.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        objectives: Sequence[str],
        mean: np.ndarray,
        std: np.ndarray,
        kl_penalty: float = 0.0,
        keep: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ) -> None:
        self.items: list[dict[str, Any]] = []
        for folder in folders:
            for path in sorted(Path(folder).glob("trees-*.parquet")):
                with _open(cache_path(path)) as file:
                    stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                start = 0
                for tree in read_trees(path)[0]:
                    # A policy's trees have the reward of its own objective alone.
                    values = np.full((len(tree.nodes), len(objectives)), np.nan)
                    known = np.zeros(values.shape)
                    for i, name in enumerate(objectives):
                        if name in tree.rewards:
                            values[:, i] = tree.values(name, kl_penalty * std[i])
                            known[:, i] = tree.known(name)
                    rows = tree_rows(tree, (values - mean) / std, known)
                    if MARGIN in tree.rewards:  # at the preferred response's last token
                        rows["margins"] = np.zeros(len(rows["tokens"]), dtype=np.float32)
                        rows["margins"][rows["ends"]] = tree.rewards[MARGIN][tree.leaves()]
                    stop = start + len(rows["tokens"])
                    part = {name: tensor[start:stop] for name, tensor in stored.items()}
                    if known.any():
                        rows = {name: keep(array) for name, array in rows.items()}
                        self.items.append({**rows, **part, "tree": tree.prompt_index})
                    start = stop

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def collate_rows(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """
    The rows of several trees one behind the other; `trees` says which tree a row is of.
    """
    sizes = [len(item["tokens"]) for item in items]
    offsets = np.cumsum([0, *sizes[:-1]])
    batch = {
        name: torch.cat([torch.as_tensor(item[name]) for item in items])
        for name in items[0]
        if name not in ("tree", "previous")
    }
    batch["previous"] = torch.cat(
        [torch.from_numpy(item["previous"]) + int(o) for item, o in zip(items, offsets)]
    )
    batch["trees"] = torch.repeat_interleave(torch.arange(len(items)), torch.tensor(sizes))
    return batch
