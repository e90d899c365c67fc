"""Training objectives: what makes batches of blocks, and the loss of what a model makes of them."""
