"""The numbers that lenses share with their estimate (`oacore.estimate.lenses`): how much is held or done at a time.

Free of torch, because the Snakefile estimates on every dry run.
"""

# Logits at a time, 64 MiB in fp32: [B, L, V] of GPT-2-XL at batch 200 would be 1.9 GB, and its gradient as much again.
CHUNK_ELEMENTS = 2**24

# Attention outputs that the resample lens draws from.
BANK = 1000

# Test rows that a lens is evaluated on at a time.
BATCH_ROWS = 512

# Faithfulness: training rows that directions are whitened by, and halvings of the interval of the steering magnitude,
# 1e-3 to 1e3 whitened units: to within 0.1 %.
TRAIN_ROWS = 10_000
BISECTIONS = 14
