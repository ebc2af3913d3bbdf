"""Measuring a mixture on held-out examples."""
