"""One thread, and the same examples on every run."""

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "kernels", derandomize=True, deadline=None, max_examples=40, database=None
)
hypothesis.settings.load_profile("kernels")
