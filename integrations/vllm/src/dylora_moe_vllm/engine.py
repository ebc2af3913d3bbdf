"""What an engine that serves a mixture must be like: checked before anything is loaded, in the process of the user."""

from __future__ import annotations

import logging
from typing import Any

from .selectors import SELECT
from .settings import Settings, SettingsError, parse

logger = logging.getLogger("vllm.dylora_moe")

RECORDER = f"{__package__}.worker.RecordingWorker"
"""The worker that records which weights were in force."""

REFUSED_SIZES = ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size")


def prepare(config: Any) -> Settings:
    """Check vLLM's configuration of an engine and set what the mixture needs in it.

    Args:
        config: a `VllmConfig`; `lora_config.target_modules` is set, so that vLLM's LoRA wraps nothing but selectors,
            and `additional_config` where weights are recorded: what vLLM keeps of compiled graphs goes by it, and not
            by the worker's class.

    Raises:
        SettingsError: the folder's section is wrong, or the engine cannot serve such a mixture.
    """
    settings = parse(getattr(config.model_config.hf_config, "dylora_moe", None))
    _refuse(config, settings)
    if recording(config):
        _refuse_recording(config)
        config.additional_config = {**config.additional_config, "dylora_moe_records": True}
    lora = config.lora_config
    if lora is not None:
        if lora.target_modules not in (None, [SELECT]):
            raise SettingsError(
                f"lora_target_modules={lora.target_modules}: a mixture's LoRA slots hold selectors only; leave it out."
            )
        lora.target_modules = [SELECT]
        if lora.max_loras < len(settings.selectors):
            logger.warning(
                "max_loras=%d is less than the %d selectors of the mixture: requests of more than %d of them wait for "
                "each other.",
                lora.max_loras,
                len(settings.selectors),
                lora.max_loras,
            )
    return settings


def recording(config: Any) -> bool:
    """Whether an engine records which weights were in force: its worker is ours."""
    return config.parallel_config.worker_cls == RECORDER


def _refuse_recording(config: Any) -> None:
    if (size := config.parallel_config.data_parallel_size) != 1:
        raise SettingsError(
            f"data_parallel_size={size}: vLLM returns what the first engine's worker recorded, whichever engine wrote "
            f"the answer; serve without --worker-cls {RECORDER}, or one engine per server."
        )
    if config.use_v2_model_runner:
        raise SettingsError(
            f"worker_cls={RECORDER}: which rows of a step are whose is read off vLLM's V1 model runner; set "
            "VLLM_USE_V2_MODEL_RUNNER=0."
        )


def _refuse(config: Any, settings: Settings) -> None:
    model, parallel = config.model_config, config.parallel_config
    for name in REFUSED_SIZES:
        if (size := getattr(parallel, name)) != 1:
            raise SettingsError(
                f"{name}={size}: what one decoder layer decides does not reach other stages; use tensor parallelism."
            )
    if parallel.enable_dbo or parallel.ubatch_size > 1:
        raise SettingsError("enable_dbo: two micro-batches at once would share one decision; leave it out.")
    speculative = config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        raise SettingsError(f"speculative method {speculative.method!r}: untested with a mixture; use 'ngram' or none.")
    if model.use_mla and (absorbed := next((p for p in settings.modules if p.endswith(".kv_b_proj")), None)):
        raise SettingsError(
            f"{absorbed}: vLLM folds this matrix into attention, where experts cannot be added; leave it out of the "
            "experts' target_modules."
        )
    if settings.granularity == "prefix":
        _refuse_prefix(config, settings)


def _refuse_prefix(config: Any, settings: Settings) -> None:
    model, cache = config.model_config, config.cache_config
    if model.use_mla or model.is_hybrid:
        raise SettingsError(
            "granularity='prefix': its running mean needs a plain attention layer's KV cache, which this base does not "
            "have; export the mixture with granularity='token'."
        )
    if cache.cache_dtype.startswith(("fp8", "int", "nvfp4")):
        raise SettingsError(
            f"kv_cache_dtype={cache.cache_dtype!r}: granularity='prefix' keeps its running mean in the KV cache, where "
            "it would lose its precision; leave it at 'auto'."
        )
    if settings.outputs > model.get_head_size():
        raise SettingsError(
            f"granularity='prefix': {settings.outputs} router outputs do not fit an attention head of "
            f"{model.get_head_size()}; export the mixture with granularity='token'."
        )
