"""llama.cpp behind a pipe: a JSON line of settings, then one line of prompts per run, answered by step times.

One prompt at a time: its Python binding's own class decodes no batches.
"""

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
        library = importlib.import_module("llama_cpp")
        engine = library.Llama(
            settings["model"],
            n_ctx=settings["num_tokens"],
            n_threads=settings["threads"],
            n_threads_batch=settings["threads"],
            verbose=False,
        )
    except (ImportError, ValueError) as error:
        answers.write(json.dumps({"error": f"llama_cpp: {error}"}) + "\n")
        return
    answers.write("{}\n")
    for line in sys.stdin:
        run = json.loads(line)
        (prompt,) = run["prompts"]
        engine.reset()
        engine.eval(prompt)
        steps_s = []
        token = engine.sample(temp=0.0)
        for _ in range(run["max_tokens"] - 1):
            begin_s = time.perf_counter()
            engine.eval([token])
            token = engine.sample(temp=0.0)
            steps_s.append(time.perf_counter() - begin_s)
        answers.write(json.dumps({"steps_s": steps_s}) + "\n")


if __name__ == "__main__":
    main()
