"""Models: loading any supported one into canonical weights, its residual graph, the embedded demo model."""
