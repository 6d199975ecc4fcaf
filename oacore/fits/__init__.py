"""Fits: descent, watching for numbers that are not finite, resuming, recording."""
