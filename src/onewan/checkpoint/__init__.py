"""Reads and writes whole checkpoints: training states, exported weights, conversion and merging.

Hides how files reach the disk (staging under a temporary name, reading back, renaming), how a state
is verified and rotated, and which file and key format each layout and program uses. Trainers and
commands ask for a destination and a format.
"""
