"""Prefix-RFT inside TRL: `PrefixGRPOTrainer` in place of `GRPOTrainer`."""

from importlib.metadata import version

from prefix_rft.config import install_hint, is_installed

SUPPORTED = "1.16"  # the trainer overrides methods that TRL does not promise to keep

if not is_installed("trl"):
    raise ImportError(f"trl is not installed; {install_hint('trl')}")
if not f"{version('trl')}.".startswith(f"{SUPPORTED}."):
    raise ImportError(f"trl: expected version {SUPPORTED}.*, got {version('trl')}")

from prefix_rft.integrations.trl.config import PrefixGRPOConfig  # noqa: E402
from prefix_rft.integrations.trl.trainer import PrefixGRPOTrainer  # noqa: E402

__all__ = ["PrefixGRPOConfig", "PrefixGRPOTrainer"]
