"""DyLoRA-MoE: many LoRA experts in one model, routed token by token in one forward pass."""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .checkpoint.files import CheckpointError
    from .config import MoELoraConfig
    from .layers.enable import enable_routing
    from .model import DyLoraMoE
    from .output import MoECausalLMOutput
    from .reports import GradientStats, ParameterReport, gradient_report
    from .routing.router import Router
    from .routing.trace import RoutingTrace
    from .training.trainer.trainer import MoETrainer as MoETrainer

# Name → module. They are loaded when they are first used (PEP 562): torch, transformers and peft take seconds.
_MODULES = {
    "CheckpointError": "checkpoint.files",
    "DyLoraMoE": "model",
    "GradientStats": "reports",
    "MoECausalLMOutput": "output",
    "MoELoraConfig": "config",
    "MoETrainer": "training.trainer.trainer",
    "ParameterReport": "reports",
    "Router": "routing.router",
    "RoutingTrace": "routing.trace",
    "enable_routing": "layers.enable",
    "gradient_report": "reports",
}

__all__ = [  # without MoETrainer, which needs the extra `train`: a star takes what the core has
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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *__all__})
