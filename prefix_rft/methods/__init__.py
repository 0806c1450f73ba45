"""One file per training method."""

from prefix_rft.config import Config
from prefix_rft.methods.prefix_rft import PrefixRFT
from prefix_rft.methods.rft import RFT

METHODS = {"prefix_rft": PrefixRFT, "rft": RFT}


def make_method(config: Config) -> RFT:
    """The method named by `config.method.name`."""
    return METHODS[config.method.name](config)
