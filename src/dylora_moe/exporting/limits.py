"""What cannot be served by vLLM, said before anything is written: the reason and the remedy."""

from __future__ import annotations

from collections.abc import Iterable

from dylora_moe.base.placement import BEFORE_THE_LAYERS
from dylora_moe.routing.granularity import GRANULARITIES

from .base_files import BaseFiles, check_held
from .source import Source

GRANULARITIES_SERVED = ("token", "prefix")
ROUTERS_SERVED = ("mlp", "linear", "closed_form")
ENDINGS = ("ForCausalLM", "LMHeadModel")
"""How the architectures end for which the plugin has a routed class."""
QUANTIZATIONS = ("awq", "compressed-tensors", "fp8", "gptq")
"""Of files that vLLM reads as they are."""
_OTHERWISE = "serve the mixture with `dylora-moe serve`, or its experts one by one (--to vllm-lora)"


def check_routable(source: Source, granularity: str) -> None:
    """Raise `ValueError` if vLLM's plugin could not route this mixture as the library does.

    Args:
        source: the mixture.
        granularity: of what is to be written.
    """
    config, placement, k = source.config, source.placement, source.router_layer
    if config.router_layer == "last":
        raise ValueError(
            'router_layer="last": every token would go through the base twice, and the plugin runs it once; '
            f"{_OTHERWISE}. A mixture to be served by vLLM has its router at a layer's input, by default L // 4."
        )
    for adapted in source.experts.layers:
        path = adapted.routing_name
        layer = placement.layer_of(path)
        if layer in (placement.num_layers, BEFORE_THE_LAYERS) or adapted.lora_embedding_A:
            raise ValueError(
                f"an expert adapts {path}: the plugin adds experts to linear layers inside the decoder layers, and not "
                f"to embeddings or the head; {_OTHERWISE}, or make the expert without it (target_modules)."
            )
        if layer < k:
            raise ValueError(
                f"an expert adapts {path}, below decoder layer {k}, whose input the router reads: that takes a routing "
                f"pass, which the plugin does not run; {_OTHERWISE}. A router at layer {layer} or lower (router_layer) "
                "needs none."
            )
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r}: choose one of {', '.join(GRANULARITIES_SERVED)}.")
    if granularity not in GRANULARITIES_SERVED:
        raise ValueError(
            f"granularity {granularity!r}: the first tokens of a prompt would depend on its last, and vLLM reads "
            'prompts in chunks and keeps their beginnings for other requests. Export with granularity="prefix" '
            "(--granularity prefix), which routes each token by the mean of those up to it; "
            'model.moe_config.granularity = "prefix" shows what it changes.'
        )
    if config.policy != "top_k":
        raise ValueError(f"policy={config.policy!r}: the plugin knows top_k only; set model.moe_config.policy.")
    if config.router_type not in ROUTERS_SERVED:
        raise ValueError(
            f"router_type={config.router_type!r}: the plugin knows {', '.join(ROUTERS_SERVED)}; {_OTHERWISE}."
        )
    if len(source.experts.masked) == len(source.experts.names):
        remedy = "teach one" if source.router.computed else "call start_routing() for one and train the router"
        raise ValueError(f"no expert is routed yet ({', '.join(source.experts.names)}); {remedy} first.")
    check_linear(source, source.experts.names)


def check_linear(source: Source, names: Iterable[str]) -> None:
    """Raise `ValueError` if what one of the experts `names` adds is more than s B A x."""
    for name in names:
        for setting in ("use_dora", "lora_bias"):
            if getattr(source.configs[name], setting):
                raise ValueError(
                    f"expert {name!r} has {setting}=True, so that it adds more than s · B A x, which is all that this "
                    "export holds. Export it by itself (--to peft) and use it with stock PEFT, or remove it from the "
                    "mixture."
                )


def check_base(source: Source, files: BaseFiles) -> str:
    """The architecture of the base, if vLLM can read its files as the library does.

    Raises:
        ValueError: rows of the vocabulary that the files lack, a quantization that is not theirs or that vLLM does not
            read, no text model, or files that hold other weights.
    """
    vocabulary = source.vocabulary
    if vocabulary.resized:
        raise ValueError(
            f"the base has {vocabulary.rows} rows in its embeddings, its files in {files.folder} have "
            f"{vocabulary.named_rows}. Save the resized base with base.save_pretrained(folder), the tokenizer too, and "
            "load the mixture on that (base=folder, --base)."
        )
    written, held = files.config.get("quantization_config"), getattr(source.base.config, "quantization_config", None)
    method = written.get("quant_method") if isinstance(written, dict) else None
    if written is not None and method not in QUANTIZATIONS:
        raise ValueError(
            f"{files.folder}: its weights are quantized with {method!r}, which vLLM is not known to read; it reads "
            f"{', '.join(QUANTIZATIONS)}. Load the mixture on the base in floating point (base=, --base)."
        )
    if written is None and held is not None:
        raise ValueError(
            f"the base was quantized while it was loaded, and its files in {files.folder} are not: vLLM would serve "
            "other weights. Load the mixture without quantization to export it."
        )
    named = files.config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else type(source.base).__name__
    if not isinstance(architecture, str) or not architecture.endswith(ENDINGS):
        raise ValueError(
            f"{files.folder}: the architecture is {architecture!r:.60}, and the plugin routes text models only "
            f"({', '.join(f'…{ending}' for ending in ENDINGS)}); {_OTHERWISE}."
        )
    check_held(files, source.base)
    return architecture
