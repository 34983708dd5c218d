"""Ask a compressed model in vLLM.

    python examples/serve.py [OUT]

Runs in the environment of vLLM and this package (docs/serving.md), where vLLM finds the plugin by
itself. A server instead: vllm serve OUT
"""

import sys

from vllm import LLM, SamplingParams

[OUT] = sys.argv[1:] or ["OUT"]
PROMPTS = ["A compiler is a program that", "Hamlet was written by"]


def main() -> None:
    """Print an answer to every prompt."""
    llm = LLM(OUT, max_model_len=64)
    answers = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=32))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        print(f"{prompt} ...{answer.outputs[0].text}")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
