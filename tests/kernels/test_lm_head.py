"""The lm_head module against eager models: loss and every parameter's gradient; sharded; LoRA."""

import copy
import os
import pickle
import types
import warnings

import peft
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rft_kernels import (
    LMHead,
    PolicyConfig,
    TokenStats,
    linear_prefix_rft_loss,
    patch_lm_head,
    reference,
)
from torch import nn
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers import AutoConfig, AutoModelForCausalLM

from tests.kernels.kernel_cases import seeded
from tests.kernels.test_token_loss import luffy

VOCAB = 50  # of the tokenizer; the models have 56 columns
CONFIG = PolicyConfig(entropy_coef=0.05, dual_clip=1.2)
ARCHITECTURES = {
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "llama": ("llama", {"tie_word_embeddings": False}),
    "gemma2": ("gemma2", {"final_logit_softcapping": 3.0, "tie_word_embeddings": True}),
    "granite": ("granite", {"logits_scaling": 2.5}),
    "cohere": ("cohere", {"logit_scale": 0.3}),
    "falcon": ("falcon_h1", {"lm_head_multiplier": 0.4, "mamba_d_ssm": 32, "mamba_n_heads": 4}),
}


def make_model(model_type: str = "qwen2", *, dtype=torch.float64, **overrides) -> nn.Module:
    options = {
        "vocab_size": 56,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    config = AutoConfig.for_model(model_type, **(options | overrides))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")


def batch(num_rows: int = 4, length: int = 7) -> tuple[dict, dict]:
    """Token ids, and the inputs of a loss on them, [B, L] each."""
    shape, rand = (num_rows, length), seeded(3)
    ids = torch.randint(2, VOCAB, (num_rows, length + 1), generator=rand)
    named = {
        "old_log_probs": -2 - torch.rand(shape, generator=rand, dtype=torch.float64),
        "advantages": torch.randn(shape, generator=rand, dtype=torch.float64),
        "response_mask": torch.rand(shape, generator=rand) > 0.2,
        "prefix_mask": torch.rand(shape, generator=rand) > 0.5,
        "selected_mask": torch.rand(shape, generator=rand) > 0.5,
    }
    return {"input_ids": ids[:, :-1]}, {"targets": ids[:, 1:]} | named


def options(**extra) -> dict:
    return {"normalizer": 20.0, "config": CONFIG, "temperature": 0.8} | extra


def eager_loss(model: nn.Module, ids: dict, inputs: dict, **extra) -> torch.Tensor:
    """By the model's own logits, [B, L, V], and the specification."""
    logits = model(**ids, use_cache=False).logits
    return reference.prefix_rft_loss(logits, **inputs, vocab_size=VOCAB, **options(**extra)).loss


def as_function(inputs: dict) -> dict:
    """The same rows under a loss that is a function."""
    chosen = {"tokens": (inputs["advantages"],), "mask": inputs["response_mask"]}
    return {"targets": inputs["targets"], "loss_fn": luffy, **chosen, "normalizer": 20.0}


def eager_function(model: nn.Module, ids: dict, inputs: dict) -> torch.Tensor:
    logits = model(**ids, use_cache=False).logits
    return reference.token_loss(logits, **as_function(inputs), vocab_size=VOCAB).loss


def hidden_states(model: nn.Module, ids: dict) -> torch.Tensor:
    return model.base_model(**ids, use_cache=False).last_hidden_state


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Relative to the largest entry of each gradient."""
    assert found.keys() == expected.keys() and expected
    for name, truth in expected.items():
        assert truth.abs().max() > 0, name
        worst = (found[name] - truth).abs().max() / truth.abs().max()
        assert worst < 1e-9, f"{name}: {worst:.2g}"


@pytest.mark.parametrize("selecting", [False, True], ids=["one pass", "two passes"])
@pytest.mark.parametrize("model_type, overrides", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_loss_and_every_gradient_equal_the_eager_models(model_type, overrides, selecting):
    model, (ids, inputs) = make_model(model_type, **overrides), batch()
    if selecting:
        del inputs["selected_mask"]
    expected = eager_loss(model, ids, inputs)
    expected.backward()
    truth = gradients(model)
    logits = model(**ids, use_cache=False).logits.detach()

    parameters = dict(model.named_parameters())
    head = patch_lm_head(model, vocab_size=VOCAB)
    assert isinstance(head, LMHead) and model.get_output_embeddings() is head
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert torch.equal(model(**ids, use_cache=False).logits, logits)
    found = head(hidden_states(model, ids), **inputs, **options())
    torch.testing.assert_close(found.loss, expected, rtol=1e-9, atol=0)
    found.loss.backward()
    assert_same(gradients(model), truth)

    stats = head(hidden_states(model, ids), inputs["targets"], temperature=0.8)
    again = reference.token_stats(logits, inputs["targets"], temperature=0.8, vocab_size=VOCAB)
    assert isinstance(stats, TokenStats) and stats.entropy.requires_grad
    torch.testing.assert_close(stats, again, rtol=1e-9, atol=1e-12)


def test_logits_without_targets_are_those_of_the_linear_layer():
    torch.manual_seed(0)
    head = LMHead(8, 11, dtype=torch.float64)
    hidden = torch.randn(2, 3, 8, dtype=torch.float64)
    head.softcap, head.logits_divisor, head.vocab_size = 2.0, 3.0, 7
    assert torch.equal(head(hidden), nn.functional.linear(hidden, head.weight, head.bias))
    stats = head(hidden, torch.ones(2, 3, dtype=torch.int64), row_mask=torch.eye(2, 3).bool())
    assert torch.equal(stats.entropy != 0, torch.eye(2, 3).bool())
    logits = 2 * torch.tanh(head(hidden)[..., :7] / 2) / 3
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(stats.entropy, torch.where(torch.eye(2, 3).bool(), expected, 0))


def test_scale_before_the_softcap():
    """muse_glimmer's order; its logits are c tanh(m x / c)."""
    model = make_model("gemma2", final_logit_softcapping=3.0)
    model.config.output_multiplier = 0.4
    head, (ids, inputs) = patch_lm_head(model), batch()
    hidden = hidden_states(model, ids).detach()
    logits = 3 * torch.tanh(0.4 * head(hidden) / 3)
    expected = reference.token_stats(logits, inputs["targets"])
    torch.testing.assert_close(head(hidden, inputs["targets"]), expected, rtol=1e-9, atol=1e-12)


def test_under_autocast_in_its_dtype():
    model, (ids, inputs) = make_model(dtype=torch.float32), batch()
    head = patch_lm_head(model, vocab_size=VOCAB)
    hidden = hidden_states(model, ids).detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(hidden, **inputs, **options())
    found.loss.backward()
    assert hidden.grad.dtype == head.weight.grad.dtype == found.log_probs.dtype == torch.float32
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, head.weight)]
    expected = reference.linear_prefix_rft_loss(*rounded, **inputs, vocab_size=VOCAB, **options())
    expected.loss.backward()
    torch.testing.assert_close(found.loss.double(), expected.loss, rtol=1e-6, atol=0)
    for x, truth in zip((hidden, head.weight), rounded, strict=True):
        torch.testing.assert_close(x.grad.double(), truth.grad, rtol=2**-8, atol=1e-9)
        assert torch.equal(x.grad, x.grad.bfloat16().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        double = LMHead(3, 5, dtype=torch.float64)  # which autocast leaves alone
        assert (
            double(torch.ones(2, 3).double(), ids["input_ids"][0, :2] * 0)[0].dtype
            == double.weight.dtype
        )


def with_lora(model: nn.Module, **extra) -> nn.Module:
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["lm_head", "q_proj"], **extra)
    adapted = peft.get_peft_model(model, config)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1, generator=seeded(5))
    return adapted


@pytest.mark.parametrize("patched", ["after", "before"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_lora_on_the_head(model_type, patched):
    model, (ids, inputs) = make_model(model_type, tie_word_embeddings=False), batch()
    if patched == "before":
        patch_lm_head(model)
    model = with_lora(model)
    expected = eager_loss(model, ids, inputs)
    expected.backward()
    truth = gradients(model)
    assert {name.split(".")[-3] for name in truth if "lm_head" in name} == {"lora_A", "lora_B"}

    head = patch_lm_head(model, vocab_size=VOCAB)
    found = head(hidden_states(model.base_model.model, ids), **inputs, **options())
    torch.testing.assert_close(found.loss, expected, rtol=1e-9, atol=0)
    found.loss.backward()
    assert_same(gradients(model), truth)
    assert head.base_layer.weight.grad is None

    eager_function(model, ids, inputs).backward()
    truth = gradients(model)
    head(hidden_states(model.base_model.model, ids), **as_function(inputs)).loss.backward()
    assert_same(gradients(model), truth)

    with model.disable_adapter():
        plain = eager_loss(model, ids, inputs)
        found = head(hidden_states(model.base_model.model, ids), **inputs, **options())
    torch.testing.assert_close(found.loss, plain, rtol=1e-9, atol=0)
    assert (plain - expected).abs() > 1e-6
    model.merge_adapter()
    found = head(hidden_states(model.base_model.model, ids), **inputs, **options())
    torch.testing.assert_close(found.loss, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_patched_model_can_be_pickled_and_copied(copied, lora):
    model, (_, inputs) = make_model(tie_word_embeddings=False), batch()
    model = with_lora(model) if lora else model
    head = patch_lm_head(model, vocab_size=VOCAB)
    other = copied(model).get_output_embeddings()
    assert type(other) is type(head) and other.vocab_size == VOCAB
    hidden = torch.randn(*inputs["targets"].shape, head.in_features, dtype=head.weight.dtype)
    losses = [x(hidden, **inputs, **options()).loss for x in (head, other)]
    assert torch.equal(*losses)
    assert other.weight.data_ptr() != head.weight.data_ptr()


def test_lora_of_other_kinds_is_refused():
    model, (ids, inputs) = make_model(tie_word_embeddings=False), batch()
    model = with_lora(model, use_dora=True)
    head = patch_lm_head(model)
    with pytest.raises(ValueError, match="plain LoRA"):
        head(hidden_states(model.base_model.model, ids), **inputs, **options())


def test_errors_at_the_edge():
    model = make_model()
    for wrong in (0, 57):
        with pytest.raises(ValueError, match="vocab_size must be between 1 and 56"):
            patch_lm_head(model, vocab_size=wrong)
    with pytest.raises(ValueError, match="backend must be one of"):
        patch_lm_head(model, backend="cuda")
    assert type(model.lm_head) is nn.Linear
    head = patch_lm_head(model, vocab_size=VOCAB)
    assert patch_lm_head(model, vocab_size=40) is head and type(head) is LMHead
    assert head.vocab_size == 40
    ids, inputs = batch()
    with pytest.raises(TypeError, match="old_log_probs must be torch.float32 or"):
        rounded = inputs | {"old_log_probs": inputs["old_log_probs"].bfloat16()}
        head(hidden_states(model, ids), **rounded, **options())
    with pytest.raises(TypeError, match="advantages must be torch.float32 or"):
        rounded = [inputs["targets"], inputs["old_log_probs"], inputs["advantages"].half()]
        head(hidden_states(model, ids), *rounded, normalizer=3)
    with pytest.raises(TypeError, match="normalizer"):
        head(hidden_states(model, ids), *list(inputs.values())[:5])

    model.lm_head = nn.Sequential(nn.Linear(16, 56))
    with pytest.raises(ValueError, match="must be an nn.Linear.*got Sequential"):
        patch_lm_head(model)
    model.lm_head = nn.Linear(16, 56)
    model.lm_head.forward = lambda hidden: hidden
    with pytest.raises(ValueError, match="with its own forward"):
        patch_lm_head(model)
    with pytest.raises(ValueError, match="must have an lm_head, Qwen2Model has none"):
        patch_lm_head(model.base_model)


def rank_loss(
    self: nn.Module, ids: dict, inputs: dict, function: bool = False, **extra
) -> torch.Tensor:
    hidden = hidden_states(self, ids)
    self.hidden = hidden.detach()
    self.lm_head(hidden, inputs["targets"])  # a forward without a backward
    given = as_function(inputs) if function else inputs | options(**extra)
    return self.lm_head(hidden, **given).loss


def shard(model: nn.Module, num_ranks: int, mp_policy: MixedPrecisionPolicy) -> None:
    """A tied head stays in the root, whose loss is a method of its own; else it is a module."""
    how = {"mesh": dist.init_device_mesh("cpu", (num_ranks,)), "mp_policy": mp_policy}
    tied = model.config.tie_word_embeddings
    body = model.base_model
    for module in [*body.layers, *([] if tied else [body.norm, body.embed_tokens, model.lm_head])]:
        fully_shard(module, **how)
    model.loss = types.MethodType(rank_loss, model)
    if tied:
        fully_shard(model, **how)
        register_fsdp_forward_method(model, "loss")
    assert isinstance(model.lm_head, LMHead)


def sharded_gradients(rank: int, store: str, num_ranks: int, tied: bool, results) -> None:
    """Every rank takes its share of the rows; gradients are averaged, so losses are multiplied."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=num_ranks)
    model, given = make_model(tie_word_embeddings=tied), batch()
    patch_lm_head(model, vocab_size=VOCAB)
    shard(model, num_ranks, MixedPrecisionPolicy())
    ids, inputs = ({name: x.chunk(num_ranks)[rank] for name, x in part.items()} for part in given)
    for name in ("one pass", "two passes", "a function"):
        if name == "two passes":
            del inputs["selected_mask"]
        with warnings.catch_warnings(action="error"):
            loss = model.loss(ids, inputs, name == "a function", fraction=1) * num_ranks
        loss.backward()
        found = {key: grad.full_tensor() for key, grad in gradients(model).items()}
        if rank == 0:
            results[name] = found
    dist.barrier()
    os._exit(0)  # a torn down interpreter can abort on a thread of the process group


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_sharded_by_fsdp(num_ranks, tied, tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        arguments = (str(tmp_path / "store"), num_ranks, tied, results)
        mp.spawn(sharded_gradients, arguments, nprocs=num_ranks)
        results = dict(results)
    for name in ("one pass", "two passes", "a function"):
        model, (ids, inputs) = make_model(tie_word_embeddings=tied), batch()
        if name == "two passes":
            del inputs["selected_mask"]
        if name == "a function":
            eager_function(model, ids, inputs).backward()
        else:
            eager_loss(model, ids, inputs, fraction=1).backward()
        assert_same(results[name], gradients(model))


def test_mixed_precision_of_fsdp(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    ids, inputs = batch()
    bf16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    for tied in (True, False):
        for cast in (True, False):
            model = make_model(tie_word_embeddings=tied, dtype=torch.float32)
            weight = model.lm_head.weight.detach().bfloat16()
            patch_lm_head(model, vocab_size=VOCAB)
            shard(model, 1, MixedPrecisionPolicy(**bf16, cast_forward_inputs=cast))
            if cast:
                with pytest.raises(TypeError, match="log_probs must be torch.float32"):
                    model.loss(ids, inputs)
                continue
            loss = model.loss(ids, inputs)
            plain = linear_prefix_rft_loss(
                model.hidden, weight, **inputs, vocab_size=VOCAB, **options()
            )
            assert torch.equal(loss, plain.loss)
            loss.backward()
            assert all(grad.dtype == torch.float32 for grad in gradients(model).values())
    dist.destroy_process_group()
