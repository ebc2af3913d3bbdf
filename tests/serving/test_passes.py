"""What an engine's passes keep from one to the next, and which bases they serve."""

from typing import Any

import pytest
import torch

from dylora_moe.routing.call import Call
from dylora_moe.serving.passes import Passes
from families import family_base
from tiny import tiny_mixture, tokens


def run(passes: Passes, experts: Any) -> Any:
    """What the holder's generation was during a pass over two rows."""
    ids, seen = tokens(2, 3), []
    handle = passes.base.register_forward_pre_hook(lambda *_: seen.append(passes.model.holder.generation))
    with torch.no_grad():
        logits, weights = passes.run(
            Call(experts=experts), ids, torch.arange(3).expand(2, -1), torch.ones_like(ids), passes.new_cache()
        )
    handle.remove()
    assert logits.shape == (2, 61)
    assert weights.shape == (2, 3)
    return seen[0]


def test_what_was_packed_is_kept_for_routed_passes_and_the_last_forced_ones():
    passes = Passes(tiny_mixture())
    routed = run(passes, None)
    assert routed is not None
    assert run(passes, [None, "red"]) is routed
    forced = run(passes, ["red", "blue"])
    assert forced is not routed
    assert run(passes, ["blue", "red"]) is forced
    assert run(passes, "red") is None
    run(passes, ["red", "base"])
    assert run(passes, ["red", "blue"]) is not forced
    assert run(passes, None) is routed
    passes.forget()
    assert run(passes, None) is not routed


def test_pieces_agree_where_a_base_reads_them_as_a_whole(caplog):
    passes = Passes(tiny_mixture("gemma2"))
    assert passes.agree_in_pieces(40)
    embeddings: Any = passes.base.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: output * (1 + 0.01 * (output.shape[1] > 20)))
    assert not passes.agree_in_pieces(40)
    assert "Gemma2ForCausalLM answers otherwise where a prompt is read in pieces" in caplog.text
    assert passes.agree_in_pieces(20)


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("rwkv", ["key", "value"], "keeps its state in no transformers Cache"),
        ("mamba", ["in_proj"], "keeps LinearAttentionLayer in its cache"),
    ],
)
def test_bases_that_cannot_be_served_are_refused(family, targets, message):
    model = tiny_mixture(family, base=family_base(family), target_modules=targets)
    with pytest.raises(ValueError, match=f"{message}.*Use model.generate"):
        Passes(model)
