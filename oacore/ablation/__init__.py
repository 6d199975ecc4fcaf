"""Single-component ablation: constants, gaps, figures, report."""
