"""Chapter 16: edited pictures equal those of diffusers; masks, sizes, errors, the command."""

import json
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers import relative_error
from PIL import Image
from test_pipeline import FOX, make_pipe

from sdlib import img2img as img2img_module
from sdlib import inpainting as inpainting_module
from sdlib.editing import main
from sdlib.images import to_tensor
from sdlib.img2img import Edit, ImageToImage, PictureLatents
from sdlib.inpainting import Inpainting, MaskedEdits
from sdlib.interpolation import Walk, lerp, slerp
from sdlib.masks import fit_mask, flatten, mask_tensor, shrink_mask
from sdlib.pipeline import StableDiffusion
from sdlib.plan import initial_noise, read_parameters, save_png
from sdlib.schedulers import (
    DDIMConfig,
    DDIMScheduler,
    DPMSolverMultistepConfig,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteConfig,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteConfig,
    EulerDiscreteScheduler,
    PNDMConfig,
    PNDMScheduler,
)

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TOLERANCE = 1e-4
PROMPTS, SEEDS = [FOX, "a pizza"], [5, 6]
SCHEDULERS = {
    "ddim": DDIMScheduler.from_config(DDIMConfig.emoji()),
    "ddim-sd15": DDIMScheduler.from_config(DDIMConfig.sd15()),
    "pndm": PNDMScheduler.from_config(PNDMConfig.sd15()),
    "euler": EulerDiscreteScheduler.from_config(EulerDiscreteConfig.sd15()),
    "dpm": DPMSolverMultistepScheduler.from_config(DPMSolverMultistepConfig.sd15()),
    "ancestral": EulerAncestralDiscreteScheduler.from_config(
        EulerAncestralDiscreteConfig.sd15()),
}
THEIRS = {"image": "StableDiffusionImg2ImgPipeline", "mask": "StableDiffusionInpaintPipeline",
          "nine": "StableDiffusionInpaintPipeline"}
OURS = {"image": ImageToImage, "mask": Inpainting, "nine": Inpainting}


@pytest.fixture(scope="module")
def pipes():
    return {channels: make_pipe(in_channels=channels) for channels in (4, 9)}


@pytest.fixture(scope="module")
def folder(pipes, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "miniature"
    pipes[4].save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(pipes, tmp_path_factory):
    """Their three pipelines, on the same weights."""
    made, parts = {}, {}
    for channels, pipe in pipes.items():
        path = tmp_path_factory.mktemp("reference") / str(channels)
        pipe.save_pretrained(path)
        parts[channels] = diffusers.StableDiffusionPipeline.from_pretrained(
            path, safety_checker=None).components
    for kind, name in THEIRS.items():
        made[kind] = getattr(diffusers, name)(
            **parts[9 if kind == "nine" else 4], requires_safety_checker=False)
        made[kind].set_progress_bar_config(disable=True)
    return made


def ours(pipes, kind, scheduler="ddim"):
    pipe = OURS[kind].from_pipe(pipes[9 if kind == "nine" else 4])
    pipe.scheduler = SCHEDULERS[scheduler]
    return pipe


def picture(height=32, width=32, count=2):
    """Smooth random pictures (count, 3, height, width) in [-1, 1]."""
    g = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 5, 5, generator=g) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")


def hole(height=32, width=32, count=1):
    mask = torch.zeros(count, 1, height, width)
    mask[..., height // 4:height // 2 + 3, width // 3:] = 1
    return mask


def ask(pipe, prompt, *pictures, **options):
    return pipe(prompt, *pictures, **({"num_inference_steps": 8, "progress": False,
                                       "output_type": "latent", "seed": SEEDS[0]} | options))


def ask_theirs(reference, scheduler, image, mask=None, **options):
    ours = SCHEDULERS[scheduler]
    name = type(ours).__name__
    reference.scheduler = getattr(diffusers, name).from_config(
        {**ours.config.to_dict(), "_class_name": name})
    generators = [torch.Generator().manual_seed(s) for s in SEEDS]
    image = (image + 1) / 2
    if mask is not None:
        options |= {"mask_image": mask, "height": image.shape[2], "width": image.shape[3]}
    return reference(PROMPTS, image=image, generator=generators, output_type="latent",
                     num_inference_steps=8, **options).images


def both(kind, scheduler, pipes, theirs, size=(32, 32), **options):
    """Our and their final latents and undecoded floats."""
    x, mask = picture(*size), hole(*size)
    pictures = (x,) if kind == "image" else (x, mask)
    expected = ask_theirs(theirs[kind], scheduler, *pictures, **options)
    with torch.no_grad():
        vae = theirs[kind].vae
        floats = vae.decode(expected / vae.config.scaling_factor).sample
    pipe = ours(pipes, kind, scheduler)
    return (ask(pipe, PROMPTS, *pictures, seed=SEEDS, **options), expected,
            ask(pipe, PROMPTS, *pictures, seed=SEEDS, output_type="pt", **options), floats)


# Parity -------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("scheduler, strength, guidance_scale, size", [
    ("ddim", 0.3, 3.0, (32, 32)), ("ddim", 0.75, 1.0, (24, 40)), ("ddim", 1.0, 3.0, (32, 32)),
    ("ddim-sd15", 1.0, 3.0, (24, 40)),
    ("pndm", 0.3, 1.0, (32, 32)), ("pndm", 0.75, 3.0, (24, 40)), ("pndm", 1.0, 3.0, (32, 32)),
    ("euler", 0.3, 3.0, (24, 40)), ("euler", 0.75, 1.0, (32, 32)), ("euler", 1.0, 3.0, (32, 32)),
    ("dpm", 0.75, 3.0, (32, 32)),
])
def test_latents_and_pictures_equal_those_of_diffusers(
        kind, scheduler, strength, guidance_scale, size, pipes, theirs):
    z, expected, floats, their_floats = both(
        kind, scheduler, pipes, theirs, size, strength=strength,
        guidance_scale=guidance_scale)
    assert relative_error(z, expected) <= TOLERANCE
    assert relative_error(floats, their_floats) <= TOLERANCE


@pytest.mark.parametrize("kind, scheduler, options", [
    ("image", "ddim", dict(eta=0.7)), ("nine", "ddim", dict(eta=0.7)),
    ("image", "ancestral", {}),
])
def test_fresh_noise_is_theirs_too(kind, scheduler, options, pipes, theirs):
    z, expected, _, _ = both(kind, scheduler, pipes, theirs, strength=0.6,
                             guidance_scale=2.0, **options)
    assert relative_error(z, expected) <= TOLERANCE


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_pillow_pictures_and_negative_prompts(kind, pipes, theirs):
    """The way of 8-bit pictures and masks into both."""
    image = Image.fromarray(np.random.default_rng(0).integers(
        0, 256, (32, 32, 3), dtype=np.uint8))
    gray = Image.fromarray((np.linspace(0, 255, 32 * 32).reshape(32, 32)).astype(np.uint8))
    pictures = (image,) if kind == "image" else (image, gray)
    names = dict(zip(("image", "mask_image"), pictures))
    if kind == "mask":
        names |= {"height": 32, "width": 32}
    reference, scheduler = theirs[kind], SCHEDULERS["ddim"]
    reference.scheduler = diffusers.DDIMScheduler.from_config(
        {**scheduler.config.to_dict(), "_class_name": "DDIMScheduler"})
    expected = reference(FOX, negative_prompt="a pizza", strength=0.6, num_inference_steps=8,
                         guidance_scale=4.0, generator=[torch.Generator().manual_seed(5)],
                         output_type="latent", **names).images
    got = ask(ours(pipes, kind), FOX, *pictures, negative_prompt="a pizza", strength=0.6,
              guidance_scale=4.0)
    assert relative_error(got, expected) <= TOLERANCE


# Strength, and what follows from it ---------------------------------------------------

def calls(pipe, *pictures, **options):
    """The timesteps at which the network is asked."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, inputs: seen.append(int(inputs[1])))
    ask(pipe, FOX, *pictures, **options)
    hook.remove()
    return seen


@pytest.mark.parametrize("steps, strength, made", [
    (8, 0.0, 0), (8, 0.12, 0), (8, 0.3, 2), (8, 0.5, 4), (8, 0.99, 7), (8, 1.0, 8),
    (100, 0.29, 28), (10, 0.7, 7), (1, 1.0, 1), (1, 0.99, 0)])
def test_number_of_steps_is_that_of_diffusers(steps, strength, made, pipes):
    pipe = ours(pipes, "image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = calls(pipe, picture(count=1), strength=strength, num_inference_steps=steps)
    assert seen == pipe.scheduler.timesteps.tolist()[steps - made:]


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_prompts_and_guidance_have_the_options_of_text_to_image(kind, pipes):
    """At strength 1 and zero terminal SNR an edit begins where text to image does."""
    pipe = ours(pipes, kind)
    plain = StableDiffusion(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer,
                            pipe.scheduler)
    pictures = (picture(count=1),) if kind == "image" else (picture(count=1), torch.ones(32, 32))
    prompt = "a (fox:1.4) to the left of a [pizza], blue background, two red hearts, a bus"
    base = dict(weighted=True, clip_skip=1, guidance_rescale=0.8, guidance_scale=6.0,
                negative_prompt="(a large owl:1.2)")
    noise, seen = second_noise(pipe, 5), []
    for options in (base, base | {"weighted": False, "negative_prompt": ""},
                    base | {"clip_skip": 0}, base | {"guidance_rescale": 0.0}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")        # without `weighted` the prompt is cut
            free = ask(plain, prompt, latents=noise, **options)
            got = ask(pipe, prompt, *pictures, strength=1.0, **options)
        assert relative_error(got, free) <= 1e-5
        seen.append(free)
    assert all(relative_error(z, seen[0]) > 0.01 for z in seen[1:])


@pytest.mark.parametrize("kind", OURS)
def test_the_safety_checker_sees_what_is_handed_out(kind, pipes):
    x, seen = picture(count=1), []
    pictures = (x,) if kind == "image" else (x, hole())
    options = dict(strength=0.5, output_type="pt")
    if kind != "image":
        options["paste_original"] = True
    plain = ask(ours(pipes, kind), FOX, *pictures, **options)

    def checker(shown):
        seen.append(shown)
        return torch.zeros_like(shown)

    with pytest.warns(UserWarning, match="replaced 1 of 1 pictures"):
        got = ask(ours(pipes, kind), FOX, *pictures, safety_checker=checker, **options)
    assert torch.equal(seen[0], plain.clamp(-1, 1)) and (got == 0).all()
    with pytest.raises(ValueError, match="the safety checker sees pictures, not latents"):
        ask(ours(pipes, kind), FOX, *pictures, safety_checker=checker)


@pytest.mark.parametrize("kind", OURS)
def test_strength_0_is_the_autoencoder(kind, pipes):
    pipe, x = ours(pipes, kind), picture(count=1)
    pictures = (x,) if kind == "image" else (x, hole())
    with torch.no_grad():
        z = pipe.vae.encode(x).sample(torch.Generator().manual_seed(5))
        assert relative_error(ask(pipe, FOX, *pictures, strength=0.0),
                              z * pipe.vae.config.scaling_factor) <= 1e-6
        got = ask(pipe, FOX, *pictures, strength=0.0, output_type="pt")
        assert relative_error(got, pipe.vae.decode(z)) <= 1e-5


def test_a_strength_of_less_than_a_step_warns(pipes):
    with pytest.warns(UserWarning, match="strength 0.1 of 8 steps is no step at all"):
        ask(ours(pipes, "image"), FOX, picture(count=1), strength=0.1)


def second_noise(pipe, seed):
    """What is drawn after the picture's encoding."""
    g = torch.Generator().manual_seed(seed)
    torch.randn(1, 4, 8, 8, generator=g)
    return initial_noise([g], (4, 8, 8))


def test_strength_1_is_text_to_image_if_no_signal_is_left(pipes):
    """With zero terminal SNR (emoji); with Stable Diffusion's noise a trace remains."""
    for scheduler, same in (("ddim", True), ("ddim-sd15", False)):
        pipe = ours(pipes, "image", scheduler)
        plain = StableDiffusion(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer,
                                pipe.scheduler)
        free = ask(plain, FOX, latents=second_noise(pipe, 5))
        error = relative_error(ask(pipe, FOX, picture(count=1), strength=1.0), free)
        assert (error <= 1e-5) is same
        # a hole as large as the picture begins with noise alone, whatever the scheduler
        pipe = ours(pipes, "mask", scheduler)
        full = ask(pipe, FOX, picture(count=1), torch.ones(32, 32))
        assert relative_error(full, free) <= 1e-5


# Masks --------------------------------------------------------------------------------

@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler"])
def test_outside_of_the_mask_the_latents_are_the_originals(scheduler, pipes):
    pipe, x = ours(pipes, "mask", scheduler), picture(count=1)
    with torch.no_grad():
        z0 = pipe.vae.encode(x).sample(torch.Generator().manual_seed(5)) * 0.7
    keep = (hole()[:, :, ::4, ::4] == 0).expand(1, 4, 8, 8)
    for strength in (0.4, 1.0):
        z = ask(pipe, FOX, x, hole(), strength=strength)
        assert relative_error(z[keep], z0[keep]) <= 1e-6
        assert relative_error(z[~keep], z0[~keep]) > 0.05
    assert relative_error(ask(pipe, FOX, x, torch.zeros(32, 32)), z0) <= 1e-6


def test_a_full_mask_is_image_to_image(pipes):
    x = picture(count=1)
    for strength in (0.3, 0.75):
        assert relative_error(ask(ours(pipes, "mask"), FOX, x, torch.ones(32, 32),
                                  strength=strength),
                              ask(ours(pipes, "image"), FOX, x, strength=strength)) <= 1e-5


def test_kept_pixels_can_be_put_back(pipes):
    image = Image.fromarray(np.random.default_rng(0).integers(
        0, 256, (32, 32, 3), dtype=np.uint8))
    mask = hole()[0, 0].numpy() > 0
    for kind in ("mask", "nine"):
        plain, pasted = (ask(ours(pipes, kind), FOX, image, hole(), output_type="pil",
                             paste_original=p)[0] for p in (False, True))
        assert (np.asarray(pasted)[~mask] == np.asarray(image)[~mask]).all()
        assert (np.asarray(plain)[~mask] != np.asarray(image)[~mask]).any()
        assert (np.asarray(pasted)[mask] == np.asarray(plain)[mask]).all()
        whole = ask(ours(pipes, kind), FOX, image, torch.zeros(32, 32), output_type="pil",
                    paste_original=True)[0]
        assert whole.tobytes() == image.tobytes()


def test_the_mask_is_cut_at_a_half(pipes):
    pipe, x = ours(pipes, "mask"), picture(count=1)
    soft = hole() * 0.2 + 0.4                     # 0.4 and 0.6
    assert torch.equal(ask(pipe, FOX, x, soft), ask(pipe, FOX, x, hole()))
    assert fit_mask(torch.tensor([[[[0.5, 0.4999]]]]), (1, 2), 1, 2, False).tolist() == [
        [[[1.0, 0.0]]]]
    gray = Image.fromarray(np.array([[127, 128]], dtype=np.uint8))
    assert fit_mask(mask_tensor(gray), (1, 2), 1, 2, False).tolist() == [[[[0.0, 1.0]]]]


def test_masks_of_all_kinds_are_one(pipes):
    gray = Image.fromarray((255 * hole()[0, 0].numpy()).astype(np.uint8))
    rgba = Image.new("RGBA", (32, 32))            # transparent: keep
    rgba.paste("white", mask=gray)
    half = gray.resize((16, 16), Image.Resampling.NEAREST)
    large = gray.resize((96, 96), Image.Resampling.NEAREST)
    wanted = hole()
    for kind in (gray, rgba, gray.convert("1"), gray.convert("RGB"), gray.convert("P"), large,
                 hole(), hole()[0], hole()[0, 0], hole().bool(), hole().double(), [gray]):
        assert torch.equal(fit_mask(mask_tensor(kind), (32, 32), 32, 32, False), wanted)
    coarse = fit_mask(mask_tensor(half), (32, 32), 32, 32, False)
    assert (coarse != wanted).float().mean() < 0.08
    with pytest.warns(UserWarning, match="mask has 16x32 pixels and the picture 32x32"):
        fit_mask(mask_tensor(gray.resize((16, 32))), (32, 32), 32, 32, False)
    assert torch.equal(shrink_mask(hole(), 4), torch.nn.functional.interpolate(
        hole(), (8, 8)))                          # as diffusers does it


def test_a_mask_that_vanishes_is_noticed(pipes):
    line = torch.zeros(32, 32)
    line[13:15] = 1
    with pytest.warns(UserWarning, match="so thin that no latent lies in it"):
        ask(ours(pipes, "mask"), FOX, picture(count=1), line, strength=0.3)


# Pictures of all kinds ----------------------------------------------------------------

def test_flatten():
    rgb = Image.new("RGB", (4, 2), (200, 100, 0))
    assert flatten(rgb).tobytes() == rgb.tobytes()
    assert flatten(rgb.convert("L")).getpixel((0, 0)) == (118,) * 3
    assert flatten(rgb.convert("P")).size == (4, 2)
    clear = Image.new("RGBA", (4, 2), (200, 100, 0, 0))
    assert flatten(clear).getpixel((0, 0)) == (255,) * 3
    assert flatten(clear, "black").getpixel((0, 0)) == (0,) * 3
    assert flatten(Image.new("LA", (2, 2), (0, 127))).getpixel((0, 0)) == (128,) * 3
    deep = Image.fromarray(np.full((2, 2), 32768, dtype=np.uint16))
    assert flatten(deep).getpixel((0, 0)) == (127,) * 3
    turned = Image.new("RGB", (4, 2))
    turned.getexif()[0x0112] = 6
    assert flatten(turned).size == (2, 4)


@pytest.mark.parametrize("size, options, result", [
    ((32, 32), {}, (32, 32)), ((35, 30), {}, (32, 28)), ((41, 24), {}, (40, 24)),
    ((64, 64), dict(height=32, width=32), (32, 32)), ((20, 90), dict(width=24), (24, 88)),
    ((16, 16), dict(height=32, width=48), (48, 32)),
])
def test_any_size_is_welcome(size, options, result, pipes):
    image = Image.effect_noise(size, 60)          # gray; (width, height)
    mask = Image.new("L", (size[0] * 2, size[1] * 2), 255)
    for kind, pictures in (("image", (image,)), ("mask", (image, mask)),
                           ("nine", (image, mask))):
        got = ask(ours(pipes, kind), FOX, *pictures, output_type="pil", strength=0.5,
                  num_inference_steps=2, **options)
        assert got[0].size == result
        values = json.loads(got[0].info["parameters"])
        assert (values["width"], values["height"]) == result and values["strength"] == 0.5


def test_margins_are_cut_without_touching_a_pixel(pipes):
    image = Image.effect_noise((35, 30), 60).convert("RGB")
    got = ask(ours(pipes, "mask"), FOX, image, Image.new("L", image.size), strength=0.5,
              output_type="pil", paste_original=True)[0]
    assert got.tobytes() == image.crop((1, 1, 33, 29)).tobytes()


def test_kinds_of_pictures_are_one(pipes, tmp_path):
    image = Image.effect_noise((32, 32), 60).convert("RGB")
    image.save(tmp_path / "a.png")
    x = to_tensor(image)
    wanted = ask(ours(pipes, "image"), FOX, image)
    for kind in (tmp_path / "a.png", str(tmp_path / "a.png"), x, x[0], [image],
                 torch.from_numpy(np.array(image)).permute(2, 0, 1)):
        assert relative_error(ask(ours(pipes, "image"), FOX, kind), wanted) <= 1e-6


def test_pictures_masks_prompts_and_seeds_go_together(pipes):
    pipe, x = ours(pipes, "mask"), picture()
    masks = torch.cat([hole(), 1 - hole()])
    together = ask(pipe, PROMPTS, x, masks, num_images_per_prompt=2, seed=3, eta=0.5)
    for k in range(4):
        alone = ask(pipe, PROMPTS[k // 2], x[k // 2], masks[k // 2], seed=3 + k, eta=0.5)
        assert relative_error(together[k:k + 1], alone) <= 1e-5
    one_prompt = ask(ours(pipes, "image"), FOX, x, seed=3)
    assert relative_error(one_prompt[1:], ask(ours(pipes, "image"), FOX, x[1], seed=4)) <= 1e-5


def test_parts_are_shared_and_precision_may_be_lower(pipes):
    pipe = pipes[4]
    for cls in (ImageToImage, Inpainting, Walk):
        shared = cls.from_pipe(pipe)
        assert all(getattr(shared, n) is getattr(pipe, n) for n in (
            "unet", "vae", "text_encoder", "tokenizer", "scheduler"))
    low = ours({4: make_pipe()}, "mask")
    for part in (low.unet, low.vae, low.text_encoder):
        part.bfloat16()
    got = ask(low, FOX, picture(count=1), hole(), strength=0.5, output_type="pt")
    assert got.dtype == torch.float32 and got.isfinite().all()


def test_callback_sees_the_blended_latents(pipes):
    seen = []
    z = ask(ours(pipes, "mask"), FOX, picture(count=1), hole(), strength=0.5,
            callback_on_step_end=lambda p, i, t, v: seen.append((i, int(t), v["latents"])))
    pipe = ours(pipes, "mask")
    assert [s[1] for s in seen] == pipe.scheduler.timesteps.tolist()[4:]
    assert torch.equal(seen[-1][2], z)


def test_png_remembers_the_edit(pipes, tmp_path):
    image = ask(ours(pipes, "image"), FOX, picture(count=1), strength=0.4,
                output_type="pil")[0]
    save_png(image, tmp_path / "a.png")
    values = read_parameters(tmp_path / "a.png")
    assert values["strength"] == 0.4 and values["seed"] == 5 and values["prompt"] == FOX


# Bad requests -------------------------------------------------------------------------

@pytest.mark.parametrize("kind, pictures, options, message", [
    ("image", (picture(count=1),), dict(strength=1.2), "strength must lie between 0 and 1"),
    ("image", (picture(count=1),), dict(strength=-0.1), "strength must lie between 0 and 1"),
    ("image", (picture(count=1),), dict(strength=math.nan), "strength must lie between"),
    ("image", (picture(count=1),), dict(height=30), "height must be a positive multiple of 4"),
    ("image", (picture(count=1),), dict(output_type="jpeg"), "use pil, pt or latent"),
    ("image", (picture(count=3),), dict(prompt=PROMPTS), "3 pictures for 2 prompts"),
    ("image", (torch.zeros(32, 32),), {}, r"shape \(3, H, W\).*not \(32, 32\)"),
    ("image", (torch.full((3, 8, 8), 255.0),), {}, r"floats in \[-1, 1\]"),
    ("image", (torch.full((3, 8, 8), math.nan),), {}, "NaN"),
    ("image", (torch.zeros(3, 3, 40),), {}, "a picture of 40x3 pixels is too small"),
    ("image", ([],), {}, "there are no pictures"),
    ("image", ([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))],), {}, "different sizes"),
    ("mask", (picture(count=1), hole(count=3)), {}, "3 masks for 1 prompts"),
    ("mask", (picture(count=1), torch.zeros(1, 3, 32, 32)), {}, "a mask as a tensor has shape"),
    ("mask", (picture(count=1), hole() * 255), {}, "values from 0 .keep. to 1 .repaint."),
    ("mask", (picture(count=1), hole().to(torch.uint8)), {}, "bool or float, not torch.uint8"),
    ("mask", (picture(count=1), hole() * math.nan), {}, "values from 0"),
])
def test_bad_requests_are_explained(kind, pictures, options, message, pipes):
    options = {"prompt": FOX} | options
    with pytest.raises(ValueError, match=message):
        ask(ours(pipes, kind), options.pop("prompt"), *pictures, **options)


def test_files_that_are_no_pictures(pipes, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(OSError, match="cannot identify image file"):
        ask(ours(pipes, "image"), FOX, tmp_path / "a.png")
    with pytest.raises(FileNotFoundError):
        ask(ours(pipes, "image"), FOX, tmp_path / "b.png")


def test_the_wrong_unet_is_recognized(pipes):
    with pytest.raises(ValueError, match="takes 9 channels.*Inpainting"):
        ask(ImageToImage.from_pipe(pipes[9]), FOX, picture(count=1))
    with pytest.raises(ValueError, match="takes 4 or 9 channels, this one 8"):
        ask(Inpainting.from_pipe(make_pipe(in_channels=8)), FOX, picture(count=1), hole())


# Between prompts and seeds ------------------------------------------------------------

def test_slerp():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 4, 16, 16, generator=g)
    assert relative_error(slerp(a, b, 0.0), a) <= 1e-6
    assert relative_error(slerp(a, b, 1.0), b) <= 1e-6
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1))[:, None, None, None]
    norms = a.flatten(1).norm(dim=1)
    for share in (0.1, 0.5, 0.8):
        x = slerp(a, b, share)
        assert relative_error(x.flatten(1).norm(dim=1), norms) <= 1e-5
        angle, whole = ((a * y).flatten(1).sum(1) / norms**2 for y in (x, b))
        assert relative_error(angle.acos(), share * whole.acos()) <= 1e-4
        assert relative_error(slerp(b, a, 1 - share), x) <= 1e-5
        short = lerp(a, b, share).flatten(1).norm(dim=1)
        assert (short < 0.95 * norms).all()
    assert torch.equal(slerp(a, a, 0.3), lerp(a, a, 0.3)) and slerp(a, b, 0.5).dtype == a.dtype
    each = slerp(a, b, torch.tensor([0.0, 0.5, 1.0]))
    assert relative_error(each[1:2], slerp(a[1:2], b[1:2], 0.5)) <= 1e-6
    with pytest.raises(ValueError, match="opposite"):
        slerp(a, -a, 0.5)


def test_a_walk_begins_and_ends_where_it_should(pipes, tmp_path):
    walk = Walk.from_pipe(pipes[4])
    plain = pipes[4]
    plain.scheduler = walk.scheduler = SCHEDULERS["ddim"]
    options = dict(num_inference_steps=3, output_type="latent", progress=False)
    z = walk((FOX, "a pizza"), (3, 9), frames=5, **options)
    assert relative_error(z[:1], plain(FOX, seed=3, **options)) <= 1e-5
    assert relative_error(z[-1:], plain("a pizza", seed=9, **options)) <= 1e-5
    still = walk(FOX, 3, frames=3, **options)
    assert relative_error(still, still[:1].expand_as(still)) <= 1e-5
    images = walk(FOX, (3, 9), frames=3, **(options | {"output_type": "pil"}))
    values = json.loads(images[1].info["parameters"])
    assert values["share"] == 0.5 and values["to_seed"] == 9 and values["seed"] == 3
    with pytest.raises(ValueError, match="a walk draws its noise from two seeds"):
        walk(FOX, 3, frames=2, latents=torch.zeros(2, 4, 8, 8), **options)
    z = walk((f"({FOX}:1.2) {FOX}", "a pizza"), 3, frames=3, weighted=True, **options)
    assert relative_error(z[-1:], plain("a pizza", seed=3, **options)) <= 1e-5
    for wrong in ((FOX, 3, 1), ((FOX,), 3, 4), (FOX, (1, 2, 3), 4)):
        with pytest.raises(ValueError, match="a walk leads from one prompt and seed"):
            walk(*wrong)


# The command --------------------------------------------------------------------------

@pytest.fixture
def files(tmp_path):
    Image.effect_noise((35, 32), 60).convert("RGBA").save(tmp_path / "in.png")
    Image.new("L", (70, 64), 255).save(tmp_path / "mask.png")
    return tmp_path


def test_command(folder, files, capsys):
    common = ["--model", str(folder), "--steps", "2", "--seed", "3", "--device", "cpu"]
    main([str(files / "in.png"), FOX, "--strength", "0.5", *common,
          "--out", str(files / "a.png")])
    printed = capsys.readouterr().out
    assert "a.png: 32x32, seed 3" in printed and "painted in" in printed
    values = read_parameters(files / "a.png")
    assert values["strength"] == 0.5 and values["prompt"] == FOX and values["seed"] == 3
    assert values["weighted"] is False and values["clip_skip"] == 0
    main([str(files / "in.png"), "a (pizza:1.2)", "--mask", str(files / "mask.png"), *common,
          "--paste-original", "--number", "2", "--out", str(files / "b.png"), "--weighted",
          "--clip-skip", "1", "--rescale", "0.5"])
    values = read_parameters(files / "b-4.png")
    assert values["weighted"] is True and values["guidance_rescale"] == 0.5
    assert values["clip_skip"] == 1
    assert values["strength"] == 1.0 and values["paste_original"] is True


def test_command_as_a_process(folder, files):
    done = subprocess.run(
        [sys.executable, "-m", "sdlib.editing", "in.png", "a pizza", "--model", str(folder),
         "--steps", "2", "--seed", "5"], capture_output=True, text=True, cwd=files)
    assert done.returncode == 0, done.stderr
    assert read_parameters(files / "a-pizza-5.png")["strength"] == 0.8


@pytest.mark.parametrize("arguments, message", [
    (["--strength", "2"], "strength must lie between 0 and 1"),
    (["--model", "nowhere"], "there is no model folder 'nowhere'"),
    (["--mask", "absent.png"], "absent.png"), (["--out", "fox.jpg"], "must name a .png"),
    (["--paste-original"], "needs a --mask"), (["--height", "31"], "positive multiple of 4")])
def test_command_explains_in_one_line(folder, files, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main([str(files / "in.png"), FOX, "--model", str(folder), *arguments])
    text = str(stopped.value.code)
    assert text.startswith("error: ") and message in text and "\n" not in text


# Planted traps ------------------------------------------------------------------------

def wrong_level(patch, pipe):
    """Known region at the level of the step just made, not the next."""
    patch.setattr(Edit, "known", lambda self, i: self.scheduler.add_noise(
        self.z0, self.noise, self.timesteps[i:i + 1]))


def never_clean(patch, pipe):
    right = Edit.known
    patch.setattr(Edit, "known", lambda self, i: right(
        self, min(i, len(self.timesteps) - 2)))


def new_noise(patch, pipe):
    right = Edit.known

    def known(self, i):
        self.noise = torch.randn(self.noise.shape, generator=torch.Generator().manual_seed(i))
        return right(self, i)
    patch.setattr(Edit, "known", known)


def swapped_mask(patch, pipe):
    patch.setattr(inpainting_module, "shrink_mask", lambda m, f: 1 - shrink_mask(m, f))


def mean_of_the_encoder(patch, pipe):
    patch.setattr(PictureLatents, "encode",
                  lambda self, x, g: self.vae.encode(x).mode() * 0.7)


def unscaled(patch, pipe):
    right = PictureLatents.encode
    patch.setattr(PictureLatents, "encode", lambda self, x, g: right(self, x, g) / 0.7)


def noise_of_the_seed_again(patch, pipe):
    """The noise drawn with the generators begun anew: correlated with the encoding."""
    def noise(generators, shape):
        return initial_noise([torch.Generator().manual_seed(s) for s in SEEDS], shape)
    patch.setattr(inpainting_module, "initial_noise", noise)
    patch.setattr(img2img_module, "initial_noise", noise)


def rounded_strength(patch, pipe):
    right = type(pipe.scheduler).steps_for
    patch.setattr(type(pipe.scheduler), "steps_for", lambda self, s: right(
        self, round(self.num_inference_steps * s) / self.num_inference_steps))


def one_step_early(patch, pipe):
    right = type(pipe.scheduler).steps_for
    patch.setattr(type(pipe.scheduler), "steps_for", lambda self, s: right(
        self, s + 1 / self.num_inference_steps))


def other_order(patch, pipe):
    right = MaskedEdits.begin

    def begin(self, *arguments):
        z, edit = right(self, *arguments)
        edit.beside = edit.beside.roll(-1, dims=1)     # masked latents, then the mask
        return z, edit
    patch.setattr(MaskedEdits, "begin", begin)


def unmasked_picture(patch, pipe):
    right = PictureLatents.encode
    pictures = []

    def encode(self, x, generators):
        pictures.append(x)
        return right(self, pictures[0], generators)
    patch.setattr(PictureLatents, "encode", encode)


@pytest.mark.parametrize("kind, trap", [
    ("mask", wrong_level), ("mask", never_clean), ("mask", new_noise), ("mask", swapped_mask),
    ("image", mean_of_the_encoder), ("image", unscaled), ("mask", unscaled),
    ("image", noise_of_the_seed_again), ("mask", noise_of_the_seed_again),
    ("image", rounded_strength), ("image", one_step_early), ("nine", other_order),
    ("nine", swapped_mask), ("nine", unmasked_picture),
], ids=lambda x: getattr(x, "__name__", x))
def test_planted_trap_is_noticed(kind, trap, pipes, theirs, monkeypatch):
    strength = 0.45 if trap is rounded_strength else 0.6
    options = dict(strength=strength, guidance_scale=2.0)
    z, expected, _, _ = both(kind, "ddim", pipes, theirs, **options)
    assert relative_error(z, expected) <= TOLERANCE
    pipe = ours(pipes, kind)
    trap(monkeypatch, pipe)
    pictures = (picture(),) if kind == "image" else (picture(), hole())
    spoiled = ask(pipe, PROMPTS, *pictures, seed=SEEDS, **options)
    assert relative_error(spoiled, expected) > 10 * TOLERANCE
