"""Passes of a model: the clean one and what is kept of it, its statistics, the masked-edge one."""
