"""`maskwright evaluate`: what any model makes of a text, by the code that evaluates in training."""
