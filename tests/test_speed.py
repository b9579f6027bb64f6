"""Painting is no slower than diffusers: 20 guided steps, the same weights, in turns."""

import statistics
import time
from pathlib import Path

import torch

from sdlib import StableDiffusion
from sdlib.scenes import EXAMPLE_PROMPT

MODEL = Path(__file__).parents[1] / "models/emoji-sd"


def test_twenty_guided_steps_take_no_longer_than_in_diffusers():
    from diffusers import StableDiffusionPipeline

    ours = StableDiffusion.from_pretrained(MODEL, device="cpu")
    theirs = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None,
                                                     torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)

    def paint_ours():
        ours(EXAMPLE_PROMPT, num_inference_steps=20, seed=0, progress=False)

    def paint_theirs():
        theirs(EXAMPLE_PROMPT, num_inference_steps=20, guidance_scale=5.0, height=64,
               width=64, generator=torch.Generator().manual_seed(0))

    seconds = {paint_ours: [], paint_theirs: []}
    for pair in range(-1, 9):  # pair -1 warms up
        for paint in (paint_ours, paint_theirs) if pair % 2 else (paint_theirs, paint_ours):
            start = time.perf_counter()
            paint()
            if pair >= 0:
                seconds[paint].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds[paint_ours], seconds[paint_theirs])]
    print(f"ours {statistics.median(seconds[paint_ours]):.2f} s, "
          f"diffusers {statistics.median(seconds[paint_theirs]):.2f} s, "
          f"median ratio {statistics.median(ratios):.3f}")
    assert statistics.median(ratios) <= 1.03
