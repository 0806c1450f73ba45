"""The loss of a token and its derivatives: all loss mathematics, once a backend (E4 to E8)."""

from .evaluation import evaluate
from .op import policy_objective, reduce_loss
from .policy_config import DEFAULT_CONFIG, PolicyConfig
from .tokens import Tokens, check_scale, check_tokens

__all__ = [
    "DEFAULT_CONFIG",
    "PolicyConfig",
    "Tokens",
    "check_scale",
    "check_tokens",
    "evaluate",
    "policy_objective",
    "reduce_loss",
]
