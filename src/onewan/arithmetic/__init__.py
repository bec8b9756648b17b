"""Arithmetic without torch: densities, schedules, sizes, and checks shared by rules and runtime."""
