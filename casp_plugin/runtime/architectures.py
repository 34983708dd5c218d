"""What is known of vLLM's models: which were run, and which cannot run our checkpoints."""

from collections.abc import Iterable

__all__ = ["TESTED", "refusal"]

#: architectures that tests/test_serving.py serves: log-probabilities equal to transformers'
TESTED = frozenset()

_REORDERS = "vLLM reorders the rows of q_proj and k_proj while loading, as if each were one weight"
_UNSERVED = dict.fromkeys(
    [
        "Llama4ForCausalLM",
        "Llama4ForConditionalGeneration",
        "EagleLlama4ForCausalLM",
        "K2HorizonForCausalLM",
    ],
    _REORDERS,
)


def refusal(architectures: Iterable[str], low_rank: bool, zero_points: bool) -> str | None:
    """Why vLLM cannot serve a checkpoint, or None.

    :param architectures: ``architectures`` of its ``config.json``
    :param low_rank: whether it holds factored layers
    :param zero_points: whether a scheme of it is asymmetric
    """
    for name in architectures:
        if name in _UNSERVED and (low_rank or zero_points):
            what = "low-rank layers" if low_rank else "zero points"
            return f"{name} cannot be served with {what}: {_UNSERVED[name]}"
    return None
