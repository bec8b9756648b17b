"""Predicted durations as text."""

from __future__ import annotations


def format_duration(seconds: float) -> str:
    """`seconds` in the two largest units, as people say it: "45 s", "3 min", "2 h 5 min", "3 days
    4 h". Below ten seconds with two significant digits, below a hundredth in ms."""
    if 0 < seconds < 0.00995:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours + (minutes >= 30), 24)
    return f"{days} days {hours} h" if hours else f"{days} days"
