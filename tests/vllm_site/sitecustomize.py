"""The torchvision wheel on PyPI holds CUDA operators only: declare the two its import asks for."""

import importlib.util

if importlib.util.find_spec("torchvision"):
    import torch

    for name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor"
        )
