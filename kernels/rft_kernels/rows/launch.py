"""How the Triton kernels of a row are launched: by width of the row, dtype and architecture.

The same row is always launched the same way, whatever its neighbours, so its bits never depend on
the batch. Nothing is tuned while a program runs: entries come from benchmarks and are committed.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RowLaunch(NamedTuple):
    """One program serves one row, `depth * lanes` classes at a time."""

    lanes: int  # running statistics side by side; 16 bytes of neighbouring logits a thread
    depth: int  # classes a lane takes before its maximum is looked at again
    num_warps: int
    num_stages: int  # in Triton's pipeline: from 2 on, all but 2 arrive while a tile is worked on


_WIDEST = 2**63
# By bytes of a logit: up to so many classes, launched so. Unmeasured; see "Launch" in README.md.
_HOPPER = {
    2: ((4096, RowLaunch(1024, 1, 4, 1)), (_WIDEST, RowLaunch(1024, 8, 4, 2))),
    4: ((4096, RowLaunch(512, 2, 4, 1)), (_WIDEST, RowLaunch(512, 8, 4, 2))),
    8: ((_WIDEST, RowLaunch(256, 2, 4, 1)),),
}
TABLES = {9: _HOPPER}  # by major compute capability; the others are served as the 9th is


def row_launch(logits: Tensor) -> RowLaunch:
    """The launch of rows of these logits [T, V]."""
    major = torch.cuda.get_device_capability(logits.device)[0] if logits.is_cuda else 9
    table = TABLES.get(major, TABLES[9])[logits.element_size()]
    return next(launch for widest, launch in table if logits.shape[1] <= widest)
