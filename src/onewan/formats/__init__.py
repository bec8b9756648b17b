"""Model files: what is in them, what it is called there, how it is stored. Knows no module."""
