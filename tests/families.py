"""A tiny base of every family of decoders that transformers knows in another form: caches, states, layers, heads.

The first four are those of `tiny.py`. All have four decoder layers, so that a router at layer 2 has layers below it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

PLAIN: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SLIDING = ["sliding_attention", "full_attention"] * 2
HYBRID = ["linear_attention", "full_attention"] * 2
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": PLAIN,
    "mistral": {**PLAIN, "sliding_window": 6},
    "qwen2": PLAIN,
    "gemma2": {**PLAIN, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {**PLAIN, "head_dim": 8, "sliding_window": 6, "layer_types": SLIDING},
    "gemma3n_text": {
        **PLAIN,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "head_dim": 8,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "sliding_window": 6,
        "layer_types": SLIDING,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "mixtral": {**PLAIN, **EXPERTS},
    "qwen3_moe": {
        **PLAIN,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "gpt_oss": {**PLAIN, **EXPERTS, "head_dim": 8, "sliding_window": 6, "layer_types": SLIDING},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, **NO_DROPOUT},
    "gptj": {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "opt": {**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "xglm": {
        "vocab_size": 64,
        "d_model": 32,
        "ffn_dim": 48,
        "num_layers": 4,
        "attention_heads": 4,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
    },
    "falcon_h1": {
        **PLAIN,
        "head_dim": 8,
        "mamba_d_ssm": 64,
        **MAMBA2,
    },
    "qwen3_next": {
        **PLAIN,
        "head_dim": 8,
        "layer_types": HYBRID,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "lfm2": {
        **PLAIN,
        "block_ff_dim": 48,
        "block_multiple_of": 8,
        "conv_L_cache": 3,
        "full_attn_idxs": [1, 3],
    },
    "jamba": {
        **PLAIN,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "bamba": {**PLAIN, "attn_layer_indices": [1, 3], **MAMBA2},
    "granitemoehybrid": {
        **PLAIN,
        **EXPERTS,
        **MAMBA2,
        "shared_intermediate_size": 16,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "recurrent_gemma": {
        **PLAIN,
        "lru_width": 32,
        "attention_window_size": 6,
        "block_types": ["recurrent", "attention"] * 2,
    },
    "mamba": {"vocab_size": 64, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 4, "time_step_rank": 4},
    "mamba2": {
        "vocab_size": 64,
        "hidden_size": 32,
        "state_size": 8,
        "num_hidden_layers": 4,
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "falcon_mamba": {
        "vocab_size": 64,
        "hidden_size": 32,
        "state_size": 8,
        "num_hidden_layers": 4,
        "time_step_rank": 4,
    },
    "nemotron_h": {
        **PLAIN,
        "head_dim": 8,
        "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "rwkv": {
        "vocab_size": 64,
        "context_length": 64,
        "hidden_size": 32,
        "attention_hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
    },
}

TARGETS: dict[str, Any] = {
    "falcon_h1": ["q_proj", "v_proj", "in_proj", "up_proj"],
    "qwen3_next": ["q_proj", "v_proj", "in_proj_qkvz", "in_proj_ba"],
    "jamba": ["q_proj", "v_proj", "in_proj", "x_proj"],
    "bamba": ["q_proj", "v_proj", "in_proj"],
    "granitemoehybrid": ["q_proj", "v_proj", "in_proj"],
    "mamba": ["in_proj", "x_proj"],
    "mamba2": ["in_proj"],
    "falcon_mamba": ["in_proj", "x_proj"],
    "nemotron_h": ["q_proj", "in_proj", "up_proj"],
    "rwkv": ["key", "value", "receptance"],
}
"""What experts adapt where it is not every linear layer: PEFT refuses some of a Mamba layer's."""


def family_base(family: str) -> PreTrainedModel:
    """A base of a family with random weights, in evaluation mode."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**FAMILIES[family]))
    for parameter in base.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.2)
    return base.eval()
