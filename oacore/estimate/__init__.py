"""Memory and time of every job before it runs, from the model's sizes and the config alone.

Stands above the experiments, whose numbers it shares: one function per stage, in one file per experiment; `table` puts
them together, `run` asks it for a config. Free of torch, because the Snakefile asks on every dry run.
"""
