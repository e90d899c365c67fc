"""From raw text to shards: find the inputs, cut them into units, tokenize each unit into one shard, join."""

from tools.prepare.job import Job, open_job
from tools.prepare.options import PrepareOptions
from tools.prepare.run import finalize_job, prepare, prepare_job, prepare_task
from tools.prepare.summary import PrepareSummary, TaskSummary

__all__ = [
    "Job",
    "PrepareOptions",
    "PrepareSummary",
    "TaskSummary",
    "finalize_job",
    "open_job",
    "prepare",
    "prepare_job",
    "prepare_task",
]
