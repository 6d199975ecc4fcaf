"""Causal tracing: places, corruptions, effects, figures, report."""
