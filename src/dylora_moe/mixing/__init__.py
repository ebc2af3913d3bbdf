"""The ways to compute the mixture inside adapted layers; all equal to `reference.py`."""

from .choice import FORMS, choose
from .dense import dense_mixture
from .reference import reference_mixture
from .sparse import gathered_mixture, grouped_mixture

__all__ = ["FORMS", "choose", "dense_mixture", "gathered_mixture", "grouped_mixture", "reference_mixture"]
