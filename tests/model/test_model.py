"""Loading, the packed forward against rows alone, statistics and loss through it, export."""

import json
import shutil

import pytest
import torch
from rft_kernels import PolicyConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prefix_rft.checks import ConfigError
from prefix_rft.config.sections import ModelConfig
from prefix_rft.data_types import Rollout, TrainBatch, TrainRow
from prefix_rft.model.attention import LEAN_SDPA
from prefix_rft.model.loading import (
    export,
    load_model,
    load_tokenizer,
    resolve_autocast_dtype,
    resolve_device,
)
from prefix_rft.model.policy import Policy
from prefix_rft.model.vocabulary import stop_token_ids
from prefix_rft.train.packing import pack, take_rows

VOCAB = 100  # of the tokenizer; the models have 112 columns


def make_batch(*, seed: int = 0, dtype: torch.dtype = torch.float64) -> TrainBatch:
    """Five rows of 3 to 19 tokens; two are hybrid; half of the prefix tokens are selected."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for num_prompt, num_prefix, num_continuation in [
        (4, 0, 5),
        (2, 6, 3),
        (9, 0, 11),
        (1, 3, 1),
        (3, 0, 8),
    ]:
        total = num_prompt + num_prefix + num_continuation
        ids = tuple(torch.randint(3, VOCAB, (total,), generator=generator).tolist())
        rollout = Rollout(
            prompt_ids=ids[:num_prompt],
            response_ids=ids[num_prompt:],
            prefix_length=num_prefix,
            rollout_log_probs=tuple(
                (-5 * torch.rand(num_continuation, generator=generator)).tolist()
            ),
            finish_reason="length",
            text="",
            reward=0.0,
            status="wrong",
        )
        advantage = float(torch.randn((), generator=generator))
        rows.append(TrainRow.of_rollout(rollout, advantage=advantage, prefix_advantage=-advantage))
    batch = pack(rows, device=torch.device("cpu"), dtype=dtype)
    selected = batch.prefix_mask & (torch.rand(len(batch.targets), generator=generator) < 0.5)
    return TrainBatch(**(vars(batch) | {"selected_mask": selected}))


def alone_logits(model, batch: TrainBatch) -> torch.Tensor:
    """Logits with one forward per row: [T, V]."""
    rows = batch.input_ids.split(batch.lengths)
    return torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])


def materialised_stats(logits, batch, temperature):
    log_p = torch.log_softmax(logits[:, :VOCAB] / temperature, dim=-1)
    log_probs = log_p.gather(1, batch.targets.clamp(min=0)[:, None])[:, 0]
    return log_probs, -(log_p.exp() * log_p).sum(-1)


ARCHITECTURES = {
    "qwen2": {},
    "llama": {"attention_bias": True},
    "qwen3": {},
    "gemma2": {"sliding_window": 5},  # and a softcap on the logits
    "granite": {"logits_scaling": 2.0},
    "cohere": {"logit_scale": 0.5},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_packed_rows_equal_rows_alone(make_model, model_type, attention):
    # Logits of order 1: transformers takes norms, and the softmax of `eager`, in float32.
    options = {"dtype": torch.float64, "attention": attention, "initializer_range": 0.1}
    model = make_model(model_type, **options, **ARCHITECTURES[model_type])
    batch = make_batch()
    policy = Policy(model, temperature=0.7, vocab_size=VOCAB)
    expected = materialised_stats(alone_logits(model, batch), batch, 0.7)
    for actual, alone in zip(policy.token_stats(batch), expected, strict=True):
        alone = torch.where(batch.response_mask, alone, 0).detach()
        torch.testing.assert_close(actual, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_does_not_see_the_row_before_it(make_model, attention):
    model, batch = make_model(dtype=torch.float64, attention=attention), make_batch()
    first = batch.lengths[0]
    other = batch.input_ids.clone()
    other[:first] = 7

    def later_rows(input_ids: torch.Tensor) -> torch.Tensor:
        changed = TrainBatch(**(vars(batch) | {"input_ids": input_ids}))
        return policy.hidden_states(changed)[first:]

    def leaky(input_ids: torch.Tensor) -> torch.Tensor:
        output = model.base_model(
            input_ids=input_ids[None], position_ids=batch.position_ids[None], use_cache=True
        )
        return output.last_hidden_state[0, first:]

    # With a cache transformers ignores the packing, which the check below would notice.
    assert (leaky(other) - leaky(batch.input_ids)).abs().max() > 1e-2
    policy = Policy(model, temperature=1.0, vocab_size=VOCAB)
    assert (later_rows(other) - later_rows(batch.input_ids)).abs().max() < 1e-12


CONFIG = PolicyConfig(entropy_coef=0.01, importance_cap=1.5)


def policy_gradients(policy, batches):
    policy.model.zero_grad(set_to_none=True)
    for batch in batches:
        policy.loss(batch, normalizer=77.0, loss=CONFIG).loss.backward()
    return {name: p.grad.clone() for name, p in policy.model.named_parameters()}


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradient_equal_the_materialised_ones(make_model, attention, is_checkpointed):
    model, batch = make_model(dtype=torch.float64, attention=attention), make_batch()
    log_probs, entropy = materialised_stats(alone_logits(model, batch), batch, 0.7)
    old_log_probs = log_probs.detach() - 0.3 * torch.sin(torch.arange(len(log_probs)))
    batch = TrainBatch(**(vars(batch) | {"old_log_probs": old_log_probs}))
    ratio = (log_probs - old_log_probs).exp()
    surrogate = torch.maximum(
        -batch.advantages * ratio, -batch.advantages * ratio.clamp(1 - 0.2, 1 + 0.2)
    )
    weight = (old_log_probs - batch.rollout_log_probs).exp().clamp(max=1.5)
    surrogate = torch.where(batch.prefix_mask, surrogate, weight * surrogate)
    is_loss = batch.response_mask & (~batch.prefix_mask | batch.selected_mask)
    expected = ((surrogate - 0.01 * entropy) * is_loss).sum() / 77
    expected.backward()
    expected_gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

    if is_checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    policy = Policy(model, temperature=0.7, vocab_size=VOCAB)
    out = policy.loss(batch, normalizer=77.0, loss=CONFIG)
    torch.testing.assert_close(out.loss.double(), expected.detach(), rtol=0, atol=1e-6)
    active = torch.where(is_loss, log_probs, 0).detach()
    torch.testing.assert_close(out.log_probs, active, rtol=0, atol=1e-6)
    gradients = policy_gradients(policy, [batch])
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-6)
    row_by_row = policy_gradients(policy, [take_rows(batch, [i]) for i in (4, 2, 0, 3, 1)])
    torch.testing.assert_close(row_by_row, gradients, rtol=0, atol=1e-6)


def test_bfloat16_is_autocast_over_float32_weights(make_model):
    model, batch = make_model(), make_batch(dtype=torch.float32)
    exact = Policy(model, temperature=1.0, vocab_size=VOCAB).token_stats(batch)
    policy = Policy(model, temperature=1.0, vocab_size=VOCAB, autocast_dtype=torch.bfloat16)
    rounded = policy.token_stats(batch)
    assert rounded.log_probs.dtype == torch.float32
    assert 1e-4 < (rounded.log_probs - exact.log_probs).abs().max() < 0.3  # logits reach 10
    gradients = policy_gradients(policy, [batch])
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_without_a_selection_all_tokens_of_demonstrations_have_a_loss(tiny_model):
    batch = make_batch(dtype=torch.float32)
    policy = Policy(tiny_model, temperature=1.0, vocab_size=VOCAB)

    def loss(selected: torch.Tensor | None) -> torch.Tensor:
        given = TrainBatch(**(vars(batch) | {"selected_mask": selected}))
        return policy.loss(given, normalizer=1.0, loss=PolicyConfig()).loss

    assert torch.equal(loss(None), loss(batch.prefix_mask))
    assert not torch.equal(loss(None), loss(~batch.prefix_mask))


# Models that cannot be trained


def test_a_model_without_lm_head_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="model.path: .* Qwen2Model has no lm_head"):
        Policy(tiny_model.base_model, temperature=1.0, vocab_size=VOCAB)


def test_a_tokenizer_larger_than_the_lm_head_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="the tokenizer has ids up to 112, the lm_head 112 col"):
        Policy(tiny_model, temperature=1.0, vocab_size=113)


def test_logits_of_an_unknown_form_are_refused(tiny_model):
    forward = tiny_model.forward

    def scaled(**inputs: object) -> object:
        output = forward(**inputs)
        output.logits *= 1.5
        return output

    tiny_model.forward = scaled
    with pytest.raises(ConfigError, match="Qwen2ForCausalLM is not supported: the logits"):
        Policy(tiny_model, temperature=1.0, vocab_size=VOCAB)


def test_an_attention_that_leaks_is_refused(make_model, monkeypatch):
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    with pytest.raises(ConfigError, match="the logits of a packed row are off"):
        Policy(make_model(attention="eager"), temperature=1.0, vocab_size=VOCAB)


# Loading


@pytest.fixture
def saved(tiny_model, tiny_tokenizer, tmp_path):
    export(tiny_model, tiny_tokenizer, tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_loaded_model_is_the_saved_one(saved, tiny_model):
    model = load_model(ModelConfig(device="cpu"), saved)
    assert model.training and model.dtype == torch.float32
    torch.testing.assert_close(model.state_dict(), tiny_model.state_dict(), rtol=0, atol=0)
    assert load_model(ModelConfig(device="cpu", dtype="float64"), saved).dtype == torch.float64
    # bfloat16 is the compute dtype: trained weights stay in float32.
    assert load_model(ModelConfig(device="cpu", dtype="bfloat16"), saved).dtype == torch.float32


def test_overrides_reach_the_model(saved):
    config = ModelConfig(
        device="cpu",
        rope_theta=77.0,
        max_position_embeddings=999,
        attention="eager",
        gradient_checkpointing=True,
    )
    edit_config(saved, attention_dropout=0.5)
    model = load_model(config, saved)
    assert model.config.max_position_embeddings == 999
    assert model.config._attn_implementation == "eager"
    assert model.config.attention_dropout == 0.0
    assert model.is_gradient_checkpointing
    head_dim = 8
    expected = 77.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)


def test_a_missing_folder_is_one_clear_error(tmp_path):
    for load in (lambda path: load_model(ModelConfig(device="cpu"), path), load_tokenizer):
        with pytest.raises(ConfigError, match="model.path: expected a folder with a .*nowhere"):
            load(tmp_path / "nowhere")


def test_a_checkpoint_without_lm_head_is_refused(tiny_model, tmp_path):
    tiny_model.base_model.save_pretrained(tmp_path)
    message = r"model.path: .* lm_head \(Qwen2ForCausalLM\), found Qwen2Model"
    with pytest.raises(ConfigError, match=message):
        load_model(ModelConfig(device="cpu"), tmp_path)


def test_a_classifier_is_refused(tiny_model, tmp_path):
    AutoModelForSequenceClassification.from_config(tiny_model.config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="found Qwen2ForSequenceClassification"):
        load_model(ModelConfig(device="cpu"), tmp_path)


def test_an_encoder_decoder_is_refused(tmp_path):
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="found T5ForConditionalGeneration"):
        load_model(ModelConfig(device="cpu"), tmp_path)


def test_missing_weights_are_refused(saved):
    edit_config(saved, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    with pytest.raises(ConfigError, match=r"lacks 12 weights, first model.layers.2"):
        load_model(ModelConfig(device="cpu"), saved)


def test_layers_that_mix_packed_rows_are_refused(saved):
    edit_config(saved, layer_types=["full_attention", "linear_attention"])
    with pytest.raises(ConfigError, match="found full_attention, linear_attention"):
        load_model(ModelConfig(device="cpu"), saved)


def test_devices_and_dtypes():
    assert resolve_device(ModelConfig(device="cpu")) == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch finds no CUDA device"):
            resolve_device(ModelConfig(device="cuda:0"))
    dtypes = {"auto": None, "float32": None, "float64": None, "bfloat16": torch.bfloat16}
    for dtype, expected in dtypes.items():
        assert resolve_autocast_dtype(ModelConfig(device="cpu", dtype=dtype)) == expected


def test_flash_attention_is_refused_without_its_needs(saved):
    with pytest.raises(ConfigError, match="model.attention: flash_attention_2 needs"):
        load_model(ModelConfig(device="cpu", attention="flash_attention_2"), saved)


def test_damaged_weights_are_one_clear_error(saved):
    (saved / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="model.path: expected a folder with a model"):
        load_model(ModelConfig(device="cpu"), saved)


def test_the_chat_template_is_replaced(saved, tmp_path):
    messages = [{"role": "user", "content": "1 + 1"}]
    template = "{{ messages[0]['content'] }} = <think>\n"
    file = tmp_path / "template.jinja"
    file.write_text(template)
    for given in (template, str(file)):
        tokenizer = load_tokenizer(saved, given)
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert rendered.startswith("1 + 1 = <think>")
    own = load_tokenizer(saved).apply_chat_template(messages, tokenize=False)
    assert own == "user: 1 + 1\n"
    with pytest.raises(ConfigError, match="model.chat_template: expected a file or Jinja text"):
        load_tokenizer(saved, "missing.jinja")


def test_a_loaded_tokenizer_is_the_saved_one(saved, tiny_tokenizer):
    """In the folder of a Qwen2 model AutoTokenizer would use Qwen2's splitting rules."""
    text = "two  words, 12 = \\boxed{12}\n"
    loaded = load_tokenizer(saved)
    assert loaded(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_special_tokens(saved, tiny_model):
    path = saved / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != "pad_token"}))
    tokenizer = load_tokenizer(saved)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    tiny_model.generation_config.eos_token_id = [7, 5]
    assert stop_token_ids(tokenizer, tiny_model.generation_config, (9,)) == (1, 5, 7, 9)
    tiny_model.generation_config.eos_token_id = None
    assert stop_token_ids(tokenizer, tiny_model.generation_config) == (1,)
    assert stop_token_ids(tokenizer, None) == (1,)
    path.write_text(
        json.dumps({k: v for k, v in settings.items() if k not in ("pad_token", "eos_token")})
    )
    with pytest.raises(ConfigError, match="has no end-of-sequence token"):
        load_tokenizer(saved)


# Export


def test_an_export_loads_as_any_hugging_face_model(make_model, tiny_tokenizer, tmp_path):
    model = make_model()
    Policy(model, temperature=1.0, vocab_size=VOCAB)
    assert model.config._attn_implementation == LEAN_SDPA  # only known here: it must not be saved
    folder = tmp_path / "runs" / "model"
    export(model, tiny_tokenizer, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config._attn_implementation == "sdpa"
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert load_tokenizer(folder).get_vocab() == tiny_tokenizer.get_vocab()
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    export(model, tiny_tokenizer, folder)
    replaced = AutoModelForCausalLM.from_pretrained(folder)
    assert not replaced.get_input_embeddings().weight.any()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_failed_export_leaves_the_old_one(saved, tiny_model, tiny_tokenizer, monkeypatch):
    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = shutil.copytree(saved, saved.with_name("before"))
    monkeypatch.setattr(tiny_tokenizer, "save_pretrained", disk_full)
    with pytest.raises(OSError, match="No space left"):
        export(tiny_model, tiny_tokenizer, saved)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["before", "model"]
    for path in before.iterdir():
        assert (saved / path.name).read_bytes() == path.read_bytes()
