"""Signs of life of the ranks, and what follows when there are none."""
