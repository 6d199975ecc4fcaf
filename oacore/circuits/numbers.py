"""The numbers that circuit discovery shares with its estimate (`oacore.estimate.circuits`): how much is done at a time.

What differs between search methods stands in their rows (`oacore.config.circuits`). Free of torch, because the
Snakefile estimates on every dry run.
"""

# Rows of a masked pass: with fewer at a time, storing the inputs of destinations costs more in small GEMMs than it
# saves.
ROWS_WORTH_KEEPING = 16

# Coordinates of one constant that are whitened together: for each a refit keeps as many numbers.
WIDEST_BLOCK = 32

# Prompts of a circuit's evaluation whose activations are held as replacements.
REPLACED_AT_ONCE = 64

# `limits.memory_gb: auto`: the share of a GPU's free memory that one masked pass takes, beside copies that its formula
# does not count; and bytes on a CPU, and where the device is unknown.
PASS_SHARE = 0.7
PASS_BYTES_ON_CPU = 4e9
