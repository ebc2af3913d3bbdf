"""vLLM plugin: every text architecture X of vLLM is there a second time as DyLoRAMoEX, with experts routed per token.

It serves the folder that `dylora-moe export DIR --to vllm OUT` writes. vLLM calls `register` in each of its processes.
"""

__version__ = "0.1.0"

PREFIX = "DyLoRAMoE"
"""What stands before the base's architecture in the `architectures` of a mixture."""


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; loads no model class and does not touch the device."""
    from .registration import register_architectures

    register_architectures()
