"""What a run tells: figures of a step, records in files, the console, the report."""

from prefix_rft.metrics.logger import METRICS_FILE, MetricsLogger, NoLogger, read_records
from prefix_rft.metrics.measures import (
    LogProbGapError,
    check_gap,
    describe_group,
    log_prob_gap,
    measure_rollouts,
    measure_updates,
    throughput,
)
from prefix_rft.metrics.report import write_report
from prefix_rft.metrics.step_metrics import StepMetrics
from prefix_rft.metrics.summary import COLUMNS, result_rows
from prefix_rft.metrics.watch import Watch

__all__ = [
    "COLUMNS",
    "METRICS_FILE",
    "StepMetrics",
    "LogProbGapError",
    "MetricsLogger",
    "NoLogger",
    "Watch",
    "check_gap",
    "describe_group",
    "log_prob_gap",
    "measure_rollouts",
    "measure_updates",
    "read_records",
    "result_rows",
    "throughput",
    "write_report",
]
