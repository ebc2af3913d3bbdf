"""DyLoRA-MoE: many LoRA experts in one model, routed token by token in one forward pass."""

from .checkpoint.files import CheckpointError
from .config import MoELoraConfig
from .layers.enable import enable_routing
from .model import DyLoraMoE
from .output import MoECausalLMOutput
from .reports import GradientStats, ParameterReport, gradient_report
from .routing.router import Router
from .routing.trace import RoutingTrace
from .version import __version__

__all__ = [
    "CheckpointError",
    "DyLoraMoE",
    "GradientStats",
    "MoECausalLMOutput",
    "MoELoraConfig",
    "ParameterReport",
    "Router",
    "RoutingTrace",
    "__version__",
    "enable_routing",
    "gradient_report",
]
