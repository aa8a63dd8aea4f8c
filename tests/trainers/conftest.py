"""A tiny base model with a word tokenizer, made on the fly. Its padding token is its end token."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from trimtab.plugins.transformers import MAVISLogitsProcessor

ROOT = Path(__file__).parents[2]  # where programs find `tests`
WORDS = ["good", "bad", "red", "blue", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]
VOCABULARY = ["<end>", "<unk>", "<user>", "<assistant>", *WORDS]
END = 0


def make_tokenizer(chat_template=True):
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="<unk>"
    )
    if chat_template:
        fast.chat_template = (
            "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
    return fast


def make_model(**config):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": len(VOCABULARY),
                "hidden_size": 64,  # two heads of 32, the least that vLLM takes on a CPU
                "intermediate_size": 128,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 128,
                "eos_token_id": END,
                "bos_token_id": None,
                "pad_token_id": END,
                "tie_word_embeddings": False,
                **config,
            }
        )
    )
    # Responses differ, and <end> is not too rare.
    model.lm_head.weight.data.mul_(3)
    return model.eval()


def in_two_processes(program, **environment):
    """Runs a program as `accelerate launch` does: with gloo, or on a GPU each."""
    if torch.cuda.device_count() == 1:
        pytest.skip("two processes want a GPU each")
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0", str(program),
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    subprocess.run(command, check=True, env={**os.environ, **own, **environment})


def guided_texts(base_model, folder, tokenizer, weights):
    """200 responses to one prompt that a value model guides."""
    model = AutoModelForCausalLM.from_pretrained(base_model).eval()
    ids = torch.tensor([tokenizer("a b").input_ids]).expand(200, -1)
    processor = MAVISLogitsProcessor(
        [str(folder)], weights=weights, beta=4.0, model=model, tokenizer=tokenizer
    )
    torch.manual_seed(0)
    out = model.generate(
        ids, do_sample=True, top_k=18, max_new_tokens=12, logits_processor=[processor]
    )
    return tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def base_model(tmp_path_factory):
    """Path of the tiny base model and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)
