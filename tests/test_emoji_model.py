"""The shipped small model: opens in the reference libraries, and they paint the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import relative_error
from PIL import Image

from sdlib import StableDiffusion
from sdlib.scenes import EXAMPLE_PROMPT

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models/emoji-sd"


@pytest.fixture(scope="module")
def ours() -> StableDiffusion:
    return StableDiffusion.from_pretrained(MODEL, device="cpu")


@pytest.fixture(scope="module")
def theirs():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None,
                                                   torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small_enough():
    size = sum(p.stat().st_size for p in MODEL.rglob("*") if p.is_file())
    assert size < 32 * 2**20, f"{size / 2**20:.1f} MiB"


@pytest.mark.parametrize("prompt, negative", [
    (EXAMPLE_PROMPT, ""),
    ("a large red heart, white background", "a small blue circle, black background"),
])
def test_final_latents_equal_diffusers(ours, theirs, prompt, negative):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    mine = ours(prompt, negative, num_inference_steps=8, guidance_scale=4.0,
                latents=noise, output_type="latent", progress=False)
    reference = theirs(prompt, negative_prompt=negative, num_inference_steps=8, height=64,
                       width=64, guidance_scale=4.0, latents=noise,
                       output_type="latent").images
    assert relative_error(mine, reference) < 1e-4
    other = ours("a rocket", num_inference_steps=8, guidance_scale=4.0, latents=noise,
                 output_type="latent", progress=False)
    assert relative_error(other, reference) > 0.1  # the prompt does matter


def test_diffusers_other_pipelines_open_it_too():
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    for pipeline in (StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline):
        theirs = pipeline.from_pretrained(MODEL, safety_checker=None)
        assert theirs.unet.config.in_channels == 4


def test_transformers_reads_the_image_encoder():
    from transformers import CLIPVisionModelWithProjection

    from sdlib.clip import load_clip

    clip = load_clip(MODEL)
    reference = CLIPVisionModelWithProjection.from_pretrained(
        MODEL / "image_encoder", dtype=torch.float32).eval()
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error(clip.encode_image(pixels),
                              reference(pixel_values=pixels).image_embeds) < 1e-5


def test_the_command_paints_a_png_with_its_parameters(tmp_path):
    out = tmp_path / "fox.png"
    result = subprocess.run(
        [sys.executable, "-m", "sdlib.pipeline", EXAMPLE_PROMPT, "--seed", "7", "--steps",
         "4", "--device", "cpu", "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "painted in" in result.stdout
    image = Image.open(out)
    assert image.size == (64, 64)
    kept = " ".join(f"{k}={v}" for k, v in image.text.items())
    for word in (EXAMPLE_PROMPT, "7", "4", "emoji-sd"):
        assert word in kept


def test_the_evaluation_belongs_to_this_model():
    report = json.loads((MODEL / "evaluation.json").read_text())
    card = (MODEL / "README.md").read_text()
    for part, key in (("pictures", "background"), ("pictures", "position"),
                      ("pictures", "single object"), ("pictures", "both of two objects"),
                      ("vae", "psnr"), ("clip", "right among 64")):
        assert str(report[part][key]) in card, f"the card lacks {part}: {key}"
