"""What is read of a body that is wrong."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from dylora_moe.gateway.schemas import Chat


def test_one_wrong_part_is_enough():
    """A list of all errors may need a thousand times the memory of the body."""
    with pytest.raises(ValidationError) as wrong:
        Chat.model_validate({"messages": [{"role": "user", "content": [0] * 1000}]})
    assert len(wrong.value.errors()) == 2  # no text, and no part
