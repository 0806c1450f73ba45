"""One thread, the same examples on every run, and small tiles."""

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "kernels", derandomize=True, deadline=None, max_examples=40, database=None
)
hypothesis.settings.load_profile("kernels")


@pytest.fixture
def small_tiles(monkeypatch):
    """Rows of a few dozen classes take several tiles of Triton's kernels."""
    from tests.kernels.triton_cases import SMALL, triton_backend

    monkeypatch.setattr(triton_backend, "row_launch", lambda logits: SMALL)
