"""The colours of all figures. Names in registry rows have one each; what is not told apart by colour has a marker."""

INK, SLATE, PALE, GRID = "#1f2933", "#64748b", "#b6c0cc", "#e4e8ed"
# Optimal ablation, in every figure and in the report; told from SLATE and BLUE under every colour blindness.
ACCENT = "#c8500a"
BLUE, GOLD, GREEN, TEAL, PURPLE, PINK = "#0b62a4", "#b7791f", "#3f9b4f", "#0f8f8f", "#7b4bb3", "#c2417c"
BLUE_GREY, PALE_SLATE = "#7d9cbc", "#98a4b3"  # noise of other scales than the usual one
