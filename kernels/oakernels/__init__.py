"""Fused kernels of the masked-edge engine; see kernels/README.md."""
