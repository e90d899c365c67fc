"""What a model takes: memory, FLOPs, and the micro-batch that fits."""
