"""The lm_head as a module whose forward may end in statistics or a loss instead of logits.

All work is done inside forward, where hooks on the module (FSDP2's gathering of a sharded weight)
expect the weight to be used. T rows, V classes, D hidden size.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from . import _check, _dispatch
from .linear import linear_prefix_rft_loss, linear_token_loss, linear_token_stats
from .results import PolicyLoss, TokenStats

# What configs of models call a scale of the logits.
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_EXACT = ("old_log_probs", "advantages", "response_mask", "prefix_mask")  # leading loss inputs
_Operands = tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]  # weight, bias, low_rank


class _LossForward:
    """What a head is made to do beside its own forward; mixed in before the class it was."""

    softcap: float | None = None  # in units of the logits as projected
    logits_divisor: float = 1.0  # the model divides its logits by it, after the softcap
    vocab_size: int | None = None  # columns from here on are padding; None: there are none
    backend: str = "auto"

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        *loss_inputs: Tensor | None,
        temperature: float | Tensor = 1.0,
        **options: Any,
    ) -> Tensor | TokenStats | PolicyLoss:
        """Logits, or with `targets` their statistics, or with the inputs of a loss that loss.

        Args:
            hidden: [..., D].
            targets: [...] int; None: the result is the logits [..., V], before divisor and softcap.
            loss_inputs: old_log_probs, advantages, response_mask, prefix_mask, each [...] and 32
                bits at least (FSDP2: `MixedPrecisionPolicy(cast_forward_inputs=False)`).
            temperature: of the model's logits, as those of `token_stats`.
            options: the further ones of `linear_token_stats`, of `linear_prefix_rft_loss`, or, if
                there is a `loss_fn` among them, of `linear_token_loss`.
        Raises:
            TypeError, ValueError: as those; an input of the loss was rounded to 16 bits.
        Under autocast in its dtype, statistics and sums in float32 nevertheless. Memory,
        differentiability and determinism are those of the ops.
        """
        if targets is None:
            return super().forward(hidden)
        weight, bias, low_rank = self._operands(hidden)
        dtype = _forward_dtype(weight)
        options = {
            "bias": None if bias is None else bias.to(dtype),
            "low_rank": None if low_rank is None else tuple(x.to(dtype) for x in low_rank),
            "softcap": self.softcap,
            "temperature": temperature * self.logits_divisor,
            "vocab_size": self.vocab_size,
            "backend": self.backend,
        } | options
        arguments = (hidden.to(dtype), weight.to(dtype), targets, *loss_inputs)
        if "loss_fn" in options:
            _refuse_rounded({f"tokens[{i}]": x for i, x in enumerate(options.get("tokens", ()))})
            return linear_token_loss(*arguments, **options)
        if loss_inputs or "normalizer" in options:
            given = dict(zip(_EXACT, loss_inputs, strict=False)) | options
            exact = ("log_probs", "advantages")
            _refuse_rounded({name: x for name, x in given.items() if name.endswith(exact)})
            return linear_prefix_rft_loss(*arguments, **options)
        # FSDP2 hangs its backward on outputs, which therefore may not be views.
        return TokenStats(*(x.clone() for x in linear_token_stats(*arguments, **options)))

    def _operands(self, hidden: Tensor) -> _Operands:
        return self.weight, self.bias, None


class LMHead(_LossForward, nn.Linear):
    """An `nn.Linear` to logits that can go on to statistics or a loss; see `patch_lm_head`.

        head(hidden)                                              logits
        head(hidden, targets, row_mask=...)                       TokenStats
        head(hidden, targets, old_log_probs, advantages, response_mask, prefix_mask,
             normalizer=..., ...)                                 PolicyLoss
        head(hidden, targets, loss_fn=..., tokens=(...), mask=...,
             normalizer=..., ...)                                 PolicyLoss

    Attributes: softcap, logits_divisor, vocab_size, backend.
    """


class _LoRAOperands(_LossForward):
    """A peft LoRA layer: h W^T + s (h A^T) B^T, the low-rank term of the ops."""

    def __reduce__(self) -> tuple:
        # Its class is made here and has no name to be found by.
        return _new_lora_head, (type(self).__bases__[1],), vars(self)

    def _operands(self, hidden: Tensor) -> _Operands:
        base = self.base_layer
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            return base.weight, base.bias, None
        inner, up = [], []
        for name in names:
            a, b = self.lora_A[name], self.lora_B[name]
            if name in self.lora_variant or b.bias is not None:
                raise ValueError(f"adapter {name!r}: expected plain LoRA, without DoRA or a bias")
            rows = self.lora_dropout[name](hidden.to(a.weight.dtype))
            inner.append(a(rows) * self.scaling[name])
            up.append(b.weight)
        return base.weight, base.bias, (torch.cat(inner, -1), torch.cat(up, -1))


@cache
def _lora_class(layer: type) -> type:
    """Of a peft LoRA layer of class `layer`."""
    return type(f"LMHead{layer.__name__}", (_LoRAOperands, layer), {})


def _new_lora_head(layer: type) -> nn.Module:
    """One without a state yet, as unpickling wants it."""
    cls = _lora_class(layer)
    return cls.__new__(cls)


def patch_lm_head(
    model: nn.Module, *, vocab_size: int | None = None, backend: str = "auto"
) -> LMHead:
    """Turns the lm_head of a transformers causal language model into an `LMHead` where it stands.

    Parameters, their tying, dtype and device, hooks and names stay as they are. Softcap and scale
    of the logits are read from the model's configuration. To be called before `fully_shard`; a
    second call only sets `vocab_size` and `backend`.

    Args:
        model: has `get_output_embeddings()`, an `nn.Linear` or a peft LoRA layer around one, and
            computes its logits by it, a scale and a softcap alone.
        vocab_size: columns from here on are padding; None: there are none.
        backend: see `token_stats`.
    Returns:
        The head: `head(model.base_model(...).last_hidden_state, targets, ...)`.
    Raises:
        ValueError: no lm_head; one of another kind; `vocab_size` or `backend` out of range.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model must have an lm_head, {type(model).__name__} has none")
    cls = type(head) if isinstance(head, _LossForward) else _class_with_loss(head)
    _check.one_of("backend", backend, _dispatch.NAMES)
    if vocab_size is not None:
        _check.integer("vocab_size", vocab_size, least=1, most=len(head.weight))
    head.__class__ = cls
    head.vocab_size, head.backend = vocab_size, backend
    head.softcap, head.logits_divisor = _softcap_and_divisor(model.config.get_text_config())
    return head


def _class_with_loss(head: nn.Module) -> type:
    """The class of a head, with the forward of an LMHead."""
    if type(head) is nn.Linear and "forward" not in vars(head):
        return LMHead
    base = getattr(head, "base_layer", None)
    if hasattr(head, "lora_A") and type(base) in (nn.Linear, LMHead):
        return _lora_class(type(head))
    raise ValueError(
        "the lm_head of model must be an nn.Linear with its own forward, or a LoRA layer around "
        f"one, got {type(head).__name__}"
    )


def _softcap_and_divisor(config: Any) -> tuple[float | None, float]:
    """logits = x / divisor, then c tanh(logits / c): the same as the softcap c divisor first."""
    divisor = getattr(config, "logits_scaling", None) or 1.0
    if config.model_type.startswith("hyperclovax"):  # which multiplies by it
        divisor = 1 / divisor
    for name in _FACTORS:
        divisor /= getattr(config, name, None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return None if softcap is None else softcap * divisor, divisor


def _forward_dtype(weight: Tensor) -> torch.dtype:
    """That of autocast, which leaves float64 alone, or the weight's."""
    kind = weight.device.type
    if weight.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return weight.dtype
    return torch.get_autocast_dtype(kind)


def _refuse_rounded(inputs: dict[str, Any]) -> None:
    """Log-probs of 16 bits are off by more than a clip range can bear."""
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(f"{name} must be torch.float32 or torch.float64, got {value.dtype}")
