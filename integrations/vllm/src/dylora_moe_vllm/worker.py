"""vLLM's worker, which also records what was in force: `--worker-cls dylora_moe_vllm.worker.RecordingWorker`.

A step's requests and the order of their tokens are known to the model runner alone, which is why no worker extension
(it adds methods, and is called between steps) can do this.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform

from .engine import RECORDER
from .records import KEY, Records
from .settings import SettingsError

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class RecordingWorker(Worker):
    """The platform's worker, and the records of those requests that ask for one.

    Every rank decides the same, so the first one alone records. A model that is no mixture is a `SettingsError`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._dylora_records = Records()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if not hasattr(self.get_model(), "dylora"):
            raise SettingsError(f"worker_cls={RECORDER}: the model is no mixture; leave it out.")

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any) -> Any:
        if self.rank != 0:
            return super().execute_model(scheduler_output)
        records, tokens = self._dylora_records, scheduler_output.num_scheduled_tokens
        records.end(scheduler_output.finished_req_ids)
        for new in scheduler_output.scheduled_new_reqs:
            key = ((new.sampling_params and new.sampling_params.extra_args) or {}).get(KEY)
            if key is not None:
                prompt = new.prompt_embeds if new.prompt_token_ids is None else new.prompt_token_ids
                records.begin(new.req_id, str(key), len(prompt))
        wanted = records.wanted(tokens)
        if wanted:
            self._dylora().recorded.fill_(float("nan"))
        out = super().execute_model(scheduler_output)
        if wanted:
            runner = self.model_runner
            records.add(runner.input_batch.req_ids, tokens, runner.positions, self._dylora().recorded)
        return out

    def take_routing(self, key: str, whole: bool = False) -> dict[str, Any] | None:
        """The routing weights of a request, which are forgotten: for `collective_rpc`, once it has been answered.

        Args:
            key: that the request had in its `extra_args`, under `dylora_routing`.
            whole: the prompt's as well.

        Returns:
            `experts`, their names; `prompt`, the number of its tokens; `weights`, as `Record.weights`. None if there is
            no such record, and on every rank but the first.
        """
        record = self._dylora_records.take(key)
        if record is None:
            return None
        experts = list(self._dylora().settings.experts)
        return {"experts": experts, "prompt": record.prompt, "weights": record.weights(whole)}

    def _dylora(self) -> Any:
        return self.get_model().dylora
