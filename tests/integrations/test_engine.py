"""What an engine that serves a mixture must be like, on configurations made up for it."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from dylora_moe_vllm.engine import RECORDER, prepare, recording
from dylora_moe_vllm.settings import SettingsError
from plugin_section import section


def configuration(given: Any = None, **changes: Any) -> SimpleNamespace:
    """What is read of a `VllmConfig`; `changes` by the names of their attributes."""
    parts = {
        "model_config": {"use_mla": False, "is_hybrid": False, "get_head_size": lambda: 32},
        "parallel_config": {
            "pipeline_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "enable_dbo": False,
            "ubatch_size": 0,
            "data_parallel_size": 1,
            "worker_cls": "auto",
        },
        "cache_config": {"cache_dtype": "auto"},
        "lora_config": {"target_modules": None, "max_loras": 5},
    }
    made = {name: SimpleNamespace(**{k: changes.get(k, v) for k, v in part.items()}) for name, part in parts.items()}
    made["model_config"].hf_config = SimpleNamespace(dylora_moe=section() if given is None else given)
    return SimpleNamespace(
        **made,
        speculative_config=changes.get("speculative"),
        additional_config={"own": 1},
        use_v2_model_runner=changes.get("use_v2_model_runner", False),
    )


def test_only_selectors_are_wrapped(caplog: pytest.LogCaptureFixture):
    config = configuration()
    with caplog.at_level(logging.WARNING):
        assert prepare(config).experts == ("red", "green", "blue")
        prepare(config)  # vLLM may check twice
    assert config.lora_config.target_modules == ["dylora_select"]
    assert not caplog.records
    config.lora_config = None
    prepare(config)


def test_few_slots_are_said(caplog: pytest.LogCaptureFixture):
    prepare(configuration(max_loras=2))
    assert "max_loras=2 is less than the 5 selectors" in caplog.text


PREFIX = section(granularity="prefix")
MLA = section(modules={"model.layers.1.self_attn.kv_b_proj": [[0, 4, 1.0]]})
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (None, {"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
    (None, {"decode_context_parallel_size": 2}, "decode_context_parallel_size=2"),
    (None, {"enable_dbo": True}, "enable_dbo"),
    (None, {"target_modules": ["q_proj"]}, r"lora_target_modules=\['q_proj'\]"),
    (None, {"speculative": SimpleNamespace(method="eagle")}, "'eagle'"),
    (MLA, {"use_mla": True}, "kv_b_proj: vLLM folds"),
    (PREFIX, {"use_mla": True}, "granularity='prefix'"),
    (PREFIX, {"is_hybrid": True}, "granularity='prefix'"),
    (PREFIX, {"cache_dtype": "fp8_e5m2"}, "kv_cache_dtype='fp8_e5m2'"),
    (PREFIX, {"get_head_size": lambda: 2}, "3 router outputs do not fit an attention head of 2"),
    ({}, {}, "version=None"),
    (None, {"worker_cls": RECORDER, "data_parallel_size": 2}, "data_parallel_size=2"),
    (None, {"worker_cls": RECORDER, "use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
]


@pytest.mark.parametrize(("given", "changes", "message"), REFUSED)
def test_refused(given: Any, changes: dict[str, Any], message: str):
    with pytest.raises(SettingsError, match=message):
        prepare(configuration(given, **changes))


@pytest.mark.parametrize("changes", [{"use_mla": True}, {"cache_dtype": "fp8"}, {"is_hybrid": True}])
def test_what_prefix_cannot_do_token_can(changes: dict[str, Any]):
    prepare(configuration(**changes))


def test_what_recording_cannot_do_others_can():
    prepare(configuration(data_parallel_size=2, use_v2_model_runner=True))


def test_a_graph_that_records_is_another_for_the_cache():
    config = configuration(worker_cls=RECORDER)
    prepare(config)
    prepare(config)
    assert recording(config)
    assert config.additional_config == {"own": 1, "dylora_moe_records": True}
    plain = configuration()
    prepare(plain)
    assert not recording(plain)
    assert plain.additional_config == {"own": 1}


def test_ngram_is_served():
    prepare(configuration(speculative=SimpleNamespace(method="ngram")))


def test_no_section_at_all():
    config = configuration()
    del config.model_config.hf_config.dylora_moe
    with pytest.raises(SettingsError, match="dylora_moe=None"):
        prepare(config)
