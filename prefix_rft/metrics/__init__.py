"""What a run tells: figures of a step, records in files, the console, the report."""

from prefix_rft.metrics.charts import CSS_COLOURS, SERIES, figure_html
from prefix_rft.metrics.logger import METRICS_FILE, MetricsLogger, NoLogger, read_records
from prefix_rft.metrics.measures import (
    LogProbGapError,
    check_gap,
    describe_group,
    log_prob_gap,
    measure_generated,
    measure_rollouts,
    measure_updates,
    sampled_rewards,
    throughput,
)
from prefix_rft.metrics.report import CSS, write_report
from prefix_rft.metrics.step_metrics import StepMetrics
from prefix_rft.metrics.summary import COLUMNS, is_fraction, result_rows
from prefix_rft.metrics.watch import Watch

__all__ = [
    "COLUMNS",
    "CSS",
    "CSS_COLOURS",
    "METRICS_FILE",
    "SERIES",
    "StepMetrics",
    "LogProbGapError",
    "MetricsLogger",
    "NoLogger",
    "Watch",
    "check_gap",
    "describe_group",
    "figure_html",
    "is_fraction",
    "log_prob_gap",
    "measure_generated",
    "measure_rollouts",
    "measure_updates",
    "read_records",
    "result_rows",
    "sampled_rewards",
    "throughput",
    "write_report",
]
