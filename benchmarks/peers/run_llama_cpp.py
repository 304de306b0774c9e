"""llama.cpp behind a pipe: a JSON line of settings, then one line of prompts per run, answered by step times."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the library prints must not mix with answers
    settings = json.loads(sys.stdin.readline())
    try:
        lib = importlib.import_module("llama_cpp")
    except ImportError as error:
        answers.write(json.dumps({"error": f"cannot import llama_cpp: {error}"}) + "\n")
        return
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(settings["model"].encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx = settings["num_tokens"]
    params.n_batch = params.n_ubatch = 512
    params.n_seq_max = settings["max_batch"]
    params.kv_unified = True
    params.n_threads = params.n_threads_batch = settings["threads"]
    context = lib.llama_init_from_model(model, params) if model else None
    if not context:
        answers.write(json.dumps({"error": f"cannot load {settings['model']}"}) + "\n")
        return
    answers.write("{}\n")
    batch = lib.llama_batch_init(512, 0, 1)

    def decode(tokens: list[tuple[int, int, int, bool]]) -> None:
        for index, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        batch.n_tokens = len(tokens)
        status = lib.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode: {status}")

    sampler = lib.llama_sampler_init_greedy()
    for line in sys.stdin:
        run = json.loads(line)
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        last = []
        for sequence, prompt in enumerate(run["prompts"]):
            for start in range(0, len(prompt), 512):
                part = prompt[start : start + 512]
                end = len(prompt) - 1
                decode([(token, start + i, sequence, start + i == end) for i, token in enumerate(part)])
            last.append(lib.llama_sampler_sample(sampler, context, -1))
        steps_s = []
        length = len(run["prompts"][0])
        for step in range(run["max_tokens"] - 1):
            begin_s = time.perf_counter()
            decode([(token, length + step, sequence, True) for sequence, token in enumerate(last)])
            last = [lib.llama_sampler_sample(sampler, context, index) for index in range(len(last))]
            steps_s.append(time.perf_counter() - begin_s)
        answers.write(json.dumps({"steps_s": steps_s}) + "\n")


if __name__ == "__main__":
    main()
