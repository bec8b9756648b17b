"""The run folder, the interface between the trainer and all that watches it."""
