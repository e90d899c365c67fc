"""`maskwright report`: a run, or several over each other, as one page."""
