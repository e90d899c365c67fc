"""From the model section of a config to a stock transformers class that trains."""
