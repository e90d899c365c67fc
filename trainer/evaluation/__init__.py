"""What is known of a model on held-out data, while it trains and afterwards."""
