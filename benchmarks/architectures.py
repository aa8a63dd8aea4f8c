"""Which of transformers' decoders the value engine runs: each is tried, with random weights.

Every family of causal language models gets a tiny configuration and goes through the check that
serving and training make (`trimtab.plugins.probe`): a prefix with candidates through the engine's
attention and store, against a plain forward pass. Windows are shorter than the text.

    python benchmarks/architectures.py    # two minutes; writes docs/architectures.md and its JSON
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trimtab.plugins import MAVISValueConfig, MAVISValueModel
from trimtab.plugins.engine import check_servable

DOCS = Path(__file__).parents[1] / "docs"
MAX_LENGTH = 64
LARGEST = 20_000_000  # parameters
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "sliding_window": 9,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def tiny_model(family: str, left_out: frozenset[str] = frozenset()) -> MAVISValueModel:
    """A value model of `family` with random weights and every size above that it knows.

    Raises:
        Exception: The family refuses them, in its own way, or stays large.
    """
    default = AutoConfig.for_model(family).get_text_config()
    fields = {*default.to_dict(), *default.attribute_map} - left_out
    config = type(default)(**{name: size for name, size in SIZES.items() if name in fields})
    config = MAVISValueConfig(backbone_config=config, objectives=["reward"])
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in MAVISValueModel(config).parameters())
    if size > LARGEST:
        raise MemoryError(f"{size} parameters")
    torch.manual_seed(0)
    model = MAVISValueModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # the usual small ones would hide what attention does
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    model(torch.tensor([[3, 4, 5]]))
    return model


def outcome(family: str) -> str:
    """Empty if the family is served, else why it is not."""
    try:
        model = tiny_model(family)
    except Exception:
        try:  # heads of several widths
            model = tiny_model(family, frozenset({"head_dim"}))
        except Exception as error:
            return f"not tried: no small model of it ({type(error).__name__})"
    try:
        check_servable(model, MAX_LENGTH)
    except ValueError as error:
        return " ".join(str(error).split())
    return ""


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    outcomes = {}
    for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        outcomes[family] = outcome(family)
        print(f"{family}: {outcomes[family] or 'served'}", flush=True)
    served = [family for family, why in outcomes.items() if not why]
    untried = [family for family, why in outcomes.items() if why.startswith("not tried")]
    refused = {f: why for f, why in outcomes.items() if why and f not in untried}
    lines = [
        "# Which decoders can be the backbone of a value model",
        "",
        "Made by `python benchmarks/architectures.py` with transformers "
        f"{transformers.__version__}, {len(served)} families are served,",
        f"{len(refused)} refused, {len(untried)} were not tried. The same check runs when a server "
        "starts and before a value model is",
        "trained, on the model itself: what is not supported is refused by name, whatever stands "
        "here.",
        "",
        "**Served**: " + ", ".join(served) + ".",
        "",
        "| refused | why |",
        "| --- | --- |",
        *(f"| {family} | {short(why)} |" for family, why in refused.items()),
        "",
        "**Not tried**, for want of a small model: " + ", ".join(untried) + ".",
    ]
    (DOCS / "architectures.md").write_text("\n".join(lines) + "\n")
    results = {"transformers": transformers.__version__, "outcomes": outcomes}
    (DOCS / "architectures.json").write_text(json.dumps(results, indent=1) + "\n")


def short(why: str) -> str:
    """The reason within the message, for a table."""
    why = why.split("is not supported: ", 1)[-1].split("; use a decoder")[0]
    return why.replace("|", "\\|")[:160]


if __name__ == "__main__":
    main()
