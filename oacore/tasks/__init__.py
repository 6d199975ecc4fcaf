"""The tasks: prompts, counterfactuals and answers from settings, a tokenizer, a seed and a split."""
