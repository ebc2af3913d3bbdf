"""Deciding: how much each expert contributes to each token. Knows no layer."""
