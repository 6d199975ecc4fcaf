"""Latent prediction: lenses, their fits and evaluations, figures, report."""
