"""The command `trimtab`, and `python -m trimtab`. Each subcommand is a function of its arguments;
nothing that a subcommand needs is imported before it runs."""

from __future__ import annotations

import sys
from importlib import import_module

from trimtab import __version__

HELP = """usage: trimtab COMMAND ...

Value-guided decoding (MAVIS): train value models, look at them, serve with them.

  train       train a value model on prompts and reward functions
  rollouts    collect, score or show the responses that value models learn from
  evaluate    the front of a value model's objectives, as a report
  inspect     what a value model is: objectives, base model, how well it guides
  check       whether a value model will serve: tokenizer, weights, a prefix tried
  serve       print and run the `vllm serve` command with value models
  playground  a page on such a server: sliders, answers side by side

`trimtab COMMAND --help` says more; `trimtab --version`: {version}.
"""
# Module, extra that brings what it needs
COMMANDS = {
    "train": ("trimtab.trainers.cli", "trl"),
    "rollouts": ("trimtab.trainers.cli", "trl"),
    "evaluate": ("trimtab.trainers.cli", "trl"),
    "inspect": ("trimtab.plugins.cli", "transformers"),
    "check": ("trimtab.plugins.cli", "transformers"),
    "serve": ("trimtab.plugins.cli", "vllm"),
    "playground": ("trimtab.playground", "playground"),
}
EXTRAS = {
    "accelerate", "datasets", "gradio", "httpx", "openai", "peft", "pyarrow", "torch", "tqdm",
    "transformers", "trl",
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand.

    Returns:
        0 when it did what it was asked, 1 when `check` finds that a value model will not serve, 2
        when the arguments, or what they name, cannot be used.
    """
    given = sys.argv[1:] if arguments is None else arguments
    command = given[0] if given else "--help"
    if command == "--version":
        print(__version__)
        return 0
    if command in ("-h", "--help"):
        print(HELP.format(version=__version__), end="")
        return 0
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"trimtab: error: no command {command!r}, give one of {known}", file=sys.stderr)
        return 2
    module, extra = COMMANDS[command]
    try:
        return int(getattr(import_module(module), command)(given[1:]))
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in EXTRAS:
            raise
        told = str(error)
        if f"pip install {missing}" not in told:  # the need of an option, which no extra brings
            told = f"it needs {missing}; pip install 'trimtab[{extra}]'"
        print(f"trimtab {command}: error: {told}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.argv[0] = "trimtab"  # as a value model's provenance names it
    sys.exit(main())
