"""What vLLM says to some folders and arguments, before anything is loaded: a list in, a list of errors out, both JSON.

    python configurations.py JOBS ERRORS

A job is `[folder, arguments of vllm.EngineArgs]`; its error is null where the configuration is accepted.
"""

import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def main() -> None:
    from vllm import EngineArgs

    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    errors = []
    for folder, arguments in jobs:
        try:
            EngineArgs(model=folder, max_model_len=256, skip_tokenizer_init=True, **arguments).create_engine_config()
            errors.append(None)
        except ValueError as error:
            errors.append(f"{type(error).__name__}: {error}")
    with open(sys.argv[2], "w") as file:
        json.dump(errors, file)


if __name__ == "__main__":
    main()
