"""Methods that learn from demonstrations are refused data without any, before any work."""

from pathlib import Path

import pytest

from prefix_rft.checks import ConfigError
from prefix_rft.methods import METHODS
from prefix_rft.train.run import train
from tests.tiny import make_run

NEEDY = [name for name, method in METHODS.items() if method.needs_demonstrations]


def test_they_are_known() -> None:
    assert {"rl_sft_loss", "luffy", "relift", "hpt"} <= set(NEEDY)
    assert not {"rft", "prefix_rft"} & set(NEEDY)  # these make do with rollouts


@pytest.mark.parametrize("name", NEEDY)
def test_data_without_any_demonstration_is_refused(name: str, tmp_path: Path) -> None:
    config = make_run(
        tmp_path, method={"name": name}, data={"demonstration_fraction": 0.0}, eval={"every": 0}
    )
    with pytest.raises(ConfigError, match=f"data.path: expected demonstrations, which {name} "):
        train(config)
    assert not (config.run_dir / "metrics.jsonl").exists()
