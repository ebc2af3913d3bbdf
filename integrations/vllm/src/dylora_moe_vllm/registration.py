"""Telling vLLM which architectures there are besides its own, who checks their settings and who finds selectors."""

from __future__ import annotations

import logging
from typing import Any

from . import PREFIX, __version__
from .engine import prepare

TESTED = "0.32."
"""How the versions of vLLM begin that the plugin was tested with; it reaches into parts that others may not have."""

logger = logging.getLogger("vllm.dylora_moe")


def register_architectures() -> None:
    """Offer `DyLoRAMoE` + X for every causal language model X of vLLM; twice is as good as once."""
    import vllm

    if not vllm.__version__.startswith(TESTED):
        logger.error(
            "dylora-moe-vllm %s is tested with vLLM %s*, this is %s: mixtures are not served; install one of those.",
            __version__,
            TESTED,
            vllm.__version__,
        )
        return
    from vllm import ModelRegistry
    from vllm.lora.resolver import LoRAResolverRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    from .resolver import SelectorResolver

    if "dylora_moe" in LoRAResolverRegistry.get_supported_resolvers():
        return
    resolver = SelectorResolver()
    LoRAResolverRegistry.register_resolver("dylora_moe", resolver)
    for architecture in list(ModelRegistry.get_supported_archs()):
        if architecture.endswith(("ForCausalLM", "LMHeadModel")):
            ModelRegistry.register_model(PREFIX + architecture, f"{__package__}.model:{PREFIX}{architecture}")
            of_base = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
            MODELS_CONFIG_MAP[PREFIX + architecture] = _checked(of_base, resolver)


def _checked(of_base: Any, resolver: Any) -> type:
    """What vLLM does about the base's configuration, after ours was checked."""

    class Checked(of_base):
        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            settings = prepare(vllm_config)
            model = vllm_config.model_config
            names = model.served_model_name
            resolver.serve(model.model, [names] if isinstance(names, str) else list(names), list(settings.selectors))
            of_base.verify_and_update_config(vllm_config)

    return Checked
