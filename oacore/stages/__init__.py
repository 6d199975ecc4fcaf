"""The stages of the pipeline: one module each, one function `run(config, inputs, outputs, ...)` that reads files,
computes and writes files.

Snakemake's rules and `python -m oacore` both call them, with the files by name (`oacore.jobs`). A stage is hashed
together with what it imports (`oacore.store.codehash`), so that a change of code re-runs exactly the stages that it
reaches.
"""
