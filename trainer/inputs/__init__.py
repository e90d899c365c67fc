"""What a run starts from, opened, compared over the ranks, and described."""
