"""What a run leaves on disk: its training state, and weights for other programs."""
