"""`python -m prefix_rft` is `prefix-rft`, for launchers that start modules."""

import sys

from prefix_rft.cli import main

sys.exit(main())
