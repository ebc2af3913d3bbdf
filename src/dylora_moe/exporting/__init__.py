"""Folders that others serve, made of a mixture: for vLLM, routed or adapter by adapter, and as a plain model."""
