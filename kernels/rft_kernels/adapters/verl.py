"""verl's log-prob and entropy helpers, with the signatures of its `torch_functional`.

Results are float32 whatever the logits (float64 for float64).
"""

import torch
from torch import Tensor

from rft_kernels.token_stats import token_stats

from ._patch import Patch, install


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probability of each label, [...], nats.

    Args:
        logits: [..., V].
        labels: [...]; -100 gives 0.
        inplace_backward: the backward writes the gradient over `logits`; whatever else needs their
            values then (an entropy with a gradient) raises, so pass False there, as verl does.
    Raises:
        TypeError, ValueError: as `token_stats`.
    Differentiable once in `logits`.
    """
    return token_stats(logits, labels, inplace_backward=inplace_backward).log_probs


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits), [...], nats; differentiable once."""
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_stats(logits, labels).entropy


def patch() -> Patch:
    """Serves verl from here, until the handle it returns is undone.

    An actor compiles the entropy when it is built: patch before that.

    Raises:
        ImportError: verl, or a name expected in it, is missing.
    """
    module = "verl.utils.torch_functional"
    return install(
        "verl",
        {
            f"{module}:logprobs_from_logits": logprobs_from_logits,
            f"{module}:entropy_from_logits": entropy_from_logits,
        },
    )
