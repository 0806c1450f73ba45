"""Modules with verl's names and, in plain torch, what its functions are documented to compute."""

from types import ModuleType

import torch


def modules() -> dict[str, ModuleType]:
    """By full name, parents first."""
    found = {
        name: ModuleType(name)
        for name in (
            "verl",
            "verl.utils",
            "verl.utils.torch_functional",
            "verl.utils.kernel",
            "verl.utils.kernel.linear_cross_entropy",
            "verl.utils.experimental",
            "verl.utils.experimental.torch_functional",
        )
    }

    def logprobs_from_logits(logits, labels, inplace_backward=True):
        return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]

    def logprobs_from_logits_v2(logits, labels):
        return logprobs_from_logits(logits, labels)

    def calculate_sum_pi_squared_from_logits(logits):
        return logits.softmax(-1).square().sum(-1)

    def entropy_from_logits(logits):
        return torch.distributions.Categorical(logits=logits).entropy()

    def entropy_from_logits_with_chunking(logits, chunk_size=2048):
        return torch.cat([entropy_from_logits(part) for part in logits.split(chunk_size)])

    def linear_cross_entropy(
        hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None
    ):
        logits = hidden.flatten(0, -2) @ weight.T / temperature
        log_probs = logprobs_from_logits(logits, labels.flatten())
        reduced = {"none": log_probs, "sum": log_probs.sum(), "mean": log_probs.mean()}
        return reduced[reduction], entropy_from_logits(logits)

    class FusedLinearForPPO(torch.nn.Module):
        def __init__(self, chunk_size=512, impl_backend="torch"):
            super().__init__()

        def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
            logits = hidden_states @ vocab_weights.T / temperature
            return logprobs_from_logits(logits, input_ids), entropy_from_logits(logits)

    functional = found["verl.utils.torch_functional"]
    functional.logprobs_from_logits = logprobs_from_logits
    functional.logprobs_from_logits_v2 = logprobs_from_logits_v2
    functional.calculate_sum_pi_squared_from_logits = calculate_sum_pi_squared_from_logits
    functional.entropy_from_logits = entropy_from_logits
    functional.entropy_from_logits_with_chunking = entropy_from_logits_with_chunking
    found["verl.utils.kernel.linear_cross_entropy"].linear_cross_entropy = linear_cross_entropy
    found["verl.utils.experimental.torch_functional"].FusedLinearForPPO = FusedLinearForPPO
    return found
