"""Direct and indirect effects of components, and what pairs of them cost together."""
