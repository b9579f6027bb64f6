"""Chapter 13: the pipeline paints what diffusers' paints, and answers bad requests."""

import copy
import json
import math
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import randomize, relative_error
from PIL import Image

from sdlib import latents as latents_module
from sdlib import pipeline as pipeline_module
from sdlib.clip import CLIPTextConfig, CLIPTextModel
from sdlib.images import to_tensor
from sdlib.parts import read_scheduler
from sdlib.pipeline import (
    StableDiffusion,
    guided_prediction,
    main,
    make_parser,
    output_paths,
    rescale_guidance,
    working_dtype,
)
from sdlib.plan import image_seeds, initial_noise, read_parameters, save_png
from sdlib.prompts import encode_prompts, expand_prompts
from sdlib.schedulers import DDIMConfig, DDIMScheduler, DDPMConfig, DDPMScheduler
from sdlib.tokenizer import Tokenizer, train_bpe
from sdlib.unet import UNet2DConditionModel, UNetConfig
from sdlib.vae import AutoencoderKL, VAEConfig

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers on steps_offset
TOLERANCE = 1e-4
FOX = "a fox to the left of a pizza, blue background"
CAPTIONS = [FOX, "two red hearts on a green background", "a large owl above a small bus",
            "a pizza", "white background", "left of", "a blue circle, purple background"]


def make_pipe(scheduler=None, in_channels=4) -> StableDiffusion:
    """A miniature model with random weights: 32 px, factor 4, 16 tokens."""
    tokenizer = Tokenizer(*train_bpe(CAPTIONS * 3, 560), model_max_length=16)
    text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                          projection_dim=16, num_hidden_layers=2, num_attention_heads=4,
                          max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id,
                          eos_token_id=tokenizer.eos_token_id,
                          pad_token_id=tokenizer.pad_token_id)
    unet = UNetConfig(sample_size=8, in_channels=in_channels, block_out_channels=(16, 32),
                      layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
                      cross_attention_dim=32,
                      down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                      up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    vae = VAEConfig(block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4,
                    sample_size=32, scaling_factor=0.7,
                    down_block_types=("DownEncoderBlock2D",) * 3,
                    up_block_types=("UpDecoderBlock2D",) * 3)
    parts = {"unet": UNet2DConditionModel(unet), "vae": AutoencoderKL(vae),
             "text_encoder": CLIPTextModel(text)}
    parts = {name: randomize(part, seed) for seed, (name, part) in enumerate(parts.items())}
    return StableDiffusion(**parts, tokenizer=tokenizer, name="miniature",
                           scheduler=scheduler or DDIMScheduler.from_config(DDIMConfig.emoji()))


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "miniature"
    pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    return load_theirs(folder)


def load_theirs(folder):
    reference = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    reference.set_progress_bar_config(disable=True)
    encoder = reference.text_encoder
    if not hasattr(encoder, "text_model"):  # diffusers 0.42 asks for it at clip_skip,
        object.__setattr__(encoder, "text_model", encoder)  # transformers 5 lacks it
    return reference


def ask(pipe, prompt=FOX, **options):
    return pipe(prompt, **({"num_inference_steps": 3, "progress": False, "seed": 0,
                            "output_type": "latent"} | options))


def ask_theirs(reference, prompt, seeds, **options):
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return reference(prompt, generator=generators, output_type="latent", **options).images


# Parity -------------------------------------------------------------------------------

SETTINGS = {
    "plain": dict(num_inference_steps=10, guidance_scale=5.0),
    "unguided": dict(num_inference_steps=6, guidance_scale=1.0),
    "negative": dict(num_inference_steps=6, guidance_scale=7.5, negative_prompt="a pizza"),
    "noisy": dict(num_inference_steps=6, guidance_scale=3.0, eta=0.7),
    "oblong": dict(num_inference_steps=4, guidance_scale=3.0, height=24, width=56),
    "two-each": dict(num_inference_steps=4, guidance_scale=3.0, num_images_per_prompt=2),
    "one-step": dict(num_inference_steps=1, guidance_scale=3.0),
    "rescaled": dict(num_inference_steps=6, guidance_scale=7.5, guidance_rescale=0.7),
    "rescaled-fully": dict(num_inference_steps=4, guidance_scale=9.0, guidance_rescale=1.0,
                           eta=0.5),
    "rescale-unguided": dict(num_inference_steps=4, guidance_scale=1.0, guidance_rescale=0.7),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_latents_and_pictures_equal_those_of_diffusers(name, pipe, theirs):
    options = SETTINGS[name]
    prompts = [FOX, ""]
    seeds = [5 + k for k in range(2 * options.get("num_images_per_prompt", 1))]
    if "negative_prompt" in options:
        options = options | {"negative_prompt": [options["negative_prompt"]] * 2}
    expected = ask_theirs(theirs, prompts, seeds, **options)
    got = ask(pipe, prompts, seed=seeds, **options)
    assert relative_error(got, expected) <= TOLERANCE
    with torch.no_grad():
        floats = theirs.vae.decode(expected / theirs.vae.config.scaling_factor).sample
    assert relative_error(ask(pipe, prompts, seed=seeds, output_type="pt", **options),
                          floats) <= TOLERANCE


@pytest.mark.parametrize("scheduler", [
    DDIMScheduler.from_config(DDIMConfig.sd15()),
    DDPMScheduler.from_config(DDPMConfig.sd15(), clip_sample=True),
    DDPMScheduler.from_config(DDPMConfig.emoji()),
], ids=["ddim-sd15", "ddpm-sd15", "ddpm-emoji"])
def test_latents_equal_with_other_schedulers(scheduler, tmp_path):
    pipe = make_pipe(scheduler)
    pipe.save_pretrained(tmp_path / "model")
    reference = load_theirs(tmp_path / "model")
    options = dict(num_inference_steps=5, guidance_scale=2.0)
    expected = ask_theirs(reference, FOX, [3], **options)
    if scheduler.config.clip_sample:  # diffusers' pipeline switches clipping off
        pipe.scheduler = DDPMScheduler.from_config(scheduler.config, clip_sample=False)
    assert relative_error(ask(pipe, seed=3, **options), expected) <= TOLERANCE


def test_a_folder_saved_by_diffusers_paints_the_same_here(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "model")
    pipe = StableDiffusion.from_pretrained(tmp_path / "model")
    assert pipe.name == "model"
    expected = ask_theirs(theirs, FOX, [1], num_inference_steps=5, guidance_scale=4.0)
    got = ask(pipe, seed=1, num_inference_steps=5, guidance_scale=4.0)
    assert relative_error(got, expected) <= TOLERANCE


def test_a_folder_made_by_their_classes_alone(pipe, theirs, tmp_path):
    """Made and filled by diffusers and transformers, with no file from sdlib's hand."""
    from transformers import CLIPTextModel as TheirText

    reference = diffusers.StableDiffusionPipeline(
        vae=randomize(diffusers.AutoencoderKL.from_config(theirs.vae.config), 7),
        unet=randomize(diffusers.UNet2DConditionModel.from_config(theirs.unet.config), 8),
        text_encoder=randomize(TheirText(theirs.text_encoder.config), 9),
        tokenizer=theirs.tokenizer, safety_checker=None, feature_extractor=None,
        scheduler=diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, steps_offset=1,
                                          beta_schedule="scaled_linear", clip_sample=False,
                                          set_alpha_to_one=False))
    reference.set_progress_bar_config(disable=True)
    reference.save_pretrained(tmp_path / "model")
    ours = StableDiffusion.from_pretrained(tmp_path / "model")
    expected = ask_theirs(reference, [FOX, "a pizza"], [1, 2], num_inference_steps=5)
    got = ask(ours, [FOX, "a pizza"], seed=[1, 2], num_inference_steps=5, guidance_scale=7.5)
    assert relative_error(got, expected) <= TOLERANCE


def test_folder_survives_a_round_trip(pipe, folder):
    again = StableDiffusion.from_pretrained(folder)
    assert again.name == "miniature"
    assert torch.equal(ask(again), ask(pipe))
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == [None, None]


@pytest.mark.parametrize("channels, kind", [(4, ""), (9, "Inpaint"), (8, "")])
def test_the_index_names_the_pipeline_of_the_unet(channels, kind, tmp_path):
    make_pipe(in_channels=channels).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == f"StableDiffusion{kind}Pipeline"
    again = StableDiffusion.from_pretrained(tmp_path)
    assert again.unet.config.in_channels == channels
    if channels == 9:
        reference = diffusers.DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
        assert isinstance(reference, diffusers.StableDiffusionInpaintPipeline)


def test_saving_over_a_folder_keeps_what_is_not_ours(pipe, folder, tmp_path):
    (tmp_path / "image_encoder").mkdir()
    (tmp_path / "README.md").write_text("a card")
    pipe.save_pretrained(tmp_path, torch.float16)
    assert (tmp_path / "README.md").exists() and (tmp_path / "image_encoder").exists()
    half = StableDiffusion.from_pretrained(tmp_path)
    assert half.unet.conv_in.weight.dtype == torch.float32
    assert 0 < relative_error(half.unet.conv_in.weight, pipe.unet.conv_in.weight) < 1e-3
    (tmp_path / "model_index.json").unlink()  # five parts without an index are welcome too
    assert torch.equal(ask(StableDiffusion.from_pretrained(tmp_path)), ask(half))


# Guidance -----------------------------------------------------------------------------

def test_one_batched_call_equals_two_calls(pipe):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 8, 8, generator=g)
    text, negative = torch.randn(2, 2, 16, 32, generator=g)
    with torch.no_grad():
        got = guided_prediction(pipe.unet, z, 500, text, negative, 6.0)
        with_text, without = pipe.unet(z, 500, text), pipe.unet(z, 500, negative)
        assert relative_error(got, without + 6.0 * (with_text - without)) <= 1e-5
        assert torch.equal(guided_prediction(pipe.unet, z, 500, text, None, 6.0), with_text)


@pytest.mark.parametrize("w, batch", [(0.0, 2), (1.0, 2), (1.001, 4), (7.5, 4)])
def test_guidance_at_most_one_is_off_at_half_the_cost(pipe, w, batch):
    seen = []
    hook = pipe.unet.conv_in.register_forward_hook(lambda m, x, y: seen.append(len(y)))
    ask(pipe, [FOX, "a pizza"], guidance_scale=w, negative_prompt="left of")
    hook.remove()
    assert seen == [batch] * 3


def test_negative_prompts(pipe):
    plain = ask(pipe)
    assert torch.equal(ask(pipe, negative_prompt=""), plain)
    assert relative_error(ask(pipe, negative_prompt="a pizza"), plain) > 0.01
    # the prompt as its own negative: guidance has nothing to pull on
    same = ask(pipe, negative_prompt=FOX, guidance_scale=9.0)
    assert relative_error(same, ask(pipe, guidance_scale=1.0)) <= 1e-4
    assert torch.equal(ask(pipe, negative_prompt="a pizza", guidance_scale=1.0),
                       ask(pipe, guidance_scale=1.0))


def test_rescaled_guidance_has_the_spread_of_the_conditional_prediction():
    g = torch.Generator().manual_seed(0)
    text, guided = torch.randn(2, 3, 4, 8, 8, generator=g) * torch.tensor([1, 2, 5.])[
        :, None, None, None]
    guided = 4 * guided + 1
    for share in (0.0, 0.3, 1.0):
        got = rescale_guidance(guided, text, share)
        spread = [x.flatten(1).std(dim=1) for x in (got, text, guided)]
        assert relative_error(spread[0], share * spread[1] + (1 - share) * spread[2]) <= 1e-5
    assert relative_error(rescale_guidance(guided.half(), text.half(), 0.7),
                          rescale_guidance(guided, text, 0.7)) < 2e-3


# Seeds, batches, kinds of output ------------------------------------------------------

def test_a_picture_depends_on_its_seed_not_on_its_batch(pipe):
    prompts = [FOX, "two red hearts on a green background", ""]
    together = ask(pipe, prompts, seed=10, eta=0.5)
    for k, prompt in enumerate(prompts):
        assert relative_error(together[k:k + 1],
                              ask(pipe, prompt, seed=10 + k, eta=0.5)) <= 1e-5
    repeated = ask(pipe, FOX, seed=[4, 4], num_images_per_prompt=2)
    assert relative_error(repeated[0], repeated[1]) <= 1e-5
    assert relative_error(ask(pipe, seed=1), ask(pipe, seed=2)) > 0.1


def test_seeds_that_are_drawn_can_be_used_again(pipe):
    first, second = ask(pipe, [FOX] * 2, seed=None, output_type="pil")
    values = [json.loads(image.info["parameters"]) for image in (first, second)]
    assert values[1]["seed"] == values[0]["seed"] + 1
    again = ask(pipe, seed=values[1]["seed"], output_type="pil")[0]
    difference = to_tensor(again) - to_tensor(second)
    assert difference.abs().max() <= 2.1 / 255  # batch of one: rounding may differ
    other = ask(pipe, seed=None, output_type="pil")[0]
    assert json.loads(other.info["parameters"])["seed"] != values[0]["seed"]


def test_noise_is_that_of_diffusers():
    from diffusers.utils.torch_utils import randn_tensor

    generators = [torch.Generator().manual_seed(s) for s in (3, 8)]
    expected = randn_tensor((2, 4, 6, 5), generator=generators)
    generators = [torch.Generator().manual_seed(s) for s in (3, 8)]
    assert torch.equal(initial_noise(generators, (4, 6, 5)), expected)


def test_kinds_of_output_agree(pipe):
    z, floats = ask(pipe), ask(pipe, output_type="pt")
    images = ask(pipe, output_type="pil")
    assert z.shape == (1, 4, 8, 8) and floats.shape == (1, 3, 32, 32)
    assert len(images) == 1 and images[0].size == (32, 32)
    assert torch.equal(pipe.decode(z), floats)
    assert (to_tensor(images) - floats.clamp(-1, 1)).abs().max() <= 1.01 / 255
    assert ask(pipe, height=24, width=40, output_type="pil")[0].size == (40, 24)


def test_given_latents_replace_the_noise(pipe):
    noise = initial_noise([torch.Generator().manual_seed(0)], (4, 8, 8))
    assert torch.equal(ask(pipe, latents=noise, seed=99), ask(pipe, seed=0))


def test_a_picture_from_given_latents_records_no_seed(pipe):
    options = dict(output_type="pil", seed=3)
    values = json.loads(ask(pipe, latents=torch.zeros(1, 4, 8, 8), **options)[0].info["parameters"])
    assert "seed" not in values and values["latents"] == "given"
    values = json.loads(ask(pipe, **options)[0].info["parameters"])
    assert values["seed"] == 3 and "latents" not in values


def half_vae(pipe, dtype, spoil=3e4):
    """The pipe with a VAE in `dtype` whose first layer leaves float16's range."""
    vae = copy.deepcopy(pipe.vae)
    with torch.no_grad():
        for parameter in vae.decoder.conv_in.parameters():  # a GroupNorm follows: in
            parameter *= spoil                              # float32 it undoes the factor
    return StableDiffusion(pipe.unet, vae.to(dtype), pipe.text_encoder, pipe.tokenizer,
                           pipe.scheduler)


def test_a_vae_that_overflows_is_repeated_in_float32(pipe):
    low = half_vae(pipe, torch.float16)
    before = copy.deepcopy(low.vae.state_dict())
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    z[1] *= 1e-4                                   # this one stays in range
    with torch.no_grad():
        assert low.vae.decode((z / 0.7).half()).isfinite().flatten(1).all(1).tolist() == [
            False, True, False]
        expected = copy.deepcopy(low.vae).float().decode(z / 0.7)
        within = low.vae.decode((z[1:2] / 0.7).half()).float()
    with pytest.warns(UserWarning, match="in torch.float16 .* 2 of 3 pictures .* float32"):
        got = low.decode(z)
    assert got.dtype == torch.float32
    assert relative_error(got[[0, 2]], expected[[0, 2]]) <= 1e-4
    assert relative_error(got[1:2], within) <= 1e-2
    after = low.vae.state_dict()
    assert all(torch.equal(before[k], after[k]) and after[k].dtype == torch.float16
               for k in before)


def test_no_warning_where_nothing_overflows_or_nothing_can_be_mended(pipe):
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        half_vae(pipe, torch.float16, 1.0).decode(z)
        half_vae(pipe, torch.float32).decode(z)
        assert not half_vae(pipe, torch.float16).decode(z * math.nan).isfinite().any()


# Safety checker -----------------------------------------------------------------------

def test_safety_checker_sees_finished_pictures_and_may_replace_them(pipe):
    seen = []

    def black_second(pictures):
        seen.append(pictures.clone())
        pictures[1] = -1                           # a copy: changing it in place is allowed
        return pictures

    options = dict(seed=1, num_images_per_prompt=3)
    plain = ask(pipe, output_type="pt", **options)
    with pytest.warns(UserWarning, match=r"replaced 1 of 3 pictures: number \[1\], from 0"):
        got = ask(pipe, output_type="pt", safety_checker=black_second, **options)
    assert seen[0].dtype == torch.float32 and torch.equal(seen[0], plain.clamp(-1, 1))
    assert (got[1] == -1).all() and torch.equal(got[[0, 2]], plain[[0, 2]])
    with pytest.warns(UserWarning, match="safety checker"):
        images = ask(pipe, output_type="pil", safety_checker=black_second, **options)
    values = [json.loads(image.info["parameters"]) for image in images]
    assert ["replaced" in v for v in values] == [False, True, False]
    assert images[1].getextrema() == ((0, 0),) * 3


def test_safety_checker_that_replaces_nothing_is_quiet(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = ask(pipe, output_type="pt", safety_checker=lambda pictures: pictures)
    assert torch.equal(got, ask(pipe, output_type="pt"))


@pytest.mark.parametrize("checker, message", [
    (lambda x: None, "must return pictures of shape .* not NoneType"),
    (lambda x: x[:, :1], r"not \(1, 1, 32, 32\)"), (lambda x: (x, [True]), "not tuple"),
    (lambda x: x * math.nan, "NaN or infinity")])
def test_a_safety_checker_that_breaks_its_contract_is_noticed(checker, message, pipe):
    with pytest.raises(ValueError, match=message):
        ask(pipe, output_type="pt", safety_checker=checker)


def test_latents_do_not_pass_a_safety_checker_unseen(pipe):
    with pytest.raises(ValueError, match="the safety checker sees pictures, not latents"):
        ask(pipe, output_type="latent", safety_checker=lambda pictures: pictures)


def test_lower_precision_stays_close(pipe):
    low = StableDiffusion(copy.deepcopy(pipe.unet).bfloat16(),
                          copy.deepcopy(pipe.vae).bfloat16(),
                          copy.deepcopy(pipe.text_encoder).bfloat16(), pipe.tokenizer,
                          pipe.scheduler)
    got = ask(low, output_type="pt")
    assert got.dtype == torch.float32
    assert relative_error(ask(low), ask(pipe)) < 0.1


# Callback and progress ----------------------------------------------------------------

def test_callback_sees_each_step_and_may_change_it(pipe):
    seen = []

    def watch(ours, i, t, values):
        assert ours is pipe
        seen.append((i, int(t), values["latents"].clone(), values["x0"]))

    z = ask(pipe, num_inference_steps=4, callback_on_step_end=watch)
    assert [s[0] for s in seen] == [0, 1, 2, 3]
    assert [s[1] for s in seen] == pipe.scheduler.timesteps.tolist()
    assert torch.equal(seen[-1][2], z)
    assert relative_error(seen[-1][3], z) <= 1e-5  # the last step ends at the estimate
    constant = ask(pipe, callback_on_step_end=lambda p, i, t, v: {
        "latents": torch.full_like(v["latents"], 2.0)})
    assert torch.equal(constant, torch.full_like(constant, 2.0))


def test_progress_bar(pipe, capsys):
    ask(pipe, progress=True)
    assert "3/3" in capsys.readouterr().err
    ask(pipe, progress=False)
    assert capsys.readouterr().err == ""


# Metadata -----------------------------------------------------------------------------

def test_png_remembers_how_it_was_painted(pipe, tmp_path):
    prompt = "a fox, \u00e9\u00df \u706b \U0001f98a\nsecond line"
    options = dict(negative_prompt="a pizza", guidance_scale=3.5, eta=0.25, seed=7,
                   num_inference_steps=4, height=24)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # strange letters make many tokens
        image = ask(pipe, prompt, output_type="pil", **options)[0]
        save_png(image, tmp_path / "new folder" / "a.png")
        values = read_parameters(tmp_path / "new folder" / "a.png")
        assert values == {"prompt": prompt, "negative_prompt": "a pizza", "seed": 7,
                          "guidance_scale": 3.5, "eta": 0.25, "steps": 4, "height": 24,
                          "width": 32, "scheduler": "DDIMScheduler", "model": "miniature",
                          "guidance_rescale": 0.0, "clip_skip": 0, "weighted": False}
        again = pipe(values["prompt"], values["negative_prompt"], values["height"],
                     values["width"], values["steps"], values["guidance_scale"],
                     eta=values["eta"], seed=values["seed"], progress=False)[0]
    assert again.tobytes() == image.tobytes()
    image.save(tmp_path / "b.png")  # Pillow 11.3 and newer keep them without save_png
    image.save(tmp_path / "b.jpg")
    assert read_parameters(tmp_path / "b.png") == values
    Image.new("RGB", (2, 2)).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match="holds no parameters"):
        read_parameters(tmp_path / "c.png")


# Prompts ------------------------------------------------------------------------------

def test_expand_prompts():
    assert expand_prompts("a") == (["a"], [""])
    assert expand_prompts(["a", "b"], "n", 2) == (["a", "a", "b", "b"], ["n"] * 4)
    assert expand_prompts(("a", ""), ["m", "n"]) == (["a", ""], ["m", "n"])


def test_encode_prompts_is_tokenizer_and_encoder(pipe):
    states = encode_prompts(pipe.tokenizer, pipe.text_encoder, [FOX, "", FOX])
    with torch.no_grad():
        direct = pipe.text_encoder(pipe.tokenizer([FOX, "", FOX]))
        earlier = pipe.text_encoder(pipe.tokenizer([FOX]), clip_skip=1)
    assert states.shape == (3, 16, 32)
    assert relative_error(states, direct) <= 1e-6
    assert relative_error(encode_prompts(pipe.tokenizer, pipe.text_encoder, [FOX],
                                         clip_skip=1), earlier) <= 1e-6


def test_empty_prompt_is_the_unguided_picture(pipe):
    assert relative_error(ask(pipe, ""), ask(pipe, "", guidance_scale=1.0)) <= 1e-4


def test_long_prompt_is_cut_and_says_what_was_lost(pipe):
    long = FOX + ", and a pizza" * 10
    with pytest.warns(UserWarning, match="this part is cut: .*pizza"):
        states = encode_prompts(pipe.tokenizer, pipe.text_encoder, [long])
    ids = pipe.tokenizer.encode(long)[:14]
    with torch.no_grad():
        kept = pipe.text_encoder(torch.tensor([[pipe.tokenizer.bos_token_id, *ids,
                                                pipe.tokenizer.eos_token_id]]))
    assert relative_error(states, kept) <= 1e-6


# Bad requests -------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    (dict(prompt=[]), "there is no prompt in the list"),
    (dict(prompt=[FOX, ""], negative_prompt=["a", "b", "c"]),
     "2 prompts but 3 negative prompts"),
    (dict(num_images_per_prompt=0), "num_images_per_prompt must be 1 or more, not 0"),
    (dict(num_inference_steps=-3), "num_inference_steps .* got -3"),
    (dict(num_inference_steps=0), "num_inference_steps .* got 0"),
    (dict(num_inference_steps=1001), "from 1 to 1000"),
    (dict(num_inference_steps=2.5), "num_inference_steps .* got 2.5"),
    (dict(height=30), "height must be a positive multiple of 4 pixels, not 30.*nearest is"),
    (dict(width=-8), "width must be a positive multiple of 4 pixels"),
    (dict(height=0), "height must be a positive multiple"),
    (dict(width=32.0), "width must be a positive multiple"),
    (dict(guidance_scale=-1.0), "guidance_scale must be a number from 0 up, not -1.0"),
    (dict(guidance_scale=math.nan), "guidance_scale must be a number"),
    (dict(eta=1.5), "eta must lie between 0 and 1"),
    (dict(guidance_rescale=1.1), "guidance_rescale must lie between 0 and 1, not 1.1"),
    (dict(guidance_rescale=-0.1), "guidance_rescale must lie between 0 and 1"),
    (dict(guidance_rescale=math.nan), "guidance_rescale must lie between 0 and 1"),
    (dict(seed=[1, 2]), "2 seeds for 1 pictures"),
    (dict(seed=-1), "whole numbers from 0"),
    (dict(output_type="jpeg"), "output_type 'jpeg': use pil, pt or latent"),
    (dict(latents=torch.zeros(1, 4, 9, 9)), r"latents must be \(1, 4, 8, 8\).*\(1, 4, 9, 9\)"),
])
def test_bad_requests_are_explained(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        ask(pipe, **options)


def test_a_prompt_must_be_text(pipe):
    with pytest.raises(TypeError, match="a prompt is a string, not int: 5"):
        ask(pipe, [FOX, 5])


def test_seeds():
    assert image_seeds(3, 2) == [3, 4]
    assert image_seeds([9, 1], 2) == [9, 1]
    assert len(set(image_seeds(None, 3))) == 3


def test_an_inpainting_unet_is_recognized():
    with pytest.raises(ValueError, match="this U-Net takes 9 channels"):
        ask(make_pipe(in_channels=9))


def test_parts_that_do_not_fit(pipe):
    other = make_pipe()
    other.tokenizer.model_max_length = 20
    with pytest.raises(ValueError, match="model_max_length .* are 20 and 16"):
        StableDiffusion(pipe.unet, pipe.vae, pipe.text_encoder, other.tokenizer,
                        pipe.scheduler)
    wide = UNet2DConditionModel(UNetConfig(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=2, cross_attention_dim=24,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2))
    with pytest.raises(ValueError, match="cross_attention_dim .* are 24 and 32"):
        StableDiffusion(wide, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler)


def test_unknown_and_foreign_folders(pipe, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder 'runwayml/sd'.*downloads"):
        StableDiffusion.from_pretrained("runwayml/sd")
    (tmp_path / "unet").mkdir()
    with pytest.raises(FileNotFoundError, match="lacks vae, text_encoder, tokenizer, sched"):
        StableDiffusion.from_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(ValueError, match="is for StableDiffusionXLPipeline"):
        StableDiffusion.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="model_index.json is not valid JSON"):
        StableDiffusion.from_pretrained(tmp_path)


def test_an_unknown_scheduler_is_replaced_with_a_warning(tmp_path):
    (tmp_path / "scheduler").mkdir()
    published = {  # scheduler_config.json of Stable Diffusion 1.5 with another name
        "_class_name": "TomorrowScheduler", "beta_end": 0.012, "beta_start": 0.00085,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "trained_betas": None}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(published))
    with pytest.warns(UserWarning, match="asks for TomorrowScheduler.*DDIM"):
        scheduler = read_scheduler(tmp_path)
    assert scheduler.config == DDIMConfig.sd15()


# The command --------------------------------------------------------------------------

@pytest.mark.parametrize("asked, dtype", [
    (["--device", "cuda"], torch.float16), (["--device", "cuda:1"], torch.float16),
    (["--device", "cpu"], torch.float32),
    (["--device", "cuda", "--dtype", "float32"], torch.float32),
    (["--device", "cpu", "--dtype", "bfloat16"], torch.bfloat16)])
def test_half_precision_is_what_a_gpu_gets_unless_asked_otherwise(asked, dtype):
    assert working_dtype(make_parser().parse_args([FOX, *asked])) == dtype


@pytest.mark.parametrize("there, dtype", [(True, torch.float16), (False, torch.float32)])
def test_half_precision_follows_the_device_that_is_found(there, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert working_dtype(make_parser().parse_args([FOX])) == dtype


def test_command_paints_and_says_how_long(folder, tmp_path, capsys):
    out = tmp_path / "fox.png"
    main([FOX, "--model", str(folder), "--seed", "3", "--steps", "2", "--guidance", "4",
          "--negative", "a pizza", "--out", str(out), "--weighted", "--clip-skip", "1",
          "--rescale", "0.5"])
    printed = capsys.readouterr().out
    assert "fox.png: 32x32, seed 3, 2 steps" in printed and "painted in" in printed
    values = read_parameters(out)
    assert values["prompt"] == FOX and values["seed"] == 3 and values["steps"] == 2
    assert values["guidance_scale"] == 4 and values["negative_prompt"] == "a pizza"
    assert values["model"] == "miniature" and values["weighted"] is True
    assert values["clip_skip"] == 1 and values["guidance_rescale"] == 0.5
    main(["a (fox", "--model", str(folder), "--seed", "3", "--steps", "2", "--out", str(out)])
    values = read_parameters(out)                  # without --weighted a prompt is literal
    assert values["prompt"] == "a (fox" and values["weighted"] is False


def test_command_as_a_process(folder, tmp_path):
    done = subprocess.run([sys.executable, "-m", "sdlib.pipeline", "a pizza", "--model",
                           str(folder), "--steps", "2", "--number", "2", "--seed", "5",
                           "--out", str(tmp_path / "p.png")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_parameters(tmp_path / "p-5.png")["seed"] == 5
    assert read_parameters(tmp_path / "p-6.png")["seed"] == 6


@pytest.mark.parametrize("arguments, message", [
    (["--model", "nowhere"], "there is no model folder 'nowhere'"),
    (["--steps", "-2"], "num_inference_steps"), (["--out", "fox.jpg"], "must name a .png"),
    (["--height", "31"], "height must be a positive multiple of 4"),
    (["--number", "0"], "num_images_per_prompt must be 1 or more"),
    (["--clip-skip", "9"], "clip_skip must be 0 to 1"),
    (["--rescale", "2"], "guidance_rescale must lie between 0 and 1"),
    (["--weighted", "--negative", "(a"], "is never closed")])
def test_command_explains_in_one_line(folder, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main([FOX, "--model", str(folder), *arguments])
    text = str(stopped.value.code)
    assert text.startswith("error: ") and message in text and "\n" not in text


def test_names_of_pictures():
    assert [str(p) for p in output_paths(None, FOX, [3])] == [
        "a-fox-to-the-left-of-a-pizza-blue-background-3.png"]
    assert str(output_paths(None, "../../etc !?", [0])[0]) == "etc-0.png"
    assert str(output_paths(None, "", [0])[0]) == "picture-0.png"
    assert str(output_paths("x/y.png", FOX, [0])[0]) == "x/y.png"


# Planted traps ------------------------------------------------------------------------

def guidance_reversed(patch, pipe):
    right = guided_prediction
    patch.setattr(pipeline_module, "guided_prediction",
                  lambda unet, z, t, text, neg, *w: right(unet, z, t, neg, text, *w))


def guidance_one_off(patch, pipe):
    right = guided_prediction  # the paper counts from the conditional side: 1 + w
    patch.setattr(pipeline_module, "guided_prediction",
                  lambda unet, z, t, text, neg, w, phi: right(
                      unet, z, t, text, neg, w + 1, phi))


def wrong_scaling(patch, pipe):
    patch.setattr(pipe, "decode", lambda z: pipe.vae.decode(z))


def no_padding(patch, pipe):
    patch.setattr(latents_module, "encode_prompts", lambda tokenizer, encoder, texts, skip:
                  encode_prompts(tokenizer, encoder, texts, skip)[:, :10])


def skipped_norm(patch, pipe):
    patch.setattr(pipe.text_encoder.final_layer_norm, "forward", lambda x: x)


def noise_of_the_batch(patch, pipe):
    patch.setattr(latents_module, "initial_noise", lambda generators, shape: torch.randn(
        (len(generators), *shape), generator=torch.Generator().manual_seed(5)))


def leading_steps(patch, pipe):
    patch.setattr(pipe, "scheduler", DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="leading"))


def rescaled(patch, pipe, rule):
    patch.setattr(pipeline_module, "rescale_guidance", rule)


def rescaled_as_a_batch(patch, pipe):
    rescaled(patch, pipe, lambda x, text, share: x * (share * text.std() / x.std() + 1 - share))


def rescaled_channel_by_channel(patch, pipe):
    rescaled(patch, pipe, lambda x, text, share: x * (1 - share + share * text.std(
        (2, 3), keepdim=True) / x.std((2, 3), keepdim=True)))


def rescaled_the_other_way(patch, pipe):
    rescaled(patch, pipe, lambda x, text, share: rescale_guidance(x, text, 1 - share))


def rescaled_and_centered(patch, pipe):
    rescaled(patch, pipe, lambda x, text, share: rescale_guidance(
        x - x.mean((1, 2, 3), keepdim=True), text, share))


def not_rescaled(patch, pipe):
    rescaled(patch, pipe, lambda x, text, share: x)


@pytest.mark.parametrize("trap", [rescaled_as_a_batch, rescaled_channel_by_channel,
                                  rescaled_the_other_way, rescaled_and_centered, not_rescaled],
                         ids=lambda trap: trap.__name__)
def test_planted_trap_of_rescaling_is_noticed(trap, pipe, theirs, monkeypatch):
    options = dict(num_inference_steps=4, guidance_scale=6.0, guidance_rescale=0.7)
    expected = ask_theirs(theirs, [FOX, "a pizza"], [5, 6], **options)
    trap(monkeypatch, pipe)
    got = ask(pipe, [FOX, "a pizza"], seed=[5, 6], **options)
    assert relative_error(got, expected) > 10 * TOLERANCE


@pytest.mark.parametrize("trap", [guidance_reversed, guidance_one_off, wrong_scaling,
                                  no_padding, skipped_norm, noise_of_the_batch,
                                  leading_steps], ids=lambda trap: trap.__name__)
def test_planted_trap_is_noticed(trap, theirs, monkeypatch):
    pipe = make_pipe()
    options = dict(num_inference_steps=4, guidance_scale=3.0)
    z = ask_theirs(theirs, [FOX, "a pizza"], [5, 6], **options)
    with torch.no_grad():
        expected = theirs.vae.decode(z / theirs.vae.config.scaling_factor).sample
        ask_ours = dict(seed=[5, 6], output_type="pt", **options)
        right = ask(pipe, [FOX, "a pizza"], **ask_ours)
        assert relative_error(right, expected) <= TOLERANCE
        trap(monkeypatch, pipe)
        spoiled = ask(pipe, [FOX, "a pizza"], **ask_ours)
    assert relative_error(spoiled, expected) > 10 * TOLERANCE
