"""Measure a mixture beside its base and its peers: time, memory and arithmetic (`dylora-moe bench`)."""
