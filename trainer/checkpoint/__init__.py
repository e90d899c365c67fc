"""Checkpoints: written, found, compared with the run that resumes, and brought back in any layout."""
