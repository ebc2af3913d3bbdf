"""`model="NAME:sql"` in a request: the selector `sql` of the mixture that is served as NAME."""

from __future__ import annotations

from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from .selectors import selector_of


class SelectorResolver(LoRAResolver):
    """Finds the selectors of the mixtures that this process serves.

    vLLM asks it only with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`, and then lets clients load adapters from any path, too:
    `--lora-modules` is the safer way.
    """

    def __init__(self) -> None:
        self._served: dict[str, tuple[frozenset[str], frozenset[str]]] = {}

    def serve(self, folder: str, names: list[str], selectors: list[str]) -> None:
        """Answer for a mixture from now on.

        Args:
            folder: of the mixture, as vLLM was given it.
            names: under which it is served.
            selectors: that it has.
        """
        self._served[folder] = frozenset(names), frozenset(selectors)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter that a request's model name stands for; None, which vLLM answers with 404, if it is nobody's."""
        names, selectors = self._served.get(base_model_name, (frozenset(), frozenset()))
        key = selector_of(lora_name, names, selectors)
        if key is None:
            return None
        path = Path(base_model_name) / "selectors" / key
        return LoRARequest(lora_name=lora_name, lora_path=str(path), lora_int_id=1)  # vLLM sets the id
