"""Stable Diffusion from scratch: the library that the chapters build.

Each module is generated from the chapter that explains it (`make export`). This file and
`__main__.py` alone are written by hand. The names below are loaded at first use, so that
`import sdlib` takes no time:

    from sdlib import StableDiffusion
    pipe = StableDiffusion.from_pretrained("models/emoji-sd")
    pipe("a fox to the left of a pizza, blue background", seed=0)[0].save("fox.png")
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "AutoencoderKL": "vae",
    "CLIPTextModel": "clip",
    "CLIPVisionModelWithProjection": "clip",
    "DDIMScheduler": "schedulers",
    "DDPMScheduler": "schedulers",
    "ImageToImage": "img2img",
    "Inpainting": "inpainting",
    "NoiseSchedule": "noise",
    "StableDiffusion": "pipeline",
    "Tokenizer": "tokenizer",
    "UNet2DConditionModel": "unet",
    "load_checkpoint": "checkpoints",
    "save_checkpoint": "checkpoints",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    """Import a public class when it is first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module 'sdlib' has no attribute {name!r}")
    value = getattr(import_module(f"sdlib.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
