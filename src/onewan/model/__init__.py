"""The Wan 2.2 models: loading them, their conventions, and one forward contract."""
