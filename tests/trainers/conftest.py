"""A tiny base model with a word tokenizer, made on the fly. Its padding token is its end token."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
