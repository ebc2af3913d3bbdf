"""Prefix granularity: the running mean of a request's scores, as attention whose logits are all equal.

Its state is KV cache, so that chunks of a prompt, cached prefixes and preemption are right by construction. It costs
one layer of KV. Shapes: T tokens, n router outputs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention


class RunningMean(nn.Module):
    """Scores float32 `[T, n]` of single tokens → the mean over each token's request up to and including it.

    The mean has the precision of the KV cache. A constant per token makes no difference to a softmax, so each token's
    scores are centred first: what is rounded is then as small as their differences.

    Args:
        config: vLLM's, of the whole engine.
        layers: L; the state is the KV cache of a layer after the last.
    """

    def __init__(self, config: Any, layers: int):
        super().__init__()
        model, parallel = config.model_config, config.parallel_config
        self._heads, self._kv_heads = model.get_num_attention_heads(parallel), model.get_num_kv_heads(parallel)
        self._size, self._dtype = model.get_head_size(), model.dtype
        cache = copy.copy(config.cache_config)
        cache.sliding_window = None  # the mean is over all tokens, whatever the base attends to
        self.attn = Attention(
            self._heads,
            self._size,
            1.0,
            num_kv_heads=self._kv_heads,
            cache_config=cache,
            prefix=f"dylora.layers.{layers}.attn",
        )

    def forward(self, scores: Tensor) -> Tensor:
        tokens, n = scores.shape
        centred = scores - scores.mean(-1, keepdim=True)
        query = torch.zeros(tokens, self._heads * self._size, dtype=self._dtype, device=scores.device)
        key = torch.zeros(tokens, self._kv_heads * self._size, dtype=self._dtype, device=scores.device)
        value = F.pad(centred.to(self._dtype), (0, self._kv_heads * self._size - n))
        return self.attn(query, key, value)[:, :n].float()
