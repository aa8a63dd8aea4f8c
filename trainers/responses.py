"""Responses that are there already as trees, in a few bytes a token until they are stored."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

from .run_state import trees_fingerprint
from .trees import Node, Tree

SOURCE = "data"  # in a folder's rollouts.json


class TokenLists(Sequence[list[int]]):
    """Lists of tokens, four bytes a token."""

    def __init__(self, lists: Iterable[Sequence[int]] = ()) -> None:
        self._tokens, self._ends = array("i"), array("q", [0])
        for tokens in lists:
            self.append(tokens)

    def append(self, tokens: Sequence[int]) -> None:
        """Adds a list."""
        self._tokens.extend(tokens)
        self._ends.append(len(self._tokens))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return [self[i] for i in numbers]
        return self._tokens[self._ends[numbers] : self._ends[numbers + 1]].tolist()


class ResponseTrees(Sequence[Tree]):
    """
    Trees of responses, one for every distinct prompt in order of appearance, made as they are asked
    for. A tree's `prompt_index` is the prompt's first row.

    Args:
        prompt_ids ([`TokenLists`]):
            Of every row.
        objectives (`list[str]`):
            Names of the scores.
    """

    def __init__(self, prompt_ids: Sequence[list[int]], objectives: Sequence[str]) -> None:
        self._prompt_ids, self._objectives = prompt_ids, list(objectives)
        self._numbers: dict[bytes, int] = {}  # of trees, by their prompts
        self._rows = array("q")
        self._pieces: list[array[int]] = []  # of each tree
        self._tokens, self._layers, self._scores = TokenLists(), array("i"), array("d")

    def add(self, row: int, pieces: Iterable[tuple[Sequence[int], Iterable[float]]]) -> None:
        """Adds a response to a row's prompt: the tokens of its pieces, with their scores by
        objective."""
        key = array("i", self._prompt_ids[row]).tobytes()
        number = self._numbers.setdefault(key, len(self._rows))
        if number == len(self._rows):
            self._rows.append(row)
            self._pieces.append(array("q"))
        for layer, (tokens, scores) in enumerate(pieces, start=1):
            self._pieces[number].append(len(self._layers))
            self._layers.append(layer)
            self._tokens.append(tokens)
            self._scores.extend(scores)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Tree: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tree]: ...
    def __getitem__(self, index: int | slice) -> Tree | list[Tree]:
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return [self[i] for i in numbers]
        row, pieces = self._rows[numbers], self._pieces[numbers]
        nodes, scores = [Node(-1, 0, self._prompt_ids[row])], []
        count = len(self._objectives)
        for i in pieces:
            # The pieces of a response come one after the other.
            parent = 0 if self._layers[i] == 1 else len(nodes) - 1
            nodes.append(Node(parent, self._layers[i], self._tokens[i], leaf=True))
            scores.append(self._scores[count * i : count * (i + 1)])
        columns = np.array([[math.nan] * count, *scores]).T.copy()
        return Tree(row, nodes, dict(zip(self._objectives, columns)))


@dataclass
class Responses:
    """
    A dataset of scored responses, of steps or of pairs, as trees.

    Args:
        trees (`Sequence[Tree]`):
            One for every distinct prompt, in order of appearance, with a leaf for every row, or two
            for every pair, the preferred one first. Its `prompt_index` is the prompt's first row.
            Steps are nodes on the way to a leaf, which is the last one that has a label.
        cut (`int`):
            Number of responses longer than `max_completion_length`.
        from_base (`bool`):
            Whether each of them says that the base model sampled it.
        references (`list[tuple[list[int], list[int], list[float]]]`):
            Prompt, tokens and their log-probabilities of some of these responses, if they have any.
    """

    trees: Sequence[Tree]
    cut: int
    from_base: bool = False
    references: list[tuple[list[int], list[int], list[float]]] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """For the provenance of what is trained from them."""
        return {
            "source": SOURCE,
            "prompts": len(self.trees),
            "responses": sum(len(tree.leaves()) for tree in self.trees),
            "cut": self.cut,
            "from_base_model": self.from_base,
            "fingerprint": trees_fingerprint(self.trees),
        }
