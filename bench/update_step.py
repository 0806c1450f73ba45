"""One update of a policy, whole, by kind of lm_head: forward, loss, backward, clipping, AdamW.

    python -m bench.update_step [--smoke] [--out FILE.csv]

A Qwen2.5-1.5B of random weights, float32 with bfloat16 autocast and gradient checkpointing as
`prefix-rft train` has it, on 8 packed rollouts of 4,096 tokens. One of them is hybrid: half of its
response is a prefix, of which a fifth is selected. Body, batch, optimizer and the rows that reach
the head are the same for all heads:

    eager    logits of the rows in the loss, log_softmax in float32
    TRL      the chunked head of TRL's trainers, then the objective in eager code
    ours     `Policy.loss`

Heads take turns, at a learning rate of 0, so that every step does the same work; nothing is timed
unless their gradient norms agree.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rft_kernels import PolicyConfig
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, Qwen2Config

from bench.device import optional, versions
from bench.harness import MIB, machine, require_triton, spread, write_rows
from bench.policy_loss import clipped_sum
from bench.rivals import TRL_CHUNK
from prefix_rft.config.config import OptimizerConfig
from prefix_rft.data_types import Rollout, TrainBatch, TrainRow
from prefix_rft.model.lora import add_adapters
from prefix_rft.model.policy import Policy
from prefix_rft.train.optimizer import make_optimizer
from prefix_rft.train.packing import pack

# Of Qwen2.5: what differs between its sizes.
_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_FIELDS += ("num_key_value_heads", "vocab_size", "tie_word_embeddings")
SIZES = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "tiny": (32, 64, 2, 4, 2, 307, True),
}
NUM_PROMPT = 256  # tokens
PHASES = ("forward", "backward", "clip", "optimizer")

_LORA_ALPHA = 32.0
_MAX_DISAGREEMENT = 0.02  # of gradient norms; bfloat16 logits stay well below it

Loss = Callable[[Policy, TrainBatch, int], Tensor]


def make_policy(size: str, device: torch.device, *, lora_rank: int | None = None) -> Policy:
    """Random weights: float32, or in bfloat16 (on CUDA) below adapters in float32."""
    autocast_dtype = torch.bfloat16 if device.type == "cuda" else None
    dtype = torch.float32 if lora_rank is None else autocast_dtype or torch.float32
    config = Qwen2Config(**dict(zip(_FIELDS, SIZES[size], strict=True)), rms_norm_eps=1e-6)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if lora_rank is not None:
        add_adapters(model, rank=lora_rank, alpha=_LORA_ALPHA, dtype=torch.float32, seed=0)
        model.to(device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(
        model.train(), temperature=1.0, vocab_size=config.vocab_size, autocast_dtype=autocast_dtype
    )


def make_batch(policy: Policy, *, num_rows: int, num_prompt: int, num_response: int) -> TrainBatch:
    """Packed rollouts; the first is hybrid, the others ordinary, with advantages of both signs."""
    rand = torch.Generator().manual_seed(1)
    rows = []
    for i in range(num_rows):
        ids = torch.randint(
            policy.lm_head.vocab_size, (num_prompt + num_response,), generator=rand
        ).tolist()
        num_prefix = num_response // 2 if i == 0 and num_rows > 1 else 0
        rollout = Rollout(
            prompt_ids=tuple(ids[:num_prompt]),
            response_ids=tuple(ids[num_prompt:]),
            prefix_length=num_prefix,
            rollout_log_probs=(0.0,) * (num_response - num_prefix),
            finish_reason="stop",
            text="",
            reward=0.0,
            status="wrong",
        )
        advantage = 1.0 if i % 2 == 0 else -0.5
        rows.append(TrainRow.of_rollout(rollout, advantage=advantage, prefix_advantage=advantage))
    batch = pack(rows, device=policy.device, dtype=policy.stats_dtype)
    place = torch.arange(len(batch.targets), device=policy.device)
    selected = batch.prefix_mask & (place % 5 == 0)
    is_active = batch.response_mask & (~batch.prefix_mask | selected)
    return TrainBatch(
        **vars(batch) | {"selected_mask": selected, "active_rows": is_active.nonzero()[:, 0]}
    )


def ours(policy: Policy, batch: TrainBatch, normalizer: int) -> Tensor:
    return policy.loss(batch, normalizer=normalizer, loss=PolicyConfig()).loss


def of_active_rows(
    log_probs_of: Callable[[Policy, Tensor, Tensor], Tensor],
    policy: Policy,
    batch: TrainBatch,
    normalizer: int,
) -> Tensor:
    """The same loss from log_probs_of(policy, hidden [N, D], targets [N]), on-policy."""
    rows, kind = batch.active_rows, policy.device.type
    enabled = policy.autocast_dtype is not None
    with torch.autocast(kind, dtype=policy.autocast_dtype, enabled=enabled):
        hidden = policy.hidden_states(batch)[rows]
        log_probs = log_probs_of(policy, hidden, batch.targets[rows])
    return clipped_sum(log_probs - log_probs.detach(), batch.advantages[rows]) / normalizer


def eager_log_probs(policy: Policy, hidden: Tensor, targets: Tensor) -> Tensor:
    """The entropy is computed and dropped: every trainer here reports it."""
    log_p = torch.log_softmax(policy.lm_head(hidden).float(), -1)
    with torch.no_grad():
        -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, targets[:, None])[:, 0]


def trl_log_probs(function: Any, policy: Policy, hidden: Tensor, targets: Tensor) -> Tensor:
    weight = policy.lm_head.weight
    outputs = ("entropy",)
    log_probs, *_ = function.apply(
        hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, outputs
    )
    return log_probs


EAGER: Loss = partial(of_active_rows, eager_log_probs)


def heads() -> dict[str, Loss]:
    found: dict[str, Loss] = {"ours": ours, "eager head": EAGER}
    if trl := optional("trl.kernels", "ChunkedLogProbFunction"):
        found["TRL head"] = partial(of_active_rows, partial(trl_log_probs, trl))
    return found


def adamw(policy: Policy) -> torch.optim.Optimizer:
    """That of `prefix-rft train`, at a learning rate of 0."""
    optimizer = make_optimizer(policy.model.parameters(), OptimizerConfig(), policy.device)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, batch: TrainBatch, loss: Loss
) -> tuple[dict[str, float], float]:
    """One step: the time of each of `PHASES` in ms, and the gradient norm before clipping."""
    now = _clock(policy.device)
    marks = [now()]
    value = loss(policy, batch, int(batch.response_mask.numel()))
    marks.append(now())
    value.backward()
    marks.append(now())
    norm = clip_grad_norm_(policy.model.parameters(), 1.0)
    marks.append(now())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    marks.append(now())
    if policy.device.type == "cuda":
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]
    else:
        times = [(b - a) * 1e3 for a, b in zip(marks, marks[1:], strict=False)]
    return dict(zip(PHASES, times, strict=True)), norm.item()


def _clock(device: torch.device) -> Callable[[], Any]:
    def event() -> torch.cuda.Event:
        found = torch.cuda.Event(enable_timing=True)
        found.record()
        return found

    return event if device.type == "cuda" else time.perf_counter


def fits(name: str, call: Callable[[], Any]) -> Any:
    """What the call returns, or None where the memory does not suffice for it."""
    try:
        return call()
    except torch.OutOfMemoryError as error:
        print(f"left out: {name}: {str(error).splitlines()[0]}")
    torch.cuda.empty_cache()  # here, where the error no longer holds on to what it was about
    return None


def measure(policy: Policy, batch: TrainBatch, *, repeats: int) -> list[dict[str, Any]]:
    """A row for each head that fits; ends the program where they disagree."""
    optimizer, on_cuda = adamw(policy), policy.device.type == "cuda"
    norms, peaks, losses, state_mib = {}, {}, {}, float("nan")
    for name, loss in heads().items():
        step = partial(update, policy, optimizer, batch, loss)
        if fits(name, step) is None:  # it compiles, and makes the optimizer's state
            optimizer.zero_grad(set_to_none=True)
            continue
        if on_cuda:
            state_mib = torch.cuda.memory_allocated() / MIB
            torch.cuda.reset_peak_memory_stats()
        _, norms[name] = step()
        peaks[name] = torch.cuda.max_memory_allocated() / MIB if on_cuda else float("nan")
        losses[name] = loss
    expected = norms["ours"]
    wrong = {n: x for n, x in norms.items() if abs(x / expected - 1) > _MAX_DISAGREEMENT}
    if wrong or not expected > 0:
        sys.exit(f"gradient norms disagree, nothing is timed: {norms}")
    rounds = [
        {name: update(policy, optimizer, batch, loss)[0] for name, loss in losses.items()}
        for _ in range(repeats)
    ]
    facts = {
        "T": len(batch.targets),
        "D": policy.lm_head.weight.shape[1],
        "V": policy.lm_head.weight.shape[0],
        "dtype": str(policy.autocast_dtype or policy.model.dtype).removeprefix("torch."),
    }
    rows = []
    for name in losses:
        times = [one[name] for one in rounds]
        whole = spread([sum(each.values()) for each in times])
        phases = {
            f"{phase}_ms": spread([each[phase] for each in times])["median_ms"] for phase in PHASES
        }
        rows.append(
            {"variant": name, **facts, "active_rows": len(batch.active_rows)}
            | whole
            | phases
            | {"tokens_per_s": 1e3 * facts["T"] / whole["median_ms"]}
            | {"peak_mib": peaks[name], "state_mib": state_mib, "grad_norm": norms[name]}
            | machine()
            | {"versions": versions()}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one repeat")
    parser.add_argument("--out", type=Path, help="CSV file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=SIZES, default="1.5B")
    parser.add_argument("--rows", type=int, default=8, help="rollouts")
    parser.add_argument("--tokens", type=int, default=4096, help="of a rollout, prompt included")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":  # without it, torch would be timed as ours
        require_triton("a benchmark on CUDA")
    shape = {
        "num_rows": options.rows,
        "num_prompt": NUM_PROMPT,
        "num_response": options.tokens - NUM_PROMPT,
    }
    if options.smoke:
        options.size, options.repeats = "tiny", 1
        shape = {"num_rows": 3, "num_prompt": 4, "num_response": 20}
    policy = make_policy(options.size, device)
    write_rows(measure(policy, make_batch(policy, **shape), repeats=options.repeats), options.out)


if __name__ == "__main__":
    main()
