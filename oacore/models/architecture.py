"""The embedded model's shape, for its training and for the estimate of memory and time.

Free of torch, because the Snakefile estimates on every dry run.
"""

# As a GPT-2's config.json has it; the vocabulary is that of `oacore.models.demo.make_tokenizer`.
DEMO_ARCHITECTURE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 64, "vocab_size": 470}
