"""DyLoRA-MoE: many LoRA experts in one model, routed token by token in one forward pass."""

from .checkpoint import CheckpointError
from .config import MoELoraConfig
from .layers import enable_routing
from .model import DyLoraMoE
from .output import MoECausalLMOutput
from .router import Router
from .trace import GradientStats, ParameterReport, RoutingTrace, gradient_report

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DyLoraMoE",
    "GradientStats",
    "MoECausalLMOutput",
    "MoELoraConfig",
    "ParameterReport",
    "Router",
    "RoutingTrace",
    "enable_routing",
    "gradient_report",
]
