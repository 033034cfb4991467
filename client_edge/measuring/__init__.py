"""Measures of what the layers are worth on held-out text."""
