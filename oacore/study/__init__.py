"""Several models side by side: their runs, what methods cost on them, and how that grows."""
