"""maskwright: what runs in each process of a training run."""
