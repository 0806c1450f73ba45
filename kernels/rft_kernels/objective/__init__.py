"""The loss of a token and its derivatives: all loss mathematics, once a backend (E4 to E8)."""

from .evaluation import evaluate
from .function import FunctionLoss, LossFn, check_function
from .known_gradient import attach_gradient
from .op import policy_objective, reduce_loss
from .policy_config import DEFAULT_CONFIG, PolicyConfig, Terms
from .tokens import Tokens, check_scale, check_tokens
from .torch_backend import clipped_policy, kl_term

__all__ = [
    "DEFAULT_CONFIG",
    "FunctionLoss",
    "LossFn",
    "PolicyConfig",
    "Terms",
    "Tokens",
    "attach_gradient",
    "check_function",
    "check_scale",
    "check_tokens",
    "clipped_policy",
    "evaluate",
    "kl_term",
    "policy_objective",
    "reduce_loss",
]
