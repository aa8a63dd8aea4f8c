"""Looks up in the sources of a vLLM release what trimtab reads of it, for one that cannot run here.

It finds what is gone, not what means something else now. `python tests/plugins/vllm_sources.py
[VERSION]` downloads the wheel, of the newest release if none is named.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Beside what is imported: of a class (`-`: of the file) its fields, and functions' first arguments
READ = """
config/model.py ModelConfig dtype enable_prompt_embeds get_vocab_size(self) hf_config
  is_encoder_decoder logits_processors logprobs_mode max_logprobs max_model_len model quantization
  revision runner_type served_model_name skip_tokenizer_init supports_multimodal_inputs tokenizer
config/parallel.py ParallelConfig data_parallel_index distributed_executor_backend
  enable_batch_sharded_sampling pipeline_parallel_size tensor_parallel_size
config/scheduler.py SchedulerConfig async_scheduling max_num_seqs
config/vllm.py VllmConfig additional_config lora_config model_config parallel_config
  scheduler_config speculative_config
distributed/parallel_state.py - get_pp_group() get_tp_group() model_parallel_is_initialized()
distributed/parallel_state.py GroupCoordinator is_first_rank is_last_rank
entrypoints/llm.py LLM llm_engine
model_executor/custom_op.py - maybe_get_oot_by_class(class_type)
model_executor/layers/logits_processor.py LogitsProcessor logits_as_input
  forward(self, lm_head, hidden_states)
plugins/endpoint_plugins/interface.py EndpointPlugin name required_tasks attach_router(self, app)
  init_state(self, engine_client, state, args)
sampling_params.py SamplingParams extra_args temperature
v1/engine/input_processor.py InputProcessor vllm_config
v1/sample/logits_processor/builtin.py - process_dict_updates(req_entries, batch_update, new_state)
v1/sample/logits_processor/interface.py BatchUpdate batch_size
v1/sample/logits_processor/interface.py LogitsProcessor __init__(self, vllm_config, device,
  is_pin_memory) apply(self, logits) is_argmax_invariant(self) update_state(self, batch_update)
  validate_params(cls, sampling_params)
v1/worker/gpu/sample/logits_processor/interface.py LogitsContext expanded_idx_mapping
  idx_mapping_np input_ids seq_lens_upper_bound_np
v1/worker/gpu/sample/logits_processor/interface.py LogitsProcRequestState all_token_ids device
  prefill_len
v1/worker/gpu/sample/logits_processor/interface.py LogitsProcessor __init__(self, vllm_config,
  req_states) add_request(self, req_idx, sampling_params) apply(self, logits, ctx)
  apply_staged_writes(self) validate_params(cls, sampling_params)
v1/worker/gpu_model_runner.py GPUModelRunner discard_request_mask optimistic_seq_lens_cpu
"""


def names(node: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Every name and attribute that is set in `node`, and the arguments of functions."""
    for inner in ast.walk(node):
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield inner.name, [argument.arg for argument in inner.args.args]
        elif isinstance(inner, (ast.ClassDef, ast.alias)):
            yield getattr(inner, "asname", None) or inner.name, []
        elif isinstance(getattr(inner, "ctx", None), ast.Store):
            yield getattr(inner, "id", getattr(inner, "attr", "")), []


def missing(read: Callable[[str], str]) -> Iterator[str]:
    """What is gone from vLLM, of which `read` returns a file's text, empty if there is no file."""
    for path in (*(ROOT / "plugins").rglob("*.py"), *(ROOT / "trainers").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            package, *parts = (getattr(node, "module", None) or "").split(".")
            if isinstance(node, ast.ImportFrom) and package == "vllm" and not node.level:
                folder = "".join(f"{part}/" for part in parts)
                text = read(f"{folder}__init__.py") or read(f"{folder[:-1]}.py")
                there = dict(names(ast.parse(text)))
                for one in node.names:
                    if one.name not in there and not read(f"{folder}{one.name}.py"):
                        yield f"{one.name} of {node.module}, which {path.name} imports"
    for line in re.split(r"\n(?=\S)", READ.strip()):
        file, owner, *members = line.split()
        tree = ast.parse(read(file))
        classes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == owner]
        there = dict(names(tree if owner == "-" else classes[0] if classes else ast.Module([], [])))
        for name, arguments in re.findall(r"(\w+)(\([^)]*\))?", " ".join(members)):
            expected = re.findall(r"\w+", arguments)
            if name not in there or there[name][: len(expected)] != expected:
                yield f"{owner}.{name}{arguments} of {file}: now {there.get(name, 'nothing')}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "-d", folder, "==".join(["vllm", *sys.argv[1:]])], check=True)
        (path,) = Path(folder).iterdir()
        with zipfile.ZipFile(path) as wheel:
            texts = {n: wheel.read(n).decode() for n in wheel.namelist() if n.endswith(".py")}
    gone = list(missing(lambda name: texts.get(f"vllm/{name}", "")))
    print(f"{path.name}: {len(gone)} of the names that trimtab reads are gone", *gone, sep="\n")
    sys.exit(bool(gone))
