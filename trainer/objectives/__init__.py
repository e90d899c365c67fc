"""Training objectives, one file each. An objective builds batches from blocks and computes their loss."""
