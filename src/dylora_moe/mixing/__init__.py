"""The ways to compute the mixture inside adapted layers; all equal to `reference.py`."""

from .choice import choose
from .forms import FORM_NAMES, FORMS, Form
from .reference import reference_mixture

__all__ = ["FORMS", "FORM_NAMES", "Form", "choose", "reference_mixture"]
