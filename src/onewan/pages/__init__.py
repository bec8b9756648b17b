"""Self-contained HTML pages: their shell, escaping, plots and videos. Knows nothing of runs."""
