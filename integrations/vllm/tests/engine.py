"""One engine of vLLM in a process of its own: a job in, what it answers out, both JSON.

    python engine.py JOB ANSWERS

A job has `folder`, `engine` (arguments of `vllm.LLM`), `new` (tokens of each answer) and `rounds`: lists of requests,
`{"prompt": ids, "selector": name or null}`, asked at once, or with `"alone": true` one after the other. With a worker
that records, answers have `routing`: what it recorded of the request. With `preempted`, some request must have been.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

SMALL = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "block_size": 32,
    "skip_tokenizer_init": True,
}


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    with open(sys.argv[1]) as file:
        job = json.load(file)
    llm = LLM(job["folder"], **(SMALL | job["engine"]))
    names = sorted({r["selector"] for round_ in job["rounds"] for r in round_["requests"] if r["selector"]})
    selectors = {n: LoRARequest(n, i + 1, f"{job['folder']}/selectors/{n}") for i, n in enumerate(names)}
    new = job["new"]
    recorded = "worker_cls" in job["engine"]

    def sampling(key: int) -> SamplingParams:
        extra = {"extra_args": {"dylora_routing": str(key)}} if recorded else {}
        return SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False, **extra)

    answers = []
    for round_ in job["rounds"]:
        requests = round_["requests"]
        prompts = [TokensPrompt(prompt_token_ids=r["prompt"]) for r in requests]
        chosen = [selectors.get(r["selector"]) for r in requests]
        step = 1 if round_.get("alone") else len(prompts)
        outs = []
        for at in range(0, len(prompts), step):
            some = chosen[at : at + step]
            lora = some if any(some) else None
            how = [sampling(key) for key in range(at, at + step)]
            outs += llm.generate(prompts[at : at + step], how, use_tqdm=False, lora_request=lora)
        found = [{"tokens": list(o.outputs[0].token_ids), "cached": o.num_cached_tokens or 0} for o in outs]
        for key, answer in enumerate(found if recorded else ()):
            answer["routing"] = llm.collective_rpc("take_routing", args=(str(key), True))[0]
        answers.append(found)
    if job["preempted"]:
        counted = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
        assert counted > 0, "no request was preempted"
    with open(sys.argv[2], "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main()
