"""One layer stack of an 8B model on a GPU: base, PEFT and mixtures, with the Triton kernels and with torch alone.

Each phase runs in a process of its own, so that one that fails or hangs costs only itself: `checks` (kernels against
float64), `kernels` (against torch, call by call), `prefill`, `training` (forward and backward) and `decoding` (one
token, static cache, CUDA graph). Within a phase all variants are in memory and take turns in random order; a ratio is
the median over the rounds of variant / base, with the 95 % bootstrap interval of that median, and the base measured a
second time under another name is the noise floor. Weights are random, the base is frozen, and its backward pass goes
down to the embeddings.
"""
