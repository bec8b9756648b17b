"""Arithmetic without torch: timestep densities, expert and learning-rate schedules, buckets."""
