"""What a rank stands on: its process, its group, files, paths, logs, signals and locks."""
