"""The ways to compute the mixture inside one adapted layer; all equal to `reference.py`."""

from .dense import DenseMixture, dense_mixture
from .reference import reference_mixture

__all__ = ["DenseMixture", "dense_mixture", "reference_mixture"]
