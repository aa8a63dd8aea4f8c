"""Tiny models and plain reference computations that the tests share."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Models are tiny, and threads that wait for each other spin: one each, wherever it is put.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import pytest
from hypothesis import HealthCheck, settings

# No deadline: a busy machine is no fault. `--hypothesis-profile=long` looks for longer.
settings.register_profile(
    "short", deadline=None, max_examples=60, suppress_health_check=list(HealthCheck)
)
settings.register_profile("long", settings.get_profile("short"), max_examples=2000)
settings.load_profile("short")

VOCAB_SIZE = 96
EOS = 2
WORDS = [f"w{i}" for i in range(3, VOCAB_SIZE)]


def wait_until_up(process: subprocess.Popen, url: str, log: Path) -> None:
    """Waits for a server, which writes to `log`; pytest's own limit catches a hang."""
    while True:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(1)


def make_tokenizer(words: list[str] = WORDS):
    """A word-level tokenizer whose padding token is its end-of-sequence token, as SmolLM2's is."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template="{% for m in messages %}<s> {{ m['content'] }} </s> {% endfor %}",
    )


def make_base_model(folder: Path) -> Path:
    """A tiny random Llama, float32, that vLLM and transformers load."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=EOS,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_value_model(folder: Path, base: Path, objectives: list[str], seed: int = 1, **fields):
    """A value model over the base model's first two layers with a random head."""
    import torch

    from trimtab.plugins import MAVISValueModel

    model = MAVISValueModel.from_base_model(
        str(base),
        objectives,
        num_hidden_layers=2,
        tokenizer=make_tokenizer(),
        **fields,
    )
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.head.weight, std=0.15)
    model.save_pretrained(folder)
    return folder


def make_heads(folder: Path, base: Path, objectives: list[str], seed: int = 6, **fields):
    """Random heads on the base model's hidden state."""
    import torch
    from transformers import AutoModelForCausalLM

    from trimtab.plugins import MAVISValueHeads

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    heads = MAVISValueHeads.from_base_model(
        model, objectives, tokenizer=make_tokenizer(), action_rank=8, head_width=16, **fields
    )
    torch.manual_seed(seed)
    for parameter in heads.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.15)
    heads.set_statistics([torch.randn(100, 64) * torch.linspace(0.5, 3, 64) + 1])
    heads.write_table(model.get_input_embeddings().weight)
    heads.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> Path:
    return make_base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def value_model(tmp_path_factory, base_model) -> Path:
    return make_value_model(tmp_path_factory.mktemp("value"), base_model, ["sweet", "sour"])


@pytest.fixture(scope="session")
def salty_model(tmp_path_factory, base_model) -> Path:
    return make_value_model(tmp_path_factory.mktemp("salty"), base_model, ["salty"], seed=4)


@pytest.fixture(scope="session")
def heads(tmp_path_factory, base_model) -> Path:
    return make_heads(tmp_path_factory.mktemp("heads"), base_model, ["sweet", "sour"])
