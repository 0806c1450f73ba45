"""Liger's kernels in the body of a model: when they are refused, and that logits do not change.

Triton's interpreter runs them here; on a GPU they are unmeasured.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.models.qwen2 import modeling_qwen2

from prefix_rft.checks import ConfigError
from prefix_rft.config import packages
from prefix_rft.config.sections import ModelConfig
from prefix_rft.model import loading
from prefix_rft.model.loading import host_config, load_model

CUDA = torch.device("cuda")


@pytest.fixture
def liger(monkeypatch):
    """Undoes after the test what Liger replaces in the module of the model class."""
    pytest.importorskip("liger_kernel")
    for name in ("apply_rotary_pos_emb", "Qwen2RMSNorm", "Qwen2MLP"):
        monkeypatch.setattr(modeling_qwen2, name, getattr(modeling_qwen2, name))
    return loading._apply_liger


@pytest.fixture
def interpreted(monkeypatch) -> None:
    """Adds what Triton's interpreter lacks for Liger: float arguments and CUDA's rsqrt."""
    rms_norm = pytest.importorskip("liger_kernel.ops.rms_norm")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    language, convert = interpreter.tl, interpreter._implicit_cvt

    def convert_floats(value):
        if not isinstance(value, float):
            return convert(value)
        handle = interpreter.TensorHandle(np.array([value], np.float32), language.float32)
        return language.tensor(handle, language.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_floats)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: language.math.rsqrt(x))


def test_liger_needs_cuda_and_its_package(tiny_model, tmp_path, monkeypatch) -> None:
    tiny_model.save_pretrained(tmp_path)
    config = ModelConfig(device="cpu", liger=True)
    with pytest.raises(ConfigError, match="model.liger: expected a CUDA device, got cpu"):
        load_model(config, tmp_path)
    load_model(host_config(replace(config, attention="flash_attention_2")), tmp_path)
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"model.liger: .* pip install '\.\[liger\]'"):
        loading._require_liger(CUDA)


def test_a_model_that_liger_does_not_know_is_refused(make_model, liger) -> None:
    with pytest.raises(ConfigError, match="liger-kernel does not support CohereForCausalLM"):
        liger(make_model("cohere"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter needs the CPU")
def test_logits_and_gradients_stay_as_they_were(make_model, liger, interpreted) -> None:
    plain, patched = make_model(), make_model()
    head_forward = type(patched).forward
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    expected = plain(ids).logits
    expected.square().sum().backward()
    liger(patched)
    assert type(patched).forward is head_forward and "forward" not in vars(patched)
    mlp = patched.model.layers[0].mlp
    assert "liger" in mlp.forward.__func__.__module__
    assert "liger" in patched.model.norm.forward.__func__.__module__
    assert "liger" in modeling_qwen2.apply_rotary_pos_emb.__module__
    logits = patched(ids).logits
    logits.square().sum().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    weights = zip(patched.parameters(), plain.parameters(), strict=True)
    for weight, reference in weights:
        torch.testing.assert_close(weight.grad, reference.grad, rtol=1e-3, atol=1e-3)
