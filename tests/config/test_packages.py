"""Optional packages: their extras, and the error if one is missing."""

from importlib.metadata import metadata

import pytest

from prefix_rft.checks import ConfigError
from prefix_rft.config import EXTRAS, packages, require_package


def test_the_extras_are_those_of_the_distribution():
    assert set(EXTRAS.values()) <= set(metadata("prefix-rft").get_all("Provides-Extra"))


def test_a_missing_package_is_one_line_that_says_how_to_install_it(monkeypatch):
    require_package("pytest", "any.key")
    monkeypatch.setattr(packages, "find_spec", lambda module: None)
    with pytest.raises(ConfigError) as caught:
        require_package("peft", "model.lora_rank")
    assert str(caught.value) == (
        "model.lora_rank: peft is not installed; run pip install '.[lora]' in a checkout"
    )
