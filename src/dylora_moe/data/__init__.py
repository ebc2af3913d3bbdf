"""Examples: what a recipe says of them, reading and generating them, mixing and tokenising them. Knows no training."""
