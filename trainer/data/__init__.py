"""Data sets on disk, and micro-batches from them."""
