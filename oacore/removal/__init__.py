"""Removing a behaviour by few ablations that keep the others."""
