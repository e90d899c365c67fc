"""maskwright: what comes before training and after it."""
