"""Runs in vLLM's own environment: one request a line on stdin, one answer a line on stdout.

A request is ``{"model": folder, "prompts": [...], "tokens": n, "engine": {...}}``, a prompt a list
of token ids or ``{"prompt_token_ids": [...], "image": path}``, or ``"video"``, whose frames are a
.npy file. The answer holds, for each prompt, the log-probabilities of its own tokens from the
second on, the greedy continuation, and the log-probabilities of that. Or ``{"error": text}``.
"""

import gc
import json
import os
import sys
import traceback

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # vLLM logs to stdout


def decoded(prompt: list[int] | dict) -> dict:
    """What vLLM takes for a prompt of token ids, or of token ids and a path."""
    if isinstance(prompt, list):
        return {"prompt_token_ids": prompt}
    import numpy
    from PIL import Image

    seen = {
        kind: read(prompt[kind])
        for kind, read in (("image", Image.open), ("video", numpy.load))
        if kind in prompt
    }
    return {"prompt_token_ids": prompt["prompt_token_ids"], "multi_modal_data": seen}


def serve(request: dict) -> list[dict]:
    from vllm import LLM, SamplingParams

    settings = {"enforce_eager": True, "max_model_len": 64, "dtype": "float32", "seed": 0}
    settings["kv_cache_memory_bytes"] = 2**26  # the least that the environment can ask for is 1 GiB
    llm = LLM(request["model"], **{**settings, **request.get("engine", {})})
    try:
        params = SamplingParams(
            max_tokens=request["tokens"], temperature=0, logprobs=0, prompt_logprobs=0,
            ignore_eos=True,
        )  # fmt: skip
        prompts = [decoded(prompt) for prompt in request["prompts"]]
        answers = []
        for output in llm.generate(prompts, params, use_tqdm=False):
            made = output.outputs[0]
            answers.append(
                {
                    "prompt": [
                        entry[token].logprob
                        for token, entry in zip(
                            output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
                        )
                    ],
                    "tokens": list(made.token_ids),
                    "logprobs": [
                        entry[token].logprob
                        for token, entry in zip(made.token_ids, made.logprobs, strict=True)
                    ],
                }
            )
        return answers
    finally:
        llm.llm_engine.engine_core.shutdown()


def main() -> None:
    from vllm.model_executor.models import registry

    # vLLM looks at every new architecture in a process of its own, which imports vLLM anew
    registry._run_in_subprocess = lambda inspect: inspect()
    # an engine collects garbage seven times, a second each with all that vLLM imports
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None
    for line in sys.stdin:
        try:
            answer = serve(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
