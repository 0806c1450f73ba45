"""Every refusal names the argument, what was expected and what came."""

import re
from math import inf, nan

import pytest
import torch
from rft_kernels import (
    PolicyConfig,
    linear_prefix_rft_loss,
    linear_token_stats,
    policy_objective,
    prefix_rft_loss,
    select_top_entropy,
    token_stats,
)

from tests.kernels.kernel_cases import from_logits, loss_inputs

T, V, D = 4, 5, 3
LOGITS, TARGETS = torch.randn(T, V), torch.zeros(T, dtype=torch.long)
HIDDEN, WEIGHT = torch.randn(T, D), torch.randn(V, D)
MASK = torch.ones(T, dtype=torch.bool)
META = torch.zeros(T, dtype=torch.long, device="meta")


def refuses(message: str, error: type[Exception], function, *arguments, **options) -> None:
    with pytest.raises(error, match=re.escape(message)):
        function(*arguments, **options)


STATS = {
    "logits must be a tensor, got list": ((TypeError,), [[1.0]], TARGETS, {}),
    "logits must be a floating-point tensor, got torch.int64": ((TypeError,), TARGETS, TARGETS, {}),
    "logits must be [..., V] with V at least 1, got [4, 0]": (
        (ValueError,), LOGITS[:, :0], TARGETS, {},
    ),
    "targets must be torch.int64 or torch.int32, got torch.float32": (
        (TypeError,), LOGITS, TARGETS.float(), {},
    ),
    "targets must have shape [4], got [3]": ((ValueError,), LOGITS, TARGETS[:3], {}),
    "targets must be on cpu, got meta": ((ValueError,), LOGITS, META, {}),
    "targets must be -100 or between 0 and 4, got 5": ((ValueError,), LOGITS, TARGETS + 5, {}),
    "targets must be -100 or between 0 and 4, got -1": ((ValueError,), LOGITS, TARGETS - 1, {}),
    "targets must be -100 or between 0 and 1, got 3": (
        (ValueError,), LOGITS, TARGETS + 3, {"vocab_size": 2},
    ),
    "temperature must be greater than 0, got 0": (
        (ValueError,), LOGITS, TARGETS, {"temperature": 0},
    ),
    "temperature must be a number, got str": ((TypeError,), LOGITS, TARGETS, {"temperature": "1"}),
    "temperature must have shape [4], got [4, 1]": (
        (ValueError,), LOGITS, TARGETS, {"temperature": torch.ones(4, 1)},
    ),
    "temperature must be greater than 0 and finite, got -1.0": (
        (ValueError,), LOGITS, TARGETS, {"temperature": torch.tensor([1.0, 2, -1, 1])},
    ),
    "row_mask must be torch.bool, got torch.int64": (
        (TypeError,), LOGITS, TARGETS, {"row_mask": TARGETS},
    ),
    "vocab_size must be between 1 and 5, got 6": (
        (ValueError,), LOGITS, TARGETS, {"vocab_size": 6},
    ),
    "vocab_size must be an integer, got float": (
        (TypeError,), LOGITS, TARGETS, {"vocab_size": 2.0},
    ),
    "backend must be one of auto, torch, triton, got 'cuda'": (
        (ValueError,), LOGITS, TARGETS, {"backend": "cuda"},
    ),
    "softcap must be greater than 0, got 0": ((ValueError,), LOGITS, TARGETS, {"softcap": 0}),
    "temperature must be finite, got inf": ((ValueError,), LOGITS, TARGETS, {"temperature": inf}),
    "temperature must be greater than 0, got nan": (
        (ValueError,), LOGITS, TARGETS, {"temperature": nan},
    ),
    "temperature must be greater than 0 and finite, got inf": (
        (ValueError,), LOGITS, TARGETS, {"temperature": torch.tensor([1.0, 2, inf, 1])},
    ),
    "got strides [0, 1] of shape [4, 5]": (
        (ValueError,), LOGITS[:1].expand(T, V), TARGETS, {"inplace_backward": True},
    ),
    "got strides [2, 1] of shape [4, 5]": (
        (ValueError,), LOGITS.as_strided((T, V), (2, 1)), TARGETS, {"inplace_backward": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", STATS)
def test_token_stats(message):
    (error,), logits, targets, options = STATS[message]
    refuses(message, error, token_stats, logits, targets, **options)


HEAD = {
    "hidden must be [..., D] with D at least 1, got []": (
        ValueError, {"hidden": torch.tensor(1.0)},
    ),
    "hidden must be [..., D] with D at least 1, got [4, 0]": (
        ValueError, {"hidden": HIDDEN[:, :0], "lm_head_weight": WEIGHT[:, :0]},
    ),
    "softcap must be finite, got inf": (ValueError, {"softcap": inf}),
    "lm_head_weight must be torch.float32, got torch.bfloat16": (
        TypeError, {"lm_head_weight": WEIGHT.bfloat16()},
    ),
    "lm_head_weight must be [V, 3] with V at least 1, got [3, 5]": (
        ValueError, {"lm_head_weight": WEIGHT.T},
    ),
    "bias must have shape [5], got [4]": (ValueError, {"bias": torch.zeros(4)}),
    "softcap must be greater than 0, got 0.0": (ValueError, {"softcap": 0.0}),
    "workspace_bytes must be at least 1, got 0": (ValueError, {"workspace_bytes": 0}),
    "workspace_bytes must be an integer, got float": (TypeError, {"workspace_bytes": 1e9}),
    "vocab_size must be between 1 and 5, got 0": (ValueError, {"vocab_size": 0}),
    "targets must have shape [4], got [4, 1]": (ValueError, {"targets": TARGETS[:, None]}),
}  # fmt: skip


@pytest.mark.parametrize("message", HEAD)
def test_linear_token_stats(message):
    error, changed = HEAD[message]
    arguments = {"hidden": HIDDEN, "lm_head_weight": WEIGHT, "targets": TARGETS} | changed
    refuses(message, error, linear_token_stats, **arguments)


SELECTION = {
    "entropy must be a floating-point tensor, got torch.int64": (TypeError, {"entropy": TARGETS}),
    "candidate_mask must be torch.bool, got torch.int64": (TypeError, {"candidate_mask": TARGETS}),
    "candidate_mask must have shape [4], got [2]": (ValueError, {"candidate_mask": MASK[:2]}),
    "fraction must be between 0 and 1, got 1.5": (ValueError, {"fraction": 1.5}),
    "fraction must be between 0 and 1, got -1": (ValueError, {"fraction": -1}),
    "fraction must be between 0 and 1, got 1/0": (ValueError, {"fraction": "1/0"}),
    "fraction must be between 0 and 1, got a fifth": (ValueError, {"fraction": "a fifth"}),
    "fraction must be between 0 and 1, got nan": (ValueError, {"fraction": nan}),
    "fraction must be between 0 and 1, got inf": (ValueError, {"fraction": "inf"}),
    "fraction must be a Fraction or number, got list": (TypeError, {"fraction": [1]}),
    "too large a denominator for 4 tokens": (ValueError, {"fraction": "0." + "1" * 20}),
    "order must be one of high, low, random, got 'top'": (ValueError, {"order": "top"}),
    "seed must be an integer, got NoneType": (TypeError, {"order": "random"}),
    "seed must be at least 0, got -1": (ValueError, {"order": "random", "seed": -1}),
    "cu_seqlens must rise from 0 to the number of tokens 4, got [0, 3]": (
        ValueError, {"cu_seqlens": torch.tensor([0, 3])},
    ),
    "cu_seqlens must rise from 0 to the number of tokens 4, got [0, 3, 2, 4]": (
        ValueError, {"cu_seqlens": torch.tensor([0, 3, 2, 4])},
    ),
    "cu_seqlens must have shape [B + 1], got [1, 2]": (
        ValueError, {"cu_seqlens": torch.tensor([[0, 4]])},
    ),
    "cu_seqlens must be torch.int64 or torch.int32, got torch.float32": (
        TypeError, {"cu_seqlens": torch.tensor([0.0, 4.0])},
    ),
    "cu_seqlens and process_group exclude each other": (
        ValueError, {"cu_seqlens": torch.tensor([0, 4]), "process_group": object()},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", SELECTION)
def test_select_top_entropy(message):
    error, changed = SELECTION[message]
    arguments = {"entropy": torch.rand(T), "candidate_mask": MASK} | changed
    refuses(message, error, select_top_entropy, **arguments)


CONFIG = {
    "clip_low must be at least 0, got -0.1": (ValueError, {"clip_low": -0.1}),
    "clip_high must be a number, got str": (TypeError, {"clip_high": "0.2"}),
    "clip_high must be at least 0, got nan": (ValueError, {"clip_high": float("nan")}),
    "dual_clip must be greater than 1, got 1": (ValueError, {"dual_clip": 1}),
    "prefix_clip must be one of same, none, got 'off'": (ValueError, {"prefix_clip": "off"}),
    'prefix_clip must be "same", "none" or (low, high), got 0.2': (TypeError, {"prefix_clip": 0.2}),
    "prefix_clip must be at least 0, got -1": (ValueError, {"prefix_clip": (-1, 1)}),
    "importance_level must be one of token, sequence, got 'row'": (
        ValueError, {"importance_level": "row"},
    ),
    "importance_cap must be greater than 0, got 0": (ValueError, {"importance_cap": 0}),
    "entropy_coef must be a number, got NoneType": (TypeError, {"entropy_coef": None}),
    "kl must be one of none, k1, k2, k3, got 'k4'": (ValueError, {"kl": "k4"}),
    "kl_coef must be a number, got bool": (TypeError, {"kl_coef": True}),
    "kl_coef must be finite, got nan": (ValueError, {"kl_coef": nan}),
    "entropy_coef must be finite, got inf": (ValueError, {"entropy_coef": inf}),
    "dual_clip must be finite, got inf": (ValueError, {"dual_clip": inf}),
    "importance_cap must be finite, got inf": (ValueError, {"importance_cap": inf}),
}  # fmt: skip


@pytest.mark.parametrize("message", CONFIG)
def test_policy_config(message):
    error, changed = CONFIG[message]
    refuses(message, error, PolicyConfig, **changed)


def test_prefix_clip_may_be_a_list():
    assert PolicyConfig(prefix_clip=[0.1, 0.3]).prefix_clip == (0.1, 0.3)


OBJECTIVE = {
    "old_log_probs must have shape [4], got [3]": (ValueError, {"old_log_probs": torch.zeros(3)}),
    "advantages must be a floating-point tensor, got torch.int64": (
        TypeError, {"advantages": TARGETS},
    ),
    "advantages must have shape [4], or one entry for each of the 0 sequences, got [2]": (
        ValueError, {"advantages": torch.zeros(2)},
    ),
    "advantages must have shape [4], or one entry for each of the 1 sequences, got [2]": (
        ValueError, {"advantages": torch.zeros(2), "cu_seqlens": torch.tensor([0, 4])},
    ),
    "normalizer must be greater than 0, got 0": (ValueError, {"normalizer": 0}),
    "normalizer must be a number, got str": (TypeError, {"normalizer": "1"}),
    "normalizer must be finite, got inf": (ValueError, {"normalizer": inf}),
    "normalizer must be greater than 0 and finite, got -2.0": (
        ValueError, {"normalizer": torch.tensor(-2.0)},
    ),
    "normalizer must be greater than 0 and finite, got inf": (
        ValueError, {"normalizer": torch.tensor(inf)},
    ),
    "normalizer must be a number or 0-dim, got shape [1]": (
        ValueError, {"normalizer": torch.ones(1)},
    ),
    "config must be a PolicyConfig, got dict": (TypeError, {"config": {}}),
    "prefix_mask must be torch.bool, got torch.float32": (
        TypeError, {"prefix_mask": torch.zeros(T)},
    ),
    "rollout_log_probs must be given, as config.importance_cap is set": (
        ValueError, {"config": PolicyConfig(importance_cap=2.0)},
    ),
    "ref_log_probs must be given, as config.kl is 'k3'": (
        ValueError, {"config": PolicyConfig(kl="k3", kl_coef=0.1)},
    ),
    "cu_seqlens must be given, or tokens as [B, L], for a ratio of the sequence": (
        ValueError, {"config": PolicyConfig(importance_level="sequence")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", OBJECTIVE)
def test_what_all_losses_refuse(message):
    error, changed = OBJECTIVE[message]
    shared = {"old_log_probs": torch.zeros(T), "advantages": torch.zeros(T), "normalizer": 1}
    shared |= changed
    refuses(message, error, policy_objective, torch.zeros(T), loss_mask=MASK, **shared)
    of_prefix = {"targets": TARGETS, "response_mask": MASK, "prefix_mask": MASK} | shared
    refuses(message, error, prefix_rft_loss, LOGITS, **of_prefix)
    refuses(message, error, linear_prefix_rft_loss, HIDDEN, WEIGHT, **of_prefix)


def test_objective_needs_entropy_for_its_bonus():
    refuses(
        "entropy must be given, as config.entropy_coef is not 0", ValueError, policy_objective,
        torch.zeros(T), None, torch.zeros(T), MASK, normalizer=1,
        config=PolicyConfig(entropy_coef=0.1),
    )  # fmt: skip


LOSSES = {
    "response_mask must have shape [24], got [3]": (ValueError, {"response_mask": MASK[:3]}),
    "selected_mask must be torch.bool, got torch.int64": (
        TypeError, {"selected_mask": torch.zeros(24, dtype=torch.long)},
    ),
    "stats must be one of all, active, got 'some'": (ValueError, {"stats": "some"}),
    "active_rows must be torch.int64, got torch.int32": (
        TypeError, {"active_rows": torch.zeros(1, dtype=torch.int32)},
    ),
    "active_rows must have shape [N], got [1, 1]": (
        ValueError, {"active_rows": torch.zeros(1, 1, dtype=torch.long)},
    ),
    "active_rows must be different indices between 0 and 23, got [-1]": (
        ValueError, {"active_rows": torch.tensor([-1])},
    ),
    "active_rows must be different indices between 0 and 23, got [0, 24]": (
        ValueError, {"active_rows": torch.tensor([0, 24])},
    ),
    "active_rows must be different indices between 0 and 23, got [3, 3]": (
        ValueError, {"active_rows": torch.tensor([3, 3])},
    ),
    "fraction must be between 0 and 1, got 2": (ValueError, {"fraction": 2}),
}  # fmt: skip


@pytest.mark.parametrize("message", LOSSES)
def test_losses(message):
    error, changed = LOSSES[message]
    inputs = loss_inputs() | changed
    refuses(message, error, linear_prefix_rft_loss, **inputs)
    refuses(message, error, from_logits, prefix_rft_loss, inputs)
