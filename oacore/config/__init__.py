"""The whole configuration of a run as one pydantic tree, and the registry rows that its names come from.

Imported by the Snakefile at every start, so it must stay free of torch and transformers."""
