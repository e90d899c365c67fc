"""From raw text to shards: find the inputs, cut them into units, tokenize each unit into one shard, join."""

from tools.prepare.run import prepare
from tools.prepare.summary import PrepareSummary

__all__ = ["PrepareSummary", "prepare"]
