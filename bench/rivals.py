"""The clipped loss of hidden states and lm_head weight, by every library that can be had.

A rival that ends in log-probs is completed by one eager line.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from types import ModuleType

import rft_kernels
import torch
from torch import Tensor

from bench.device import Bench, optional
from bench.policy_loss import clipped

TRL_CHUNK = 32768  # classes of a tile, as TRL's trainers have it

_ROWS = ("hidden", "targets", "old_log_probs", "advantages", "response_mask", "prefix_mask")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a loss is of: T rows, of which those at `active_rows` have an advantage."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [T]
    old_log_probs: Tensor  # [T]
    advantages: Tensor  # [T]
    response_mask: Tensor  # [T]
    prefix_mask: Tensor  # [T]
    active_rows: Tensor  # [N]
    normalizer: int

    def first(self, num_rows: int) -> "Inputs":
        """The first rows alone, of a hidden leaf of their own."""
        rows = {name: getattr(self, name)[:num_rows] for name in _ROWS}
        rows["hidden"] = rows["hidden"].detach().clone().requires_grad_()
        active_rows = self.active_rows[self.active_rows < num_rows]
        return replace(self, **rows, active_rows=active_rows, normalizer=num_rows)

    def active(self) -> "Inputs":
        """The active rows alone, of what a rival reads."""
        rows = {name: getattr(self, name).index_select(0, self.active_rows) for name in _ROWS[:4]}
        return replace(self, **rows)


Loss = Callable[[Inputs], Tensor]


def make_inputs(hidden: Tensor, weight: Tensor, share: float) -> Inputs:
    """A fifth of the rows prefixes, all of them kept; one row in sixteen far off-policy.

    No ratio is near a border of the clip range, where rounding would decide on a gradient.
    """
    num_tokens, device = len(hidden), hidden.device
    rand = torch.Generator(device).manual_seed(1)
    draw = partial(torch.rand, num_tokens, device=device, generator=rand)
    targets = torch.randint(len(weight), (num_tokens,), device=device, generator=rand)
    with torch.no_grad():
        log_probs = rft_kernels.linear_token_stats(hidden, weight, targets).log_probs
    off = torch.where(draw() < 1 / 16, 0.4, 0.1) * (draw() < 0.5).float().mul(2).sub(1)
    is_active = draw().argsort().argsort() < share * num_tokens
    return Inputs(
        hidden=hidden,
        weight=weight,
        targets=targets,
        old_log_probs=log_probs + off,
        advantages=torch.where(is_active, torch.where(draw() < 0.5, 1.0, -1.0), 0.0),
        response_mask=torch.ones_like(is_active),
        prefix_mask=draw() < 0.2,
        active_rows=is_active.nonzero()[:, 0],
        normalizer=num_tokens,
    )


def ours(
    x: Inputs, *, selecting: bool = False, stats: str = "all", dweight: Tensor | None = None
) -> Tensor:
    return rft_kernels.linear_prefix_rft_loss(
        x.hidden, x.weight, x.targets, x.old_log_probs, x.advantages, x.response_mask,
        x.prefix_mask, normalizer=x.normalizer, fraction=1, stats=stats,
        selected_mask=None if selecting else x.prefix_mask, active_rows=x.active_rows,
        accumulate_dweight=dweight,
    ).loss  # fmt: skip


def eager_loss(x: Inputs) -> Tensor:
    """What a trainer writes; the entropy is what selection would take."""
    log_p = torch.log_softmax(torch.nn.functional.linear(x.hidden, x.weight).float(), -1)
    log_probs = log_p.gather(-1, x.targets[:, None])[:, 0]
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return clipped(log_probs, x) + 0 * entropy.sum()


def trl_loss(function: Callable, x: Inputs) -> Tensor:
    log_probs, *_ = function.apply(
        x.hidden, x.weight, None, x.targets, 1.0, TRL_CHUNK, None, 1.0, ("entropy",)
    )
    return clipped(log_probs, x)


def verl_loss(function: Callable, x: Inputs) -> Tensor:
    return clipped(function(x.hidden, x.weight, x.targets, 1.0, "none")[0], x)


def liger_grpo_loss(function: type, compiled: bool, x: Inputs) -> Tensor:
    """Its advantages are of sequences: each row is one of a single token."""
    num_rows = len(x.hidden)
    op = function(
        beta=0.0, compiled=compiled, use_ref_model=False, chunk_size=max(1, num_rows // 8),
        loss_type="dr_grpo", max_completion_length=1,
    )  # fmt: skip
    loss, _ = op(
        x.hidden[:, None], x.weight, x.targets[:, None], torch.ones_like(x.targets)[:, None],
        x.advantages, old_per_token_logps=x.old_log_probs[:, None],
    )  # fmt: skip
    return loss * (num_rows / x.normalizer)


def liger_scaled_loss(function: Callable, x: Inputs) -> Tensor:
    nll, _ = function.apply(x.hidden, x.weight, x.targets, 1.0, -100, 1, True)
    return clipped(-nll, x)


def nll_loss(function: Callable, x: Inputs, **options: object) -> Tensor:
    return clipped(-function(x.hidden, x.weight, x.targets, reduction="none", **options), x)


@cache
def rivals(bench: Bench) -> dict[str, Loss]:
    """Every rival installed that runs on this device; those that lack the entropy say so."""
    on_cuda = bench.device.type == "cuda"
    found: dict[str, Loss] = {"eager": eager_loss}
    if trl := optional("trl.kernels", "ChunkedLogProbFunction"):
        found["TRL chunked"] = partial(trl_loss, trl)
    if grpo := optional("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss"):
        compiled = on_cuda and not bench.smoke
        found["Liger fused linear GRPO (no entropy)"] = partial(liger_grpo_loss, grpo, compiled)
    if scaled := scaled_cross_entropy(bench):
        found["Liger scaled CE"] = partial(liger_scaled_loss, scaled)
    if (function := getattr(torch.nn.functional, "linear_cross_entropy", None)) is not None:
        # Without options it is plain cross entropy of whole logits.
        options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
        options = {} if options is None else {"options": options()}
        found["torch linear_cross_entropy (no entropy)"] = partial(nll_loss, function, **options)
    if not on_cuda:
        return found
    if apple := optional("cut_cross_entropy", "linear_cross_entropy"):
        found["Apple CCE (no entropy)"] = partial(nll_loss, apple)
        found["Apple CCE, unfiltered (no entropy)"] = partial(nll_loss, apple, filter_eps=None)
    if verl := verl_function():
        found["verl linear_cross_entropy"] = partial(verl_loss, verl)
    return found


def scaled_cross_entropy(bench: Bench) -> type | None:
    """Liger's, which is a kernel of its own on Hopper, and a few rows at a time elsewhere."""
    module = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    function = optional(module, "LigerFusedLinearScaledCrossEntropyFunction")
    if bench.device.type == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        hopper = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
        if optional(hopper, "LigerFusedScaledCrossEntropySM90Function") is None:
            return None
        failure = optional("cutlass.base_dsl.common", "DSLRuntimeError")
        bench.failures += () if failure is None else (failure,)
    return function


def verl_function() -> Callable | None:
    """verl's, past the packages' own imports, which want Ray."""
    for name in ("verl", "verl.utils"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            print("no verl")
            return None
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = list(spec.submodule_search_locations)
    return optional("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
