"""A mixture that learns for years: what new rows are, and a new expert for them."""
