"""Circuits: sets of edges found by any method, their files, and their scores under MIB's rules."""
