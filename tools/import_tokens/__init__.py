"""From tokens that another tool stored to a data set: read its layout, check every id, link or convert.

One file for each layout (megatron, datatrove, dataset_folder), a common view of them (source), the way from a
user's path to them (find), what is done to each document (clean), shards (write), and the command (run).
"""

from tools.import_tokens.run import ImportSummary, import_tokens

__all__ = ["ImportSummary", "import_tokens"]
