"""Circuits, constants and lenses of a finished run for others: on the Hugging Face hub, or in a folder."""
