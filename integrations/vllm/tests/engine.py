"""One engine of vLLM in a process of its own: a job in, what it answers out, both JSON.

    python engine.py JOB ANSWERS

A job has `folder`, `engine` (arguments of `vllm.LLM`), `new` (tokens of each answer) and `rounds`: lists of requests,
`{"prompt": ids, "selector": name or null}`, asked at once, or with `"alone": true` one after the other.
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
    sampling = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
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
            outs += llm.generate(prompts[at : at + step], sampling, use_tqdm=False, lora_request=lora)
        answers.append([{"tokens": list(o.outputs[0].token_ids), "cached": o.num_cached_tokens or 0} for o in outs])
    with open(sys.argv[2], "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main()
