"""vLLM behind a pipe: a JSON line of settings, then one line of prompts per run, answered by step times."""

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
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["OMP_NUM_THREADS"] = str(settings["threads"])
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:
        answers.write(json.dumps({"error": f"cannot import vllm: {error}"}) + "\n")
        return
    engine = vllm.LLM(
        model=settings["model"],
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=settings["max_batch"],
        enable_prefix_caching=False,
    ).llm_engine
    answers.write("{}\n")
    num_requests = 0
    for line in sys.stdin:
        run = json.loads(line)
        params = vllm.SamplingParams(temperature=0.0, max_tokens=run["max_tokens"], ignore_eos=True)
        for prompt in run["prompts"]:
            engine.add_request(str(num_requests), {"prompt_token_ids": prompt}, params)
            num_requests += 1
        steps_s = []
        started: set[str] = set()
        while engine.has_unfinished_requests():
            decoding = len(started) == len(run["prompts"])
            begin_s = time.perf_counter()
            outputs = engine.step()
            taken_s = time.perf_counter() - begin_s
            started.update(output.request_id for output in outputs)
            if decoding and outputs:
                steps_s.append(taken_s)
        answers.write(json.dumps({"steps_s": steps_s}) + "\n")


if __name__ == "__main__":
    main()
