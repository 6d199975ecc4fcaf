"""Importance of the units of a convolutional image classifier: ablation, Shapley values and attributions."""
