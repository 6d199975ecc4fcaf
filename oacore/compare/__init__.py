"""Two finished runs side by side: what differs in their settings, and what that changed.

No model is loaded and nothing computed but differences. `python -m oacore compare` asks for it, and the config's
`compare:`.
"""
