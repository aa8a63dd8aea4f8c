"""Whether a backbone computes in the value engine what it computes in transformers.

The engine brings its own attention and store. A family of models whose attention is more
than what it is told would be valued wrongly and in silence: so every backbone is asked for a prefix
and two candidates, the plain way first and then through the engine, before it serves or is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .attention import ATTENTION, BLOCK_SIZE, TAKEN

CANDIDATES = 2
BEYOND = 8  # tokens of a prefix beyond the last length at which something changes
REMEDY = (
    "use a decoder of full or sliding-window attention with rotary embeddings, see "
    "docs/architectures.md"
)


class Probe:
    """What a backbone computes by itself; made before the engine takes it over.

    Args:
        backbone: A decoder, of transformers, on its device.
        adapters: Number of adapters in it, each with an equal share of the rows.
        max_length: Longest prefix that it will be asked for.

    Attributes:
        prefix: Token ids.
        candidates: Token ids.
        expected: Hidden states `[adapters, 1 + candidates, hidden]` at the prefix's last token and
            at every candidate behind it; None if an engine has taken the backbone over before,
            which then checked it.

    Raises:
        ValueError: The backbone does not run at all.
    """

    @torch.inference_mode()
    def __init__(self, backbone: Any, adapters: int, max_length: int) -> None:
        self.config = backbone.config
        self.expected: torch.Tensor | None = None
        length = probe_length(self.config, max_length)
        tokens = [(7919 * i + 3) % self.config.vocab_size for i in range(length + CANDIDATES)]
        self.prefix, self.candidates = tokens[:length], tokens[length:]
        if self.config._attn_implementation == ATTENTION:
            return
        rows = [[*self.prefix, candidate] for candidate in self.candidates]
        input_ids = torch.tensor(rows, device=backbone.get_input_embeddings().weight.device)
        with refused(self.config):
            hidden = backbone(input_ids=input_ids.repeat(adapters, 1), use_cache=False)[0]
        hidden = hidden.view(adapters, len(rows), length + 1, -1)
        self.expected = torch.cat((hidden[:, :1, -2], hidden[:, :, -1]), dim=1).float()

    def compare(self, run: Callable[[], torch.Tensor]) -> None:
        """Refuse the backbone if the hidden states that `run` returns are not the expected ones.

        Raises:
            ValueError: They differ by more than rounding, or `run` fails.
        """
        assert self.expected is not None
        with refused(self.config):
            found = run()
            tolerance = torch.finfo(found.dtype).eps ** 0.5
            error = float((found.float() - self.expected).norm() / self.expected.norm())
            if not error <= tolerance:
                raise RuntimeError(
                    f"after a prefix of {len(self.prefix)} tokens it computes in the value engine "
                    f"other hidden states than in transformers (relative error {error:.2g})"
                )


class refused:
    """Whatever is raised within is a `ValueError` that names the kind of backbone."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            why = str(error)
            if why == TAKEN:
                why = "its layers do not pass on what the engine tells its attention"
            raise ValueError(
                f"a backbone of type {self.config.model_type!r} is not supported: {why}; {REMEDY}"
            ) from error


def probe_length(config: Any, max_length: int) -> int:
    """Tokens of a prefix after which everything that depends on the length has shown itself."""
    marks = [BLOCK_SIZE]
    for fields in (config.to_dict(), getattr(config, "rope_parameters", None) or {}):
        marks += [
            value
            for name, value in fields.items()
            if ("window" in name or name == "original_max_position_embeddings")
            and isinstance(value, int)
            and value < max_length
        ]
    return max(1, min(max(marks) + BEYOND, max_length - 1))
