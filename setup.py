"""Two packages of one repository: `rft_kernels` (torch and triton only) and `prefix_rft`."""

import tomllib
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
KERNELS = tomllib.loads((ROOT / "kernels/pyproject.toml").read_text())["project"]
TORCH, TRITON = KERNELS["dependencies"]
KERNEL_PACKAGES = find_packages("kernels", include=["rft_kernels", "rft_kernels.*"])

setup(
    name="prefix-rft",
    version=KERNELS["version"],
    description="Fused kernels and a lean trainer for Prefix-RFT",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license=KERNELS["license"],
    python_requires=KERNELS["requires-python"],
    packages=find_packages(include=["prefix_rft", "prefix_rft.*"]) + KERNEL_PACKAGES,
    package_dir={"rft_kernels": "kernels/rft_kernels"},
    package_data={"prefix_rft": ["py.typed", "**/*.toml", "**/*.txt"], "rft_kernels": ["py.typed"]},
    install_requires=[
        TORCH,
        "transformers>=5.16,<5.20",
        "datasets>=4",
        "filelock>=3.30",
        "safetensors",
        "math-verify==0.9.0",
        "pydantic>=2.12",
        "tyro>=1.0",
        "tomli-w",
        "rich",
        "matplotlib",
        "tensorboard",
    ],
    extras_require={
        "vllm": ["vllm==0.32.0"],
        "flash-attn": ["flash-attn>=2.8"],
        "liger": ["liger-kernel>=0.8.5"],
        "lora": ["peft>=0.21"],
        "low-memory": ["torchao>=0.18"],
        "wandb": ["wandb"],
        "trl": ["trl>=1.16,<1.17"],
        # On a CPU triton's interpreter runs the kernels; adapters are tested against trl, liger.
        "test": [
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "hypothesis",
            "ruff==0.17.5",
            TRITON,
            "trl==1.16.0",
            "liger-kernel==0.8.5; platform_system == 'Linux'",
            "peft==0.21.2",
            "torchao==0.18.0",
            "gguf",
            "setuptools>=77",  # a test builds the kernels' wheel without the network
        ],
        "bench": ["pytest-benchmark", "matplotlib"],
    },
    entry_points={"console_scripts": ["prefix-rft = prefix_rft.cli:main"]},
)
