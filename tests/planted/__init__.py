"""Models with hand-set weights whose true circuit, or place of recall, is known."""
