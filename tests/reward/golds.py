"""The gold answers of the benchmarks, from a file that is not part of the repository."""

import os
from pathlib import Path

import pytest

# A parquet file with a column `answer`.
GOLDS_FILE = Path(os.environ.get("PREFIX_RFT_GOLDS", "no such file"))
needs_golds = pytest.mark.skipif(
    not GOLDS_FILE.is_file(), reason="PREFIX_RFT_GOLDS names no file of gold answers"
)


def read_golds() -> list[str]:
    from bench.grader_labels import read_golds

    return read_golds(GOLDS_FILE)
