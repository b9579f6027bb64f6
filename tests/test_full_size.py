"""At the size of Stable Diffusion 1.5, sdlib equals diffusers and transformers.

The same comparisons as in miniature (test_unet, test_vae, test_clip, test_pipeline,
test_editing), with all 1,066,235,307 numbers random: `make test-full`. The weights are made
once, in the reference's modules; ours take over the same tensors by name, each exactly
once, so that the whole needs 4.3 GB and not twice as much. Comparisons on random weights
could be empty, so that the outputs depend on latents, time, words and on every tensor is
measured, too: faults are planted, and must be noticed.
"""

import contextlib
import dataclasses
import random
import re

import pytest
import torch
from helpers import randomize, relative_error

from sdlib.clip import CLIP, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, clip_loss
from sdlib.clip_towers import CLIPVisionModelWithProjection
from sdlib.img2img import ImageToImage
from sdlib.inpainting import Inpainting
from sdlib.pipeline import StableDiffusion
from sdlib.schedulers import DDIMConfig, DDIMScheduler, PNDMConfig, PNDMScheduler
from sdlib.storage import load_strictly
from sdlib.tokenizer import Tokenizer
from sdlib.unet import UNet2DConditionModel, UNetConfig
from sdlib.vae import AutoencoderKL, VAEConfig

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore::FutureWarning")]
PART, WHOLE = 1e-5, 1e-4
PROMPTS = ["a photograph of an astronaut riding a horse", "an oil painting of two cats"]
SEEDS = [5, 6]
SCHEDULERS = {"pndm": PNDMScheduler.from_config(PNDMConfig.sd15()),
              "ddim": DDIMScheduler.from_config(DDIMConfig.sd15())}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def equal(record_property):
    """Checks one comparison, and notes its error for the summary of the run."""
    def check(name, ours, theirs, tolerance):
        error = relative_error(ours, theirs)
        record_property(name, f"{error:.1e}")
        assert error <= tolerance, name
    return check


# The weights --------------------------------------------------------------------------

def filled(make, seed):
    """A reference made without memory, then with every tensor random."""
    with torch.device("meta"):
        model = make()
    assert not list(model.buffers()), "a buffer would stay empty"
    return randomize(model.to_empty(device="cpu"), seed)


def share(cls, config, theirs):
    """Our module around the very tensors of theirs; names and shapes must agree."""
    with torch.device("meta"):
        model = cls(config)
    load_strictly(model, theirs.state_dict(), "the reference")
    return model.eval()


@pytest.fixture(scope="module")
def theirs():
    """The reference's parts; `nine` differs from `unet` in its first layer only."""
    unet = filled(lambda: diffusers.UNet2DConditionModel.from_config(
        UNetConfig.sd15().to_dict()), 0)
    with torch.device("meta"):
        nine = diffusers.UNet2DConditionModel.from_config(UNetConfig.sd15_inpainting().to_dict())
    first = randomize(torch.nn.Conv2d(9, 320, 3), 3)
    nine.load_state_dict(unet.state_dict() | {
        "conv_in.weight": first.weight.detach(), "conv_in.bias": first.bias.detach()},
        assign=True)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        **CLIPTextConfig.sd15().to_dict()))
    return {"unet": unet, "nine": nine.eval(),
            "vae": filled(lambda: diffusers.AutoencoderKL.from_config(
                VAEConfig.sd15().to_dict()), 1),
            "text": randomize(text, 2)}


def ours(theirs, name):
    cls, config = {"unet": (UNet2DConditionModel, UNetConfig.sd15()),
                   "nine": (UNet2DConditionModel, UNetConfig.sd15_inpainting()),
                   "vae": (AutoencoderKL, VAEConfig.sd15()),
                   "text": (CLIPTextModel, CLIPTextConfig.sd15())}[name]
    return share(cls, config, theirs[name])


QUIET = re.compile(r"(conv_in|conv[12]|time_emb_proj|proj_in|proj_out|to_out\.0|ff\.net\.2"
                   r"|embeddings\..*|pre_layrnorm|out_proj|fc2)(\.(weight|bias))?$"
                   r"|(conv_shortcut|samplers\.0\.conv)\.bias$")


@contextlib.contextmanager
def quiet(model):
    """Everything that a norm reads shrunk to about 2**-9, where its eps matters."""
    parameters = [p for name, p in model.named_parameters() if QUIET.search(name)]
    assert len(parameters) > 40
    for p in parameters:
        p.data *= 2**-9
    yield
    for p in parameters:
        p.data *= 2**9  # exact


def swap_two(model, seed):
    """Two tensors of one shape change places, as a wrong line of a converter does it."""
    groups = {}
    for name, p in model.named_parameters():
        groups.setdefault(p.shape, []).append(name)
    chooser = random.Random(seed)
    names = chooser.sample(chooser.choice([g for g in groups.values() if len(g) > 1]), 2)
    places = [(model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in names]
    values = [getattr(*place) for place in places]
    for place, value in zip(places, reversed(values)):
        setattr(*place, value)
    return names


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The parts ----------------------------------------------------------------------------

@pytest.mark.parametrize("name, batch, height, width", [
    ("unet", 2, 8, 8), ("unet", 1, 13, 18), ("unet", 1, 32, 24), ("unet", 1, 64, 64),
    ("nine", 1, 13, 18)])
def test_unet(name, batch, height, width, theirs, equal):
    """Odd latents too; 64 x 64 is the size of a picture of 512 px."""
    z = noise(batch, 9 if name == "nine" else 4, height, width)
    inputs = z, torch.tensor([999, 1])[:batch], noise(batch, 77, 768, seed=2)
    equal(f"{name}, latents {height} x {width}", ours(theirs, name)(*inputs),
          theirs[name](*inputs).sample, PART)


def test_the_unet_listens(theirs, record_property):
    """Latents, time and words each change what comes out, far above the tolerance."""
    unet = ours(theirs, "unet")
    z, t, c = noise(1, 4, 8, 8), torch.tensor([500]), noise(1, 77, 768, seed=2)
    plain = unet(z, t, c)
    assert 0.1 < plain.std() < 10
    one_word = c.clone()
    one_word[:, 5] = noise(768, seed=3)
    for name, other in {"latents": unet(noise(1, 4, 8, 8, seed=4), t, c),
                        "time": unet(z, t + 20, c),
                        "words": unet(z, t, noise(1, 77, 768, seed=3)),
                        "one word": unet(z, t, one_word)}.items():
        error = relative_error(other, plain)
        record_property(f"unet, other {name}", f"{error:.1e}")
        assert error > 100 * PART, name


@pytest.mark.parametrize("batch, height, width", [(2, 64, 96), (1, 256, 192), (1, 512, 512)])
def test_vae(batch, height, width, theirs, equal):
    x = noise(batch, 3, height, width).clamp(-1, 1)
    z = noise(batch, 4, height // 8, width // 8, seed=2)
    vae, size = ours(theirs, "vae"), f"{height} x {width}"
    if height < 512:
        posterior, expected = vae.encode(x), theirs["vae"].encode(x).latent_dist
        equal(f"vae, mean of {size}", posterior.mean, expected.mean, PART)
        equal(f"vae, log-variance of {size}", posterior.logvar, expected.logvar, PART)
    equal(f"vae, decoded {size}", vae.decode(z), theirs["vae"].decode(z).sample, PART)


@pytest.mark.parametrize("skip", [0, 1])
def test_text_encoder(skip, theirs, equal):
    ids = torch.as_tensor(Tokenizer.clip()([*PROMPTS, ""]))
    states = theirs["text"](ids, output_hidden_states=True)
    expected = theirs["text"].final_layer_norm(states.hidden_states[-(skip + 1)])
    if not skip:
        assert torch.equal(expected, states.last_hidden_state)
    equal(f"text encoder, {skip} layers skipped",
          ours(theirs, "text")(ids, clip_skip=skip), expected, PART)


def run_part(name, model):
    """One small call of a part, ours or theirs."""
    if name == "text":
        out = model(torch.as_tensor(Tokenizer.clip()(PROMPTS)))
        return getattr(out, "last_hidden_state", out)
    if name == "unet":
        out = model(noise(1, 4, 8, 8), torch.tensor([500]), noise(1, 77, 768, seed=2))
        return getattr(out, "sample", out)
    posterior = model.encode(noise(1, 3, 64, 64, seed=3))
    picture = model.decode(noise(1, 4, 8, 8))
    return torch.cat([getattr(posterior, "latent_dist", posterior).mean.flatten(),
                      getattr(picture, "sample", picture).flatten()])


@pytest.mark.parametrize("name", ["unet", "vae", "text"])
def test_two_swapped_tensors_are_noticed(name, theirs, equal, record_property):
    expected = run_part(name, theirs[name])
    equal(f"{name}, nothing swapped", run_part(name, ours(theirs, name)), expected, PART)
    errors = {}
    for seed in range(6):
        spoiled = ours(theirs, name)
        names = swap_two(spoiled, seed)
        errors[" and ".join(names)] = relative_error(run_part(name, spoiled), expected)
    record_property(f"{name}, two tensors swapped: least error", f"{min(errors.values()):.1e}")
    missed = {names: error for names, error in errors.items() if not error > 10 * PART}
    assert not missed


EPS = {"unet": [("down_blocks.1.attentions.0.norm", 1e-5), ("mid_block.resnets.0.norm1", 1e-6),
                ("up_blocks.1.attentions.2.transformer_blocks.0.norm3", 1e-6),
                ("up_blocks.3.resnets.2.norm2", 1e-6), ("conv_norm_out", 1e-6)],
       "vae": [("encoder.down_blocks.2.resnets.0.norm1", 1e-5),
               ("encoder.mid_block.attentions.0.group_norm", 1e-5),
               ("decoder.mid_block.attentions.0.group_norm", 1e-5),
               ("decoder.conv_norm_out", 1e-5)],
       "text": [("encoder.layers.3.layer_norm1", 1e-6), ("final_layer_norm", 1e-6)]}


@pytest.mark.parametrize("name", EPS)
def test_the_eps_of_one_norm_is_noticed(name, theirs, equal, record_property):
    errors = {}
    with quiet(theirs[name]):
        expected = run_part(name, theirs[name])
        equal(f"{name}, quiet", run_part(name, ours(theirs, name)), expected, PART)
        for norm, eps in EPS[name]:
            spoiled = ours(theirs, name)
            spoiled.get_submodule(norm).eps = eps
            errors[norm] = relative_error(run_part(name, spoiled), expected)
    record_property(f"{name}, eps of one norm: least error", f"{min(errors.values()):.1e}")
    missed = {norm: error for norm, error in errors.items() if not error > 3 * PART}
    assert not missed


# The pipelines ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def their_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.clip().save_pretrained(folder)
    return transformers.CLIPTokenizer.from_pretrained(folder)


def picture(height, width):
    """Smooth random pictures, one per prompt."""
    g = torch.Generator().manual_seed(1)
    coarse = torch.rand(len(PROMPTS), 3, 5, 5, generator=g) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")


def hole(height, width):
    mask = torch.zeros(1, 1, height, width)
    mask[..., height // 4:height // 2 + 3, width // 3:] = 1
    return mask


KINDS = {"text": (StableDiffusion, "StableDiffusionPipeline"),
         "image": (ImageToImage, "StableDiffusionImg2ImgPipeline"),
         "mask": (Inpainting, "StableDiffusionInpaintPipeline"),
         "nine": (Inpainting, "StableDiffusionInpaintPipeline")}


def our_pipe(kind, scheduler, theirs):
    return KINDS[kind][0](ours(theirs, "nine" if kind == "nine" else "unet"),
                          ours(theirs, "vae"), ours(theirs, "text"), Tokenizer.clip(),
                          SCHEDULERS[scheduler])


def their_pipe(kind, scheduler, theirs, tokenizer):
    name = type(SCHEDULERS[scheduler]).__name__
    config = {**SCHEDULERS[scheduler].config.to_dict(), "_class_name": name}
    pipe = getattr(diffusers, KINDS[kind][1])(
        unet=theirs["nine" if kind == "nine" else "unet"], vae=theirs["vae"],
        text_encoder=theirs["text"], tokenizer=tokenizer,
        scheduler=getattr(diffusers, name).from_config(config), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe, kind, size, **options):
    """Our final latents and undecoded floats."""
    pictures = {"text": (), "image": (picture(*size),)}.get(
        kind, (picture(*size), hole(*size)))
    if kind == "text":
        options |= {"height": size[0], "width": size[1]}
    z = pipe(PROMPTS, *pictures, seed=SEEDS, progress=False, output_type="latent", **options)
    return z, pipe.decode(z)


def paint_theirs(pipe, kind, size, **options):
    if kind != "text":
        options |= {"image": (picture(*size) + 1) / 2}
    if kind in ("mask", "nine"):
        options |= {"mask_image": hole(*size)}
    if kind != "image":
        options |= {"height": size[0], "width": size[1]}
    z = pipe(PROMPTS, generator=[torch.Generator().manual_seed(s) for s in SEEDS],
             output_type="latent", **options).images
    return z, pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample


@pytest.mark.parametrize("kind, scheduler, size, options", [
    ("text", "pndm", (96, 128), dict(guidance_scale=7.5)),
    ("text", "ddim", (256, 192), dict(guidance_scale=7.5, num_inference_steps=3)),
    ("image", "pndm", (96, 128), dict(strength=0.3, guidance_scale=7.5)),
    ("image", "pndm", (96, 128), dict(strength=0.75, guidance_scale=7.5)),
    ("image", "ddim", (96, 128), dict(strength=1.0, guidance_scale=7.5)),
    ("mask", "pndm", (96, 128), dict(strength=1.0, guidance_scale=7.5)),
    ("mask", "ddim", (96, 128), dict(strength=0.75, guidance_scale=1.0)),
    ("nine", "pndm", (96, 128), dict(strength=1.0, guidance_scale=7.5)),
    ("nine", "ddim", (96, 128), dict(strength=0.75, guidance_scale=1.0)),
], ids=lambda value: None if isinstance(value, dict | tuple) else value)
def test_pipelines(kind, scheduler, size, options, theirs, their_tokenizer, equal):
    options = {"num_inference_steps": 4} | options
    z, floats = paint(our_pipe(kind, scheduler, theirs), kind, size, **options)
    expected, their_floats = paint_theirs(
        their_pipe(kind, scheduler, theirs, their_tokenizer), kind, size, **options)
    assert z.shape == (2, 4, size[0] // 8, size[1] // 8)
    assert relative_error(z[:1], z[1:]) > 0.1  # prompt and seed matter
    name = f"{kind}, {scheduler}, {size[0]} x {size[1]}, " + ", ".join(
        f"{key} {value}" for key, value in options.items() if key != "num_inference_steps")
    equal(f"{name}: latents", z, expected, WHOLE)
    equal(f"{name}: floats", floats, their_floats, WHOLE)


def test_faults_in_a_pipeline_are_noticed(theirs, their_tokenizer, record_property):
    """A swapped pair in each part, another prompt, the channels of the mask in disorder."""
    size, options = (64, 64), dict(num_inference_steps=2, guidance_scale=7.5)
    reference = their_pipe("nine", "ddim", theirs, their_tokenizer)
    expected, expected_floats = paint_theirs(reference, "nine", size, **options)
    right, floats = paint(our_pipe("nine", "ddim", theirs), "nine", size, **options)
    assert relative_error(right, expected) <= WHOLE
    assert relative_error(floats, expected_floats) <= WHOLE
    errors = {}
    for part in ("unet", "text_encoder"):
        pipe = our_pipe("nine", "ddim", theirs)
        names = swap_two(getattr(pipe, part), 7)
        z, _ = paint(pipe, "nine", size, **options)
        errors[f"{part}: {names}"] = relative_error(z, expected)
    pipe = our_pipe("nine", "ddim", theirs)
    swap_two(pipe.vae.decoder, 7)
    errors["vae"] = relative_error(pipe.decode(expected), expected_floats)
    pipe = our_pipe("nine", "ddim", theirs)
    pipe.unet.conv_in.register_forward_pre_hook(
        lambda m, inputs: (torch.cat([inputs[0][:, :4], inputs[0][:, 5:], inputs[0][:, 4:5]],
                                     dim=1),))
    errors["mask last"] = relative_error(paint(pipe, "nine", size, **options)[0], expected)
    pipe = our_pipe("nine", "ddim", theirs)
    pipe.scheduler = DDIMScheduler.from_config(
        dataclasses.replace(DDIMConfig.sd15(), steps_offset=0))
    errors["steps_offset"] = relative_error(paint(pipe, "nine", size, **options)[0], expected)
    record_property("pipeline, planted faults: least error", f"{min(errors.values()):.1e}")
    missed = {name: error for name, error in errors.items() if not error > 10 * WHOLE}
    assert not missed


# CLIP ---------------------------------------------------------------------------------

def their_clip():
    text, vision = CLIPTextConfig.sd15().to_dict(), CLIPVisionConfig.sd15().to_dict()
    return randomize(transformers.CLIPModel(transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=768)), 4)


def our_clip(reference):
    with torch.device("meta"):
        clip = CLIP(CLIPTextModel(CLIPTextConfig.sd15()),
                    CLIPVisionModelWithProjection(CLIPVisionConfig.sd15()))
    load_strictly(clip, reference.state_dict(), "the reference")
    return clip.eval()


def test_clip_vit_l_14(equal, record_property):
    """Features of texts and pictures, all states, logits and loss; planted faults."""
    reference = their_clip()
    clip = our_clip(reference)
    count = [sum(p.numel() for p in m.parameters()) for m in (
        clip.text_model, clip.vision_model, clip.visual_projection)]
    assert count[0] == 123_060_480 and count[1] + count[2] == 303_966_208
    ids = torch.as_tensor(Tokenizer.clip()([*PROMPTS, ""]))
    pixels = noise(3, 3, 224, 224)
    expected = reference(ids, pixels, return_loss=True)
    text, image = clip.encode_text(ids), clip.encode_image(pixels)
    hidden = clip.vision_model.hidden_states(pixels)
    normal = torch.nn.functional.normalize
    equal("clip, states of the pictures", hidden,
          expected.vision_model_output.last_hidden_state, PART)
    equal("clip, states of the texts", clip.text_model(ids),
          expected.text_model_output.last_hidden_state, PART)
    equal("clip, features of the texts", normal(text, dim=-1), expected.text_embeds, PART)
    equal("clip, features of the pictures", normal(image, dim=-1), expected.image_embeds, PART)
    equal("clip, text features before the norm", text,
          reference.get_text_features(ids).pooler_output, PART)
    equal("clip, picture features before the norm", image,
          reference.get_image_features(pixels).pooler_output, PART)
    equal("clip, logits", clip(ids, pixels), expected.logits_per_image, PART)
    equal("clip, loss", clip_loss(clip(ids, pixels)), expected.loss, PART)
    assert relative_error(clip(ids, noise(3, 3, 224, 224, seed=8)), clip(ids, pixels)) > 0.01

    errors = {}
    for seed in range(4):
        spoiled = our_clip(reference)
        names = swap_two(spoiled, seed)
        errors[" and ".join(names)] = relative_error(spoiled(ids, pixels),
                                                     expected.logits_per_image)
    spoiled = our_clip(reference)
    for layer in spoiled.vision_model.encoder.layers:
        layer.mlp.activation = torch.nn.functional.gelu
    errors["exact gelu"] = relative_error(spoiled(ids, pixels), expected.logits_per_image)
    with quiet(reference):
        still = reference(ids, pixels).logits_per_image
        equal("clip, quiet", our_clip(reference)(ids, pixels), still, PART)
        for norm in ("vision_model.encoder.layers.11.layer_norm2",
                     "text_model.encoder.layers.5.layer_norm1"):
            spoiled = our_clip(reference)
            spoiled.get_submodule(norm).eps = 1e-6
            errors[norm] = relative_error(spoiled(ids, pixels), still)
    record_property("clip, planted faults: least error", f"{min(errors.values()):.1e}")
    missed = {name: error for name, error in errors.items() if not error > 10 * PART}
    assert not missed
