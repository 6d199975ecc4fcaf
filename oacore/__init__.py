"""Optimal ablation for interpretability: the library under the Snakemake pipeline."""

__version__ = "0.1.0"
