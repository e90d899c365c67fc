"""What a run says of itself: metrics, status, starts, console, TensorBoard and profiles."""
