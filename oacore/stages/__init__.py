"""The stages of the pipeline: one module each, one function `run(config, ...)` that reads files, computes and writes files.

Snakemake's rules and `python -m oacore` both call them; paths come from `oacore.layout`. A stage is hashed together with what it
imports (`oacore.codehash`), so that a change of code re-runs exactly the stages that it reaches.
"""
