"""Chapter 15: every layout is read and written, and no file is believed or run.

The names of the files come from the original's own procedure (tests/original.py), and from
diffusers and transformers, whose converters are the measure; never from our rules.
"""

import dataclasses
import functools
import json
import os
import pickle
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy
import original
import pytest
import torch
import yaml
from helpers import randomize, relative_error, shapes
from safetensors.torch import load_file, save_file

from sdlib import checkpoints, hub, layouts, name_rules, pickle_files
from sdlib.blueprints import Blueprint
from sdlib.checkpoints import (
    load_checkpoint,
    load_openai_clip,
    load_part,
    save_checkpoint,
    to_layout,
    wanted_parts,
)
from sdlib.clip import CLIPTextModel
from sdlib.clip_towers import CLIPTextConfig, CLIPVisionConfig
from sdlib.layouts import other_family
from sdlib.original_config import read_original_config
from sdlib.parts import Parts
from sdlib.pipeline import StableDiffusion
from sdlib.safe_reading import CheckpointError, read_safetensors, sniff
from sdlib.schedulers import DDIMScheduler
from sdlib.side_by_side import different_tensors, first_difference, side_by_side
from sdlib.tokenizer import Tokenizer
from sdlib.unet import UNet2DConditionModel, UNetConfig
from sdlib.vae import VAEConfig
from sdlib.weight_files import find_weights, read_shards, read_tensors

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
single = pytest.importorskip("diffusers.loaders.single_file_utils")

ROOT = Path(__file__).resolve().parent.parent
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
TEXT_LONG = TEXT + "transformer.text_model."
SCHEDULE = ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
            "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
            "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
            "posterior_variance", "posterior_log_variance_clipped",
            "posterior_mean_coef1", "posterior_mean_coef2")


# Miniatures ---------------------------------------------------------------------------

CONFIGS = {  # three levels, attention where SD has none
    "unet": UNetConfig(8, block_out_channels=(16, 16, 32), cross_attention_dim=24,
                       attention_head_dim=4, norm_num_groups=8, layers_per_block=1,
                       down_block_types=("DownBlock2D", "CrossAttnDownBlock2D",
                                         "CrossAttnDownBlock2D"),
                       up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D",
                                       "UpBlock2D")),
    "vae": VAEConfig(block_out_channels=(8, 16, 16), norm_num_groups=4,
                     layers_per_block=1),
    "text_encoder": CLIPTextConfig(
        vocab_size=700, hidden_size=24, intermediate_size=48, projection_dim=24,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=77)}
OTHER = CONFIGS | {  # SD's own plan, narrower: the counting must follow the config
    "unet": UNetConfig(8, block_out_channels=(16, 32, 32, 32), cross_attention_dim=24,
                       attention_head_dim=4, norm_num_groups=8),
    "vae": VAEConfig(block_out_channels=(8, 16, 32, 32), norm_num_groups=4)}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(ROOT / "models" / "emoji-sd" / "tokenizer")


@pytest.fixture(scope="module")
def plan(tokenizer):
    tokenizer.model_max_length = 77
    return Blueprint(CONFIGS, tokenizer, DDIMScheduler())


def noise(named_shapes, seed=0):
    """Random tensors, each of its own numbers."""
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=g) * 0.1 for k, s in named_shapes.items()}


@functools.cache
def unet_shapes(config, make=original.compvis_unet):
    base = config.block_out_channels[0]
    return make(config.in_channels, config.out_channels, base,
                [w // base for w in config.block_out_channels], config.layers_per_block,
                [t.startswith("Cross") for t in config.down_block_types],
                config.cross_attention_dim)


@functools.cache
def vae_shapes(config):
    base = config.block_out_channels[0]
    return original.compvis_vae(base, [w // base for w in config.block_out_channels],
                                config.layers_per_block, config.latent_channels)


@functools.cache
def text_shapes(config):
    """The names of transformers' CLIPTextModel, without the prefix of older versions."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    with torch.device("meta"):
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**values))
    return {k.removeprefix("text_model."): s for k, s in shapes(model).items()
            if not k.endswith("position_ids")}


def compvis(configs=CONFIGS, seed=0):
    """A state dict as the original would save it; the tensors are shared: no writing."""
    return dict(compvis_once(configs["unet"], configs["vae"], configs["text_encoder"], seed))


@functools.cache
def compvis_once(unet, vae, text, seed):
    configs = {"unet": unet, "vae": vae, "text_encoder": text}
    names = {UNET + k: s for k, s in unet_shapes(configs["unet"]).items()}
    names |= {VAE + k: s for k, s in vae_shapes(configs["vae"]).items()}
    names |= {TEXT_LONG + k: s for k, s in text_shapes(configs["text_encoder"]).items()}
    return noise(names, seed)


def by_diffusers(state, configs=CONFIGS):
    """What diffusers' own converters make of it."""
    unet = single.convert_ldm_unet_checkpoint(dict(state), configs["unet"].to_dict())
    vae = single.convert_ldm_vae_checkpoint(dict(state), configs["vae"].to_dict())
    text = single.convert_ldm_clip_checkpoint(dict(state))
    text = {k.removeprefix("text_model."): v for k, v in text.items()}
    return {"unet": unet, "vae": vae, "text_encoder": text}


def assert_equal(pipe, expected):
    """Every tensor, to the last bit."""
    for part, state in expected.items():
        mine = getattr(pipe, part).state_dict()
        assert mine.keys() == state.keys(), sorted(mine.keys() ^ state.keys())[:3]
        wrong = [k for k in mine if not torch.equal(mine[k], state[k])]
        assert not wrong, f"{part}: {len(wrong)} differ, for instance {wrong[0]}"


def load(path, plan, **options):
    return load_checkpoint(path, device="cpu", like=plan, **options)


# Single files -------------------------------------------------------------------------

@pytest.mark.parametrize("configs", [CONFIGS, OTHER], ids=["three-levels", "four-levels"])
@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "ckpt-bare"])
def test_single_file_equals_diffusers_conversion(tmp_path, plan, configs, kind):
    state, plan = compvis(configs), dataclasses.replace(plan, configs=configs)
    path = tmp_path / f"model.{kind[:4]}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state if kind == "ckpt-bare" else {"state_dict": state}, path)
    pipe, report = load(path, plan)
    assert isinstance(pipe, StableDiffusion)
    assert_equal(pipe, by_diffusers(state, configs))
    assert len(report.used) == len(state) == len(set(report.used.values()))
    assert not report.ignored and not report.problems()
    assert report.files[0].size == path.stat().st_size
    assert re.fullmatch("[0-9a-f]{64}", report.files[0].sha256)


@pytest.mark.parametrize("configs", [CONFIGS, OTHER], ids=["three-levels", "four-levels"])
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_saved_file_is_the_originals(tmp_path, tokenizer, configs, ending):
    """The way back: names and shapes of the original, numbers that diffusers reads back."""
    parts = {k: randomize(kind(configs[k]), i)
             for i, (k, kind) in enumerate(Parts.modules.items())}
    pipe = StableDiffusion(**parts, tokenizer=tokenizer, scheduler=DDIMScheduler())
    path = tmp_path / f"mine.{ending}"
    save_checkpoint(pipe, path)
    state, _ = read_tensors(path)
    assert shapes(state) == shapes(compvis(configs))
    assert_equal(pipe, by_diffusers(state, configs))
    again, _ = load(path, Blueprint(configs, tokenizer, DDIMScheduler()))
    assert_equal(again, {k: v.state_dict() for k, v in parts.items()})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, plan):
    pipe, _ = load(write(tmp_path / "a.safetensors", compvis()), plan)
    (tmp_path / "b.safetensors").write_bytes(b"old")

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(pipe, tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    with pytest.raises(ValueError, match="must end in .safetensors or .ckpt"):
        save_checkpoint(pipe, tmp_path / "b.bin")


def write(path, state):
    save_file(state, path)
    return path


def messy(seed=0):
    """All that a published training checkpoint has."""
    state = compvis(seed=seed)
    ema = {"model_ema." + k.removeprefix("model.").replace(".", ""): v + 1
           for k, v in state.items() if k.startswith(UNET)}
    extra = {k: torch.zeros(10) for k in SCHEDULE}
    extra |= {"model_ema.decay": torch.tensor(0.9999), "scale_factor": torch.tensor(0.18),
              "model_ema.num_updates": torch.tensor(3),
              TEXT_LONG + "embeddings.position_ids": torch.arange(77)[None],
              "first_stage_model.loss.logvar": torch.zeros(()),
              "cond_stage_model.logit_scale": torch.zeros(()),
              "embedding_manager.initial": torch.zeros(3)}
    return state, ema, extra


@pytest.fixture
def lightning():
    """A module that can be pickled by name here, and is gone afterwards."""
    path = "pytorch_lightning.callbacks.model_checkpoint"
    names = [path.rsplit(".", k)[0] for k in range(3)]
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    kind = type("ModelCheckpoint", (), {"__module__": path})
    sys.modules[path].ModelCheckpoint = kind
    yield kind
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("ema", [True, False])
def test_training_checkpoint_with_everything(tmp_path, plan, lightning, ema):
    state, averaged, extra = messy()
    made = lightning()
    made.best = 3
    torch.save({"epoch": 3, "global_step": 9, "callbacks": {lightning: {"best": made}},
                "state_dict": state | averaged | extra, "lr_schedulers": []},
               tmp_path / "full.ckpt")
    for name in [n for n in sys.modules if n.startswith("pytorch_lightning")]:
        del sys.modules[name]
    pipe, report = load(tmp_path / "full.ckpt", plan, ema=ema)
    expected = by_diffusers(state)
    if ema:
        expected["unet"] = single.convert_ldm_unet_checkpoint(
            state | averaged, CONFIGS["unet"].to_dict(), extract_ema=True)
    assert_equal(pipe, expected)
    assert set(report.ignored["no tensors"]) == {"epoch", "global_step", "callbacks",
                                                 "lr_schedulers"}
    assert report.ignored["of unknown use"] == ["embedding_manager.initial"]
    text = str(report)
    for words in ("noise schedule", "position numbers", "state of the training",
                  "projection and constants",
                  "ordinary weights" if ema else "averaged weights: not asked for"):
        assert words in text, text
    ignored = sum(len(v) for k, v in report.ignored.items() if k != "no tensors")
    assert ignored + len(report.used) == len(state | averaged | extra)


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numbers_of_numpy_beside_the_weights(tmp_path, module):
    """As the best score among Lightning's callbacks; NumPy is not asked to make them."""
    value = numpy.float64(0.25)
    name = value.__reduce__()[0].__module__.encode()
    content = pickle.dumps({"a": 1, "best": value, "again": value, "raw": b"\xff\0x"}, 2)
    assert b"_codecs\nencode" in content and b"dtype" in content
    path = archive(tmp_path / "a.ckpt", content.replace(name, module))
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        read_tensors(path)
    whole = tensor_pickle([16], [1], 16)[:-1]  # {"w": tensor} and the other dictionary
    path = archive(tmp_path / "b.ckpt", whole + text("rest")
                   + re.sub(b"^..|.$", b"", content.replace(name, module), flags=re.S) + b"s.")
    tensors, others = read_tensors(path)
    assert set(tensors) == {"w"} and others == ["rest"]


def test_incomplete_averaged_weights_are_an_error(tmp_path, plan):
    state, averaged, _ = messy()
    averaged.pop(sorted(averaged)[5])
    write(tmp_path / "a.safetensors", state | averaged)
    with pytest.raises(CheckpointError, match="missing unet"):
        load(tmp_path / "a.safetensors", plan)
    load(tmp_path / "a.safetensors", plan, ema=False)


LEFT = {"ordinary": UNET + "label_emb.0.weight",
        "averaged": "model_ema.diffusion_modellabel_emb0weight"}


@pytest.mark.parametrize("left", [["ordinary"], ["averaged"], ["averaged", "ordinary"]])
def test_a_leftover_beside_averaged_weights_is_an_error(tmp_path, plan, left):
    """Something that our U-Net does not have: it is another model, averaged or not."""
    state, averaged, extra = messy()
    state |= averaged | extra | {LEFT[x]: torch.zeros(4) for x in left}
    path = write(tmp_path / "a.safetensors", state)
    with pytest.raises(CheckpointError, match="unexpected") as caught:
        load(path, plan)
    report = caught.value.report
    assert report.problems() == [f"unexpected {LEFT[x]}" for x in reversed(left)]
    assert report.layouts["unet"] == "CompVis, averaged"
    if "ordinary" in left:
        with pytest.raises(CheckpointError, match=re.escape(LEFT["ordinary"])):
            load(path, plan, ema=False)
    else:  # the averaged weights are not asked for, whatever they are
        _, report = load(path, plan, ema=False)
        assert LEFT["averaged"] in report.ignored["averaged weights: not asked for"]


def test_ordinary_weights_without_a_twin_beside_averaged_ones(tmp_path, plan):
    """A known place is not enough: without its dots this name is that of another tensor."""
    state, averaged, _ = messy()
    state[UNET + "time.embed.0.bias"] = torch.zeros(4)
    path = write(tmp_path / "a.safetensors", state | averaged)
    with pytest.raises(CheckpointError, match=r"unexpected model\.diffusion_model\.time\."):
        load(path, plan)


def test_ordinary_weights_may_be_incomplete_beside_averaged_ones(tmp_path, plan):
    state, averaged, extra = messy()
    ordinary = [k for k in state if k.startswith(UNET)]
    for name in ordinary[3:5]:
        del state[name]
    pipe, report = load(write(tmp_path / "a.safetensors", state | averaged | extra), plan)
    reason = "ordinary weights: the averaged ones were taken"
    assert len(report.ignored[reason]) == len(ordinary) - 2
    assert len(averaged) == len(ordinary) == len(pipe.unet.state_dict())
    assert set(report.ignored["state of the training"]) == {
        "model_ema.decay", "model_ema.num_updates"}


@pytest.mark.parametrize("prefix", [TEXT_LONG, TEXT + "transformer.", "text_model.", ""])
def test_spellings_of_the_text_encoder(tmp_path, plan, prefix):
    state = {k.replace(TEXT_LONG, prefix): v for k, v in compvis().items()}
    path = write(tmp_path / "a.safetensors", state)
    pipe, _ = load(path, plan)
    expected = {k.removeprefix(TEXT_LONG): v for k, v in compvis().items()
                if k.startswith(TEXT_LONG)}
    assert_equal(pipe, {"text_encoder": expected})
    alone = {k: v for k, v in state.items() if not k.startswith((UNET, VAE))}
    part, _ = load_part("text_encoder", write(tmp_path / "b.safetensors", alone),
                        config=CONFIGS["text_encoder"])
    assert torch.equal(part.final_layer_norm.weight, expected["final_layer_norm.weight"])


def test_the_same_tensor_twice_is_an_error(tmp_path, plan):
    state = compvis()
    state[TEXT + "transformer.final_layer_norm.bias"] = torch.zeros(24)
    path = write(tmp_path / "a.safetensors", state)
    with pytest.raises(CheckpointError, match="there twice"):
        load(path, plan)


def test_inpainting_is_recognized_from_conv_in(tmp_path, plan):
    nine = CONFIGS | {"unet": dataclasses.replace(CONFIGS["unet"], in_channels=9)}
    path = write(tmp_path / "a.safetensors", compvis(nine))
    pipe, _ = load(path, plan)
    assert pipe.unet.config.in_channels == 9
    assert_equal(pipe, by_diffusers(compvis(nine), nine))
    alone = {k.removeprefix(UNET): v for k, v in compvis(nine).items()
             if k.startswith(UNET)}
    part, _ = load_part("unet", write(tmp_path / "b.safetensors", alone),
                        config=CONFIGS["unet"])
    assert part.config.in_channels == 9
    seven = compvis(CONFIGS | {"unet": dataclasses.replace(CONFIGS["unet"], in_channels=7)})
    with pytest.raises(CheckpointError, match=r"\(16, 7, 3, 3\), not \(16, 4, 3, 3\)"):
        load(write(tmp_path / "c.safetensors", seven), plan)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16,
                                    torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("wanted", [None, torch.float16, torch.bfloat16])
def test_precision_is_the_one_asked_for(tmp_path, stored, wanted):
    state = {k: v.to(stored) for k, v in noise(vae_shapes(CONFIGS["vae"])).items()}
    path = write(tmp_path / "a.safetensors", state)
    part, _ = load_part("vae", path, wanted, config=CONFIGS["vae"])
    kind = wanted or torch.float32
    assert {v.dtype for v in part.state_dict().values()} == {kind}
    expected = state["encoder.conv_in.weight"].to(kind)
    assert torch.equal(part.encoder.conv_in.weight, expected)
    assert part.encoder.conv_in.weight.requires_grad and not part.training


def test_loaded_weights_do_not_depend_on_the_file(tmp_path):
    path = write(tmp_path / "a.safetensors", noise(vae_shapes(CONFIGS["vae"])))
    part, _ = load_part("vae", path, config=CONFIGS["vae"])
    before = {k: v.clone() for k, v in part.state_dict().items()}
    path.write_bytes(b"\0" * path.stat().st_size)
    path.unlink()
    assert all(torch.equal(v, before[k]) for k, v in part.state_dict().items())
    with torch.no_grad():
        part.encoder.conv_in.weight.add_(1)


def test_checksum_is_compared(tmp_path, plan):
    path = write(tmp_path / "a.safetensors", compvis())
    good = load(path, plan)[1].files[0].sha256
    load(path, plan, sha256=good.upper())
    with pytest.raises(CheckpointError, match="does not have the SHA-256"):
        load(path, plan, sha256="0" * 64)
    with pytest.raises(ValueError, match="a folder has several"):
        load(tmp_path, plan, sha256=good)


@pytest.mark.parametrize("wanted", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [1e6, float("inf"), float("nan")])
def test_numbers_that_do_not_fit_are_refused(tmp_path, wanted, value):
    state = noise(vae_shapes(CONFIGS["vae"]))
    state["decoder.conv_in.weight"][1, 2, 0, 1] = value
    path = write(tmp_path / "a.safetensors", state)
    if value == 1e6 and wanted is not torch.float16:
        load_part("vae", path, wanted, config=CONFIGS["vae"])
    else:
        with pytest.raises(CheckpointError, match="decoder.conv_in.weight that are not"):
            load_part("vae", path, wanted, config=CONFIGS["vae"])


def test_integers_are_no_weights(tmp_path):
    state = noise(vae_shapes(CONFIGS["vae"]))
    state["decoder.conv_in.bias"] = torch.zeros(16, dtype=torch.int8)
    path = write(tmp_path / "a.safetensors", state)
    with pytest.raises(CheckpointError, match="decoder.conv_in.bias holds torch.int8"):
        load_part("vae", path, config=CONFIGS["vae"])


def test_the_emoji_model_travels(tmp_path):
    """The shipped model as one CompVis file and back: the same bits, the same picture."""
    model = ROOT / "models" / "emoji-sd"
    pipe = StableDiffusion.from_pretrained(model, device="cpu")
    save_checkpoint(pipe, tmp_path / "emoji.safetensors")
    again, _ = load(tmp_path / "emoji.safetensors", model)
    folder, _ = load_checkpoint(model, device="cpu")
    for other in (again, folder):
        assert_equal(other, {k: getattr(pipe, k).state_dict() for k in Parts.modules})
        assert other.scheduler.config == pipe.scheduler.config
        assert other.vae.config == pipe.vae.config
    options = dict(seed=3, num_inference_steps=2, progress=False, output_type="latent")
    assert torch.equal(pipe("a fox", **options), again("a fox", **options))


# Folders ------------------------------------------------------------------------------

@functools.cache
def plain_parts():
    """As `reference_parts`, made once: for reading only."""
    return reference_parts()


def reference_parts():
    unet = randomize(diffusers.UNet2DConditionModel.from_config(CONFIGS["unet"].to_dict()))
    vae = randomize(diffusers.AutoencoderKL.from_config(CONFIGS["vae"].to_dict()))
    config = CONFIGS["text_encoder"]
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    text = randomize(transformers.CLIPTextModel(transformers.CLIPTextConfig(**values)))
    return {"unet": unet, "vae": vae, "text_encoder": text}


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A model folder whose three networks the reference libraries will write."""
    return empty_folder(tmp_path / "m", tokenizer)


def empty_folder(path, tokenizer):
    tokenizer.save_pretrained(path / "tokenizer")
    DDIMScheduler().save_pretrained(path / "scheduler")
    (path / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer):
    """A folder with networks as the reference libraries write them."""
    path = empty_folder(tmp_path_factory.mktemp("written") / "m", tokenizer)
    for part, model in plain_parts().items():
        model.save_pretrained(path / part)
    return path


@pytest.fixture
def copied(written, tmp_path):
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(written, tmp_path / "m"))


def expected_of(reference, dtype=torch.float32):
    expected = {}
    for part, model in reference.items():
        state = {k.removeprefix("text_model."): v for k, v in model.state_dict().items()
                 if not k.endswith("position_ids")}
        expected[part] = {k: v.to(dtype) for k, v in state.items()}
    return expected


@pytest.mark.parametrize("options", [
    {}, {"variant": "fp16"}, {"max_shard_size": "30KB"},
    {"max_shard_size": "30KB", "variant": "fp16"}],
    ids=["plain", "fp16", "sharded", "sharded-fp16"])
def test_folder_of_the_reference_libraries(folder, options):
    reference = reference_parts()
    half = options.get("variant") == "fp16"
    for part, model in reference.items():
        (model.half() if half else model).save_pretrained(folder / part, **options)
    if options.get("max_shard_size"):
        assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    pipe, report = load_checkpoint(folder, torch.float16 if half else None, "cpu")
    assert_equal(pipe, expected_of(reference, torch.float16 if half else torch.float32))
    assert len(report.files) == len(list(folder.glob("*/*.safetensors")))
    assert not report.problems()


def test_half_precision_files_are_preferred_when_asked_for(folder):
    reference = reference_parts()
    for part, model in reference.items():
        model.save_pretrained(folder / part)
    for model in reference.values():  # other numbers in the variant
        for p in model.parameters():
            p.data = (p.data + 1).half()
    for part, model in reference.items():
        model.save_pretrained(folder / part, variant="fp16")
    full = load_checkpoint(folder, None, "cpu")[0].unet.conv_in.bias
    half = load_checkpoint(folder, torch.bfloat16, "cpu")[0].unet.conv_in.bias
    forced = load_checkpoint(folder, None, "cpu", variant="fp16")[0].unet.conv_in.bias
    assert relative_error(half, full + 1) < 0.02
    assert torch.equal(forced, reference["unet"].conv_in.bias.float())
    assert find_weights(folder / "unet", None, "").name.endswith("model.safetensors")
    with pytest.raises(FileNotFoundError, match="ema"):
        load_checkpoint(folder, None, "cpu", variant="ema")


@pytest.mark.parametrize("old_names", [True, False])
@pytest.mark.parametrize("convolutions", [True, False])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_old_folders(copied, old_names, convolutions, ending):
    """Old names, convolutions in the attention, pickled weights, text_model. prefix."""
    folder, expected = copied, expected_of(plain_parts())
    vae = dict(expected["vae"])
    for name in [k for k in vae if ".attentions." in k]:
        value = vae.pop(name)
        if convolutions and value.ndim == 2:
            value = value[:, :, None, None]
        if old_names:
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                             ("to_out.0", "proj_attn")):
                name = name.replace(f".{new}.", f".{old}.")
        vae[name] = value.contiguous()
    text = {f"text_model.{k}": v for k, v in expected["text_encoder"].items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    for part, state, stem in (("vae", vae, "diffusion_pytorch_model"),
                              ("text_encoder", text, "model")):
        (folder / part / f"{stem}.safetensors").unlink()
        if ending == "bin":
            stem = "pytorch_model" if stem == "model" else stem
            torch.save(state, folder / part / f"{stem}.bin")
        else:
            save_file(state, folder / part / f"{stem}.safetensors")
    pipe, report = load_checkpoint(folder, device="cpu")
    assert_equal(pipe, expected)
    assert sum(map(len, report.ignored.values())) == 1


def test_folders_are_written_with_matrices(tmp_path):
    """As diffusers writes them today, and in its old names; both are read back."""
    theirs, ours = plain_parts()["vae"], Parts.modules["vae"](CONFIGS["vae"])
    wanted, = wanted_parts({"vae": CONFIGS["vae"]})
    ours.load_state_dict(theirs.state_dict())
    made = to_layout(wanted, ours, "diffusers")
    assert shapes(made) == shapes(theirs)
    assert all(torch.equal(made[k], v) for k, v in theirs.state_dict().items())
    old = to_layout(wanted, ours, "diffusers, old attention")
    names = [k for k in old if re.search(r"\.(query|key|value|proj_attn)\.weight", k)]
    assert len(names) == 8 and all(old[k].ndim == 2 for k in names)
    convolutions = to_layout(wanted, ours, "CompVis, alone")
    names = [k for k in convolutions if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", k)]
    assert len(names) == 8 and all(convolutions[k].ndim == 4 for k in names)
    for state in (made, old, convolutions):
        path = write(tmp_path / "a.safetensors",
                     {k: v.contiguous() for k, v in state.items()})
        again, _ = load_part("vae", path, config=CONFIGS["vae"])
        assert not different_tensors(again, ours)


def settings(folder, part, **values):
    """A folder's JSON file with other values."""
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("spoil, words", [
    (lambda f: (f / "unet/config.json").write_text(json.dumps(
        CONFIGS["unet"].to_dict() | {"use_linear_projection": True})), "config.json.*linear"),
    (lambda f: (f / "unet/config.json").write_text(json.dumps(
        CONFIGS["unet"].to_dict() | {"layers_per_block": 10**9})), "out of all proportion"),
    (lambda f: (f / "text_encoder/config.json").write_text(json.dumps(
        {"num_hidden_layers": 10**12})), "out of all proportion"),
    (lambda f: (f / "vae/config.json").write_text('{"_class_name": "VQModel"}'), "VQModel"),
    (lambda f: (f / "vae/config.json").write_text("[" * 100_000), "config.json"),
    (lambda f: (f / "vae/config.json").unlink(), "config.json does not exist"),
    (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), "no weights"),
    (lambda f: (f / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionXLPipeline"}'), "StableDiffusionXLPipeline"),
    (lambda f: shutil.rmtree(f / "vae"), "lacks vae"),
    *[(lambda f, p=part, v=values: settings(f, p, **v), words) for part, values, words in (
        ("unet", {"block_out_channels": [-16, 16, 32]}, "out of all proportion"),
        ("unet", {"norm_num_groups": 0}, "does not describe the UNet2D"),
        ("vae", {"scaling_factor": "x"}, "'x' is no number"),
        ("text_encoder", {"max_position_embeddings": None}, "does not describe"),
        ("scheduler", {"num_train_timesteps": 10**13}, "out of all proportion"),
        ("scheduler", {"beta_start": "x"}, "does not describe the noise schedule"))],
])
def test_broken_folders_are_explained(copied, spoil, words):
    spoil(copied)
    with pytest.raises((CheckpointError, FileNotFoundError), match=words):
        load_checkpoint(copied, device="cpu")


@pytest.mark.parametrize("name", ["model_index.json", "scheduler/scheduler_config.json",
                                  "tokenizer/vocab.json", "tokenizer/tokenizer_config.json"])
def test_files_beside_the_weights_are_explained(copied, name):
    for content in (b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000):
        (copied / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="does not describe"):
            load_checkpoint(copied, device="cpu")


# OpenAI's CLIP ------------------------------------------------------------------------

def openai_pair(tmp_path, seed=0):
    theirs = randomize(original.OpenAICLIP(16, 16, 8, 32, 2, 4, 10, 60, 24, 4, 2), seed)
    text = CLIPTextConfig(vocab_size=60, hidden_size=24, intermediate_size=96,
                          projection_dim=16, num_hidden_layers=2, num_attention_heads=4,
                          max_position_embeddings=10, eos_token_id=59)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=128, projection_dim=16,
                              num_hidden_layers=2, num_attention_heads=4, image_size=16,
                              patch_size=8)
    state = theirs.state_dict() | {"input_resolution": torch.tensor(16),
                                   "context_length": torch.tensor(10),
                                   "vocab_size": torch.tensor(60)}
    torch.save(state, tmp_path / "clip.pt")
    return theirs, text, vision


def openai_inputs():
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(1, 59, (3, 10), generator=g)
    ids[:, -1] = 59
    return ids, torch.randn(3, 3, 16, 16, generator=g)


def test_openai_clip_computes_the_same(tmp_path):
    theirs, text, vision = openai_pair(tmp_path)
    clip, report = load_openai_clip(tmp_path / "clip.pt", text=text, vision=vision)
    ids, pixels = openai_inputs()
    with torch.no_grad():
        assert relative_error(clip.encode_text(ids), theirs.encode_text(ids)) < 1e-5
        assert relative_error(clip.encode_image(pixels), theirs.visual(pixels)) < 1e-5
        part, _ = load_part("text_encoder", tmp_path / "clip.pt", config=text)
        assert relative_error(part(ids), theirs.hidden(ids)) < 1e-5
    assert len(report.ignored["projection and constants of CLIP"]) == 3
    back = to_layout(layouts.Wanted("clip", None, lambda: clip), clip, "OpenAI")
    assert shapes(back) == shapes(theirs)
    assert all(torch.equal(v, back[k]) for k, v in theirs.state_dict().items())


def test_torchscript_is_not_run(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "clip.pt"))
    with pytest.raises(CheckpointError, match="TorchScript.*state_dict"):
        read_tensors(tmp_path / "clip.pt")


# Planted errors -----------------------------------------------------------------------

def changed(rules, ours, **values):
    """A copy of nested rules in which one is different."""
    out = tuple(dataclasses.replace(r, **values) if r.ours == ours
                else dataclasses.replace(r, then=changed(r.then, ours, **values))
                for r in rules)
    return out


def swapped(rules, one, other):
    by = {r.ours: r for r in rules}
    if one not in by:
        return tuple(dataclasses.replace(r, then=swapped(r.then, one, other))
                     for r in rules)
    return tuple(dataclasses.replace(by[other], ours=one) if r.ours == one else
                 dataclasses.replace(by[one], ours=other) if r.ours == other else r
                 for r in rules)


PLANTED = {
    "vae q and k": ("vae", lambda r: swapped(r, "to_q.", "to_k.")),
    "levels not mirrored": ("vae", lambda r: changed(
        r, "decoder.up_blocks.{i}.resnets.{j}.", theirs="decoder.up.{i}.block.{j}.")),
    "upsamplers not mirrored": ("vae", lambda r: changed(
        r, "decoder.up_blocks.{i}.upsamplers.0.", theirs="decoder.up.{i}.upsample.")),
    "vae middle blocks": ("vae", lambda r: changed(
        r, "encoder.mid_block.resnets.{j}.", theirs="encoder.mid.block_{j}.")),
    "attention left a convolution": ("vae", lambda r: changed(r, "to_v.", change="")),
    "unet norms": ("unet", lambda r: swapped(r, "norm1.", "norm2.")),
    "unet convolutions": ("unet", lambda r: swapped(r, "conv1.", "conv2.")),
    "middle resnets": ("unet", lambda r: swapped(r, "mid_block.resnets.0.",
                                                 "mid_block.resnets.1.")),
    "time embedding": ("unet", lambda r: swapped(r, "time_embedding.linear_1.",
                                                 "time_embedding.linear_2.")),
    "down and halve": ("unet", lambda r: changed(
        r, "down_blocks.{i}.downsamplers.0.conv.", theirs="input_blocks.{down}.0.op.")),
    "upsampler's slot": ("unet", lambda r: changed(
        r, "up_blocks.{i}.upsamplers.0.conv.", theirs="output_blocks.{double}.1.conv.")),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_rule_is_noticed(tmp_path, monkeypatch, name):
    """A wrong rule either finds nothing that fits, or gives other tensors than diffusers."""
    part, spoil = PLANTED[name]
    state = {k: v for k, v in compvis().items()
             if k.startswith({"unet": UNET, "vae": VAE}[part])}
    path = write(tmp_path / "a.safetensors", state)
    old = layouts.LAYOUTS[part]
    wrong = dataclasses.replace(old[0], rules=spoil(old[0].rules))
    assert wrong != old[0]
    monkeypatch.setitem(layouts.LAYOUTS, part, (wrong, *old[1:]))
    with pytest.raises((CheckpointError, AssertionError)):
        made, _ = load_part(part, path, config=CONFIGS[part])
        assert_equal(types.SimpleNamespace(**{part: made}),
                     {part: by_diffusers(compvis())[part]})


@pytest.mark.parametrize("spoil", [
    lambda r: changed(r, "self_attn.q_proj.", change="third 1"),
    lambda r: swapped(r, "self_attn.q_proj.", "self_attn.k_proj."),
    lambda r: swapped(r, "layer_norm1.", "layer_norm2."),
    lambda r: changed(r, "visual_projection.weight", change=""),
    lambda r: changed(r, "text_projection.weight", change="")],
    ids=["q is k", "q and k", "norms", "projection", "square projection"])
def test_planted_openai_rule_is_noticed(tmp_path, monkeypatch, spoil):
    theirs, text, vision = openai_pair(tmp_path)
    old = layouts.LAYOUTS["clip"]
    wrong = dataclasses.replace(old[0], rules=spoil(old[0].rules))
    assert wrong != old[0]
    monkeypatch.setitem(layouts.LAYOUTS, "clip", (wrong,))
    ids, pixels = openai_inputs()
    with pytest.raises((ValueError, AssertionError)), torch.no_grad():
        clip, _ = load_openai_clip(tmp_path / "clip.pt", text=text, vision=vision)
        assert relative_error(clip.encode_text(ids), theirs.encode_text(ids)) < 1e-5
        assert relative_error(clip.encode_image(pixels), theirs.visual(pixels)) < 1e-5


def test_a_square_projection_is_turned(tmp_path):
    """ViT-L/14's text projection is square: forgetting to turn it has the right shape."""
    P = torch.randn(6, 6)
    table = name_rules.make_table(["text_projection.weight"], name_rules.OPENAI_CLIP)
    (_, change), = table.values()
    u = torch.randn(2, 6)
    assert relative_error(torch.nn.functional.linear(u, name_rules.to_ours(change, P)),
                          u @ P) < 1e-5


@pytest.mark.parametrize("seed", range(12))
def test_missing_misshapen_and_unexpected_are_named(tmp_path, plan, seed):
    rng, state = random.Random(seed), compvis()
    name = rng.choice([k for k in sorted(state) if k.startswith((UNET, VAE, TEXT))])
    kind = seed % 3
    if kind == 0:
        del state[name]
        words = f"missing .*{re.escape(name)}"
    elif kind == 1:
        state[name] = torch.zeros(3, 5)
        words = rf"{re.escape(name)} has shape \(3, 5\)"
    else:
        state[name + ".more"] = torch.zeros(2)
        words = f"unexpected {re.escape(name)}.more"
    path = write(tmp_path / "a.safetensors", state)
    with pytest.raises(CheckpointError, match=words) as caught:
        load(path, plan)
    assert len(caught.value.report.problems()) == 1
    assert str(path) in str(caught.value)


# Full size, on the meta device --------------------------------------------------------

def meta(named_shapes, prefix=""):
    return {prefix + k: torch.empty(s, device="meta") for k, s in named_shapes.items()}


def full_size(nine=False):
    unet = UNetConfig.sd15_inpainting() if nine else UNetConfig.sd15()
    return {"unet": unet, "vae": VAEConfig.sd15(), "text_encoder": CLIPTextConfig.sd15()}


def test_names_and_shapes_at_full_size():
    """The original's 1,130 tensors, through diffusers' converters and through ours."""
    for nine in (False, True):
        configs = full_size(nine)
        state = meta(unet_shapes(configs["unet"]), UNET)
        state |= meta(vae_shapes(configs["vae"]), VAE)
        state |= meta(text_shapes(configs["text_encoder"]), TEXT_LONG)
        assert len(state) == 686 + 248 + 196 == 1130
        total = sum(v.numel() for v in state.values())
        assert total == 1_066_235_307 + nine * (859_535_364 - 859_520_964)
        reference = by_diffusers(state, configs)
        for wanted in wanted_parts(configs):
            found = layouts.choose(wanted, state, ema=True)
            assert found.layout.name == "CompVis"
            assert not found.missing and not found.misshapen
            assert shapes(reference[wanted.part]) == wanted.shapes
            back = to_layout(wanted, wanted.shell, "CompVis")
            prefix = {"unet": UNET, "vae": VAE, "text_encoder": TEXT_LONG}[wanted.part]
            assert shapes(back) == {k: tuple(v.shape) for k, v in state.items()
                                    if k.startswith(prefix)}


def test_each_name_goes_where_diffusers_sends_it_at_full_size():
    """Not shapes alone: the very tensor objects, one by one."""
    configs = full_size()
    state = meta(unet_shapes(configs["unet"]), UNET) | meta(vae_shapes(configs["vae"]), VAE)
    state = {k: types.SimpleNamespace(name=k, shape=v.shape, ndim=v.ndim)
             for k, v in state.items() if k.startswith(UNET)}
    unet = single.convert_ldm_unet_checkpoint(state, configs["unet"].to_dict())
    table = layouts.LAYOUTS["unet"][0].table(unet, wanted_parts(configs)[0].numbers)
    assert {k: v.name for k, v in unet.items()} == {k: v for k, (v, _) in table.items()}


def test_averaged_names_stay_different_at_full_size():
    names = unet_shapes(UNetConfig.sd15())
    assert len({n.replace(".", "") for n in names}) == 686


def test_about_forty_rules():
    def count(rules):
        return sum(1 for _ in rules)

    groups = (name_rules.UNET, name_rules.RESNET, name_rules.VAE, name_rules.VAE_RESNET,
              name_rules.VAE_ATTENTION)
    assert 30 <= sum(map(count, groups)) <= 50


# Memory -------------------------------------------------------------------------------

MEMORY = """
import ctypes, gc, re, sys, torch
from pathlib import Path
from sdlib.checkpoints import load_part
from sdlib.vae import VAEConfig

def kilobytes(what):
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

small, *large = sys.argv[1:]
load_part("vae", small, torch.float16, config=VAEConfig(block_out_channels=(32, 32)))
half = VAEConfig(block_out_channels=(64, 128, 256, 256))
for path, dtype in zip(large, (torch.float32, torch.float16)):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    start = kilobytes("VmRSS")
    part, _ = load_part("vae", path, dtype, config=half)
    weights = sum(p.numel() * p.element_size() for p in part.state_dict().values())
    print(1024 * (kilobytes("VmHWM") - start), weights)
    del part
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' accounts")
def test_peak_memory(tmp_path):
    """At most 1.3 times the final weights, in a process of its own; both kinds of files.

    Half as wide as Stable Diffusion's autoencoder, which chapter 15 itself measures.
    """
    half = VAEConfig(block_out_channels=(64, 128, 256, 256))
    small = noise(vae_shapes(VAEConfig(block_out_channels=(32, 32))))
    large = {k: torch.full(s, 0.1) for k, s in vae_shapes(half).items()}
    paths = [write(tmp_path / "small.safetensors", small),
             write(tmp_path / "large.safetensors", large), tmp_path / "large.ckpt"]
    torch.save({"state_dict": large}, paths[2])
    done = subprocess.run([sys.executable, "-c", MEMORY, *map(str, paths)],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    for line, size in zip(done.stdout.splitlines(), (4, 2), strict=True):
        peak, weights = map(int, line.split())
        assert weights == sum(v.numel() for v in large.values()) * size > 40e6
        assert 0.9 * weights < peak <= 1.3 * weights, f"{peak / weights:.2f} times"


# Other kinds of files -----------------------------------------------------------------

@pytest.mark.parametrize("names, words", [
    (["lora_unet_down_blocks_0_attentions_0.lora_down.weight"], "LoRA.*chapter 17"),
    (["unet.down_blocks.0.to_q.lora_A.weight"], "LoRA"),
    (["conditioner.embedders.0.transformer.x", UNET + "label_emb.0.0.weight"], "Diffusion XL"),
    ([TEXT + "model.transformer.resblocks.0.ln_1.weight"], "Stable Diffusion 2"),
    (["model.diffusion_model.joint_blocks.0.x"], "Stable Diffusion 3"),
    (["double_blocks.0.img_attn.norm.key_norm.scale"], "FLUX"),
    (["control_model.input_blocks.0.0.weight"], "ControlNet.*chapter 18"),
    (["emb_params"], "textual inversion"),
    (["encoder.conv_in.weight", "decoder.conv_in.weight"], "holds no unet.*load_part"),
    (["something.else"], "holds no unet and no vae and no text_encoder"),
])
def test_other_kinds_of_files(tmp_path, plan, names, words):
    path = write(tmp_path / "a.safetensors", {k: torch.zeros(8, 3, 3, 3) for k in names})
    with pytest.raises(CheckpointError, match=words) as caught:
        load(path, plan)
    assert str(path) in str(caught.value)


def test_vae_alone_is_a_part(tmp_path, plan):
    state = noise(vae_shapes(CONFIGS["vae"]))
    path = write(tmp_path / "vae.safetensors", state | {"loss.logvar": torch.zeros(())})
    with pytest.raises(CheckpointError, match="load_part"):
        load(path, plan)
    part, report = load_part("vae", path, config=CONFIGS["vae"])
    expected = single.convert_ldm_vae_checkpoint(
        {VAE + k: v for k, v in state.items()}, CONFIGS["vae"].to_dict())
    assert all(torch.equal(v, expected[k]) for k, v in part.state_dict().items())
    assert "loss of the autoencoder" in str(report)


def test_stable_diffusion_2_is_recognized_by_its_shapes(tmp_path, plan):
    wide = CONFIGS | {"unet": dataclasses.replace(CONFIGS["unet"], cross_attention_dim=32)}
    path = write(tmp_path / "a.safetensors", compvis(wide))
    with pytest.raises(CheckpointError, match=r"attn2.to_k.weight has shape \(16, 32\)"):
        load(path, plan)


@pytest.mark.parametrize("content, words", [
    (b"", "is empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    (b"<!DOCTYPE html><html>", "web page"), (b"\n <html>", "web page"),
    (b"GGUF\x03\0\0\0", "GGUF"), (b'{"a": 1}', "JSON"),
    (pickle.dumps({"a": [1.0] * 50}), "bare pickle"),
    (b"\x80\x02c__builtin__\nprint\n(X\x03\0\0\0ranR.", "bare pickle"),
    (b"hello, I am no model at all", "neither"), (b"PK", "neither"), (b"PK\x03\x04", "sound"),
    (b"\0", "neither"), (b"\xff" * 100, "neither"),
])
def test_files_that_are_something_else(tmp_path, content, words, capsys):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_tensors(path)
    assert str(path) in str(caught.value) and "ran" not in capsys.readouterr().out


def test_places_that_are_no_files(tmp_path, plan):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere.ckpt", plan)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="no ordinary file"):
        read_tensors(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="lacks"):
        load_checkpoint(tmp_path, device="cpu")


def test_original_torch_formats(tmp_path):
    """Written before PyTorch 1.6; a whole model; tensors under another key."""
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="bare pickle"):
        read_tensors(tmp_path / "old.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="asks for .*'torch.nn.modules.linear Linear'"):
        read_tensors(tmp_path / "model.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list"):
        read_tensors(tmp_path / "list.pt")
    torch.save({"params": {"a": torch.ones(2)}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no named tensors, only .*params"):
        read_tensors(tmp_path / "other.pt")
    nets = torch.nn.Linear(2, 2)
    torch.save({"state_dict": nets.state_dict(), "w": nets.weight}, tmp_path / "ok.pt")
    tensors, others = read_tensors(tmp_path / "ok.pt")
    assert set(tensors) == {"weight", "bias"} and others == ["w"]
    torch.save({"w": nets.weight, "n": 3}, tmp_path / "parameter.pt")
    assert not read_tensors(tmp_path / "parameter.pt")[0]["w"].requires_grad


# Hostile files ------------------------------------------------------------------------

GADGETS = ["os system", "posix system", "nt system", "builtins eval", "builtins exec",
           "builtins getattr", "builtins open", "builtins __import__", "builtins print",
           "builtins bytearray", "__builtin__ eval", "__builtin__ apply", "subprocess Popen",
           "subprocess check_output", "runpy run_path", "runpy _run_code", "pty spawn",
           "importlib import_module", "operator attrgetter", "operator methodcaller",
           "functools partial", "codecs decode", "types CodeType", "types FunctionType",
           "sys modules", "shutil rmtree", "webbrowser open", "socket socket",
           "pickle loads", "_pickle loads", "torch load", "torch.hub load",
           "torch.serialization load", "torch.storage _load_from_bytes", "numpy load",
           "numpy.core.multiarray _reconstruct", "pathlib Path.write_text",
           "collections Counter", "torch._utils _rebuild_tensor", "torch.nn Linear",
           "pytorch_lightning_evil Callback", "torch.jit load", "zipfile ZipFile",
           "tempfile mkstemp", "ctypes CDLL", "multiprocessing Process"]


def archive(path, data, extra=(), compress=zipfile.ZIP_STORED, storage=b"\0" * 64,
            byteorder="little"):
    """A PyTorch archive with this data.pkl."""
    with zipfile.ZipFile(path, "w", compress) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/byteorder", byteorder)
        file.writestr("archive/data/0", storage)
        file.writestr("archive/version", "3\n")
        for name, content in extra:
            file.writestr(name, content)
    return path


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def call(gadget, argument, how):
    """A pickle that imports and calls, in four ways of saying it."""
    module, name = gadget.split(" ")
    if how == "GLOBAL":
        return b"\x80\x02c%s\n%s\n(%stR." % (module.encode(), name.encode(), text(argument))
    if how == "STACK_GLOBAL":
        return (b"\x80\x04" + text(module) + text(name) + b"\x93(" + text(argument) + b"tR.")
    if how == "INST":
        return b"(" + text(argument) + b"i%s\n%s\n." % (module.encode(), name.encode())
    return (b"\x80\x02(c%s\n%s\n" % (module.encode(), name.encode()) + text(argument) + b"o.")


@pytest.mark.parametrize("how", ["GLOBAL", "STACK_GLOBAL", "INST", "OBJ"])
def test_hostile_pickles_are_refused_before_they_run(tmp_path, how):
    marker = tmp_path / "ran"
    for k, gadget in enumerate(GADGETS):
        payload = (f"open({str(marker)!r}, 'w').write('x')" if "eval" in gadget or
                   "exec" in gadget else f"touch {marker}")
        path = archive(tmp_path / f"evil-{k}.ckpt", call(gadget, payload, how))
        with pytest.raises(CheckpointError) as caught:
            pytest.fail(f"{gadget}: read {read_tensors(path)}")
        assert str(path) in str(caught.value) and not marker.exists(), gadget
        assert caught.value.reason


def tensor_pickle(size, stride, numel, key="0"):
    """{"w": tensor} with promises of any size about a storage of 64 bytes."""
    def integer(n):
        data = n.to_bytes((n.bit_length() + 8) // 8, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data

    def numbers(values):
        return b"(" + b"".join(map(integer, values)) + b"t"

    return (b"\x80\x02}" + text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n(("
            + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
            + integer(numel) + b"tQK\0" + numbers(size) + numbers(stride)
            + b"\x89ccollections\nOrderedDict\n)RtRs.")


def two_lists(path, hidden):
    """Python finds the entries of `archive`; PyTorch, by another address, one `hidden`."""
    def parts(data):
        content = archive(path, data).read_bytes()
        count, size, start = struct.unpack("<HII", content[-12:-2])
        return content[:start], content[start:-22], count

    def long_end(count, size, start):
        return b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count,
                                       size, start)

    (shown, names, count), (evil, others, _) = parts(SOUND), parts(hidden)
    moved, at = bytearray(others), 0
    while at < len(moved):
        lengths = struct.unpack("<HHH", moved[at + 28:at + 34])
        place = struct.unpack("<I", moved[at + 42:at + 46])[0] + len(shown)
        moved[at + 42:at + 46] = struct.pack("<I", place)
        at += 46 + sum(lengths)
    whole = shown + evil + moved
    address = len(whole)
    whole += long_end(count, len(moved), len(shown + evil))
    start = len(whole)
    whole += names + long_end(count, len(names), start)
    whole += b"PK\6\7" + struct.pack("<IQI", 0, address, 1) + b"PK\5\6" + struct.pack(
        "<4H2IH", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
    path.write_bytes(whole)
    return path


SOUND = tensor_pickle([4], [1], 16)
LISTS = b"\x80\x02]q\0" + b"".join(  # each twice the one before: 2^40 in 400 bytes
    b"]q%c(h%ch%ce" % (k, k - 1, k - 1) for k in range(1, 41))


@pytest.mark.parametrize("data, words", [
    (LISTS + b")R.", "it calls what is no name"), (LISTS + b")\x81.", "calls what is no name"),
    (SOUND[:-2] + b")bs.", "changes a tensor that is made"),
    (b"\x80\x02}K\1c_codecs\nencode\n(" + text("x") + text("punycode") + text("latin1")
     + b"tRs.", "encodes a text in an unusual way"),
    (b"\x80\x02}" + b"N" * 1_100_000 + b".", "more instructions than any model needs"),
    (b"\x80\x02}\x8a\x0a" + b"\1" * 10 + b"K\1s.", "a number of more than 64 bits"),
])
def test_what_pytorch_would_obey_is_refused(tmp_path, data, words):
    with pytest.raises(CheckpointError, match=words):
        read_tensors(archive(tmp_path / "a.ckpt", data))


def test_python_and_pytorch_must_find_the_same_archive(tmp_path):
    path = tmp_path / "a.ckpt"
    assert read_tensors(archive(path, SOUND))[0]["w"].shape == (4,)
    hidden = SOUND.replace(text("w"), text("v"))
    assert list(torch.load(two_lists(path, hidden))) == ["v"]
    assert b'w' in zipfile.ZipFile(path).read("archive/data.pkl")
    with pytest.raises(CheckpointError, match="its list of entries"):
        read_tensors(path)
    with pytest.raises(CheckpointError, match="2 data.pkl|one name"):
        read_tensors(archive(path, SOUND, extra=[("other/DATA.PKL", hidden)]))
    with pytest.raises(CheckpointError, match="one name"):
        read_tensors(archive(path, SOUND, extra=[("archive/DATA/0", b"")]))
    with pytest.raises(CheckpointError, match="another byte order"):
        read_tensors(archive(path, SOUND, byteorder="big"))


def test_an_ordered_dictionary_may_lie_about_its_items(tmp_path):
    data = (b"\x80\x02ccollections\nOrderedDict\n)R" + SOUND[3:-1] + b"}" + text("items")
            + b"K\3s" + text("get") + b"K\3sb.")
    assert read_tensors(archive(tmp_path / "a.ckpt", data))[0]["w"].shape == (4,)


def test_embeddings_and_old_loras_are_named(tmp_path):
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(1, 8)},
                "name": "x"}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="a textual inversion"):
        read_tensors(tmp_path / "a.pt")
    names = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor."
             "to_q_lora.down.weight"]
    assert other_family(names)[0].startswith("holds a LoRA")


def hostile_files(folder):
    """(name, file) of files that lie, explode or nest."""
    def pkl(name, data, **options):
        yield name, archive(folder / f"{name}.ckpt", data, **options)

    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield from pkl(f"bomb-{method}", b"\0" * 2_000_000, compress=method)
    yield from pkl("huge-tensor", tensor_pickle([10**6, 10**6], [10**6, 1], 10**12))
    yield from pkl("huge-storage", tensor_pickle([4], [1], 10**15))
    yield from pkl("negative", tensor_pickle([-4], [1], 16))
    yield from pkl("negative-stride", tensor_pickle([4], [-1], 16))
    yield from pkl("overflow", tensor_pickle([2**62, 4], [1, 1], 16))
    yield from pkl("no-storage", tensor_pickle([4], [1], 16, key="7"))
    yield from pkl("path-storage", tensor_pickle([4], [1], 16, key="../../../etc/passwd"))
    yield from pkl("deep-tuple", b"\x80\x02)" + b"\x85" * 300_000 + b"}h\0.")
    yield from pkl("deep-key", b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"K\x01s.")
    yield from pkl("deep-memo", b"\x80\x02)" + b"\x85q\0h\0\x86" * 50_000 + b".")
    yield from pkl("deep-list", b"\x80\x02" + b"](" * 50_000 + b"e" * 50_000 + b".")
    yield from pkl("long4", b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"1.")
    yield from pkl("long-string", b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"a.")
    yield from pkl("endless", b"\x80\x02" + b"]" * 100_000)
    yield from pkl("no-stop", b"\x80\x02}")
    yield from pkl("two-pickles", b"\x80\x02}.", extra=[("other/data.pkl", b"}.")])
    yield from pkl("persistent", b"\x80\x02" + text("evil") + b"Q.")
    yield from pkl("extension", b"\x80\x02\x82\x01.")
    yield from pkl("build", b"\x80\x02ccollections\nOrderedDict\n)R}" + text("__class__")
                   + b"K\x01sb.")
    twice, long = b"q\0h\0\x86" * 40, text("x" * 1000)  # 2^40 values in 200 bytes
    yield from pkl("double-key", b"\x80\x02})" + twice + b"K\x01s.")
    yield from pkl("double-value", b"\x80\x02}" + text("w") + b")" + twice + b"s.")
    yield from pkl("double-set-item", b"\x80\x02}(" + b")" + twice + b"K\x01u.")
    yield from pkl("set-tensor", tensor_pickle([16], [1], 16)[:-2] + b"K\0K\1ss.")
    yield from pkl("set-tensors", tensor_pickle([16], [1], 16)[:-2] + b"(K\0K\1us.")
    yield from pkl("append-tuple", b"\x80\x02})K\1as.")
    yield from pkl("punycode", b"\x80\x02}K\1c_codecs\nencode\n" + long
                   + text("punycode") + b"\x86Rs.")
    yield from pkl("codec-of-a-memo", b"\x80\x02}K\1c_codecs\nencode\nq\1h\1" + long
                   + text("hex") + b"q\2\x86R" + b"h\1" + long + b"h\2\x86Rs.")
    path = archive(folder / "huge-pickle.ckpt", b"\x80\x02" + b"N0" * 9_000_000 + b"N.")
    yield "huge-pickle", path
    plain = archive(folder / "plain.ckpt", tensor_pickle([16], [1], 16)).read_bytes()
    for name, data in (("prefix", b"#!/bin/sh\n" + plain), ("no-end", plain[:-22])):
        (folder / f"{name}.ckpt").write_bytes(data)
        yield name, folder / f"{name}.ckpt"
    raw = bytearray(plain)
    at = raw.rfind(b"PK\x01\x02")  # the directory says that the last entry is enormous
    raw[at + 20:at + 28] = struct.pack("<II", 2**32 - 2, 2**32 - 2)
    (folder / "lying-entry.ckpt").write_bytes(raw)
    yield "lying-entry", folder / "lying-entry.ckpt"
    raw = bytearray(plain)
    raw[at + 42:at + 46] = struct.pack("<I", 0)  # two entries at one place
    (folder / "overlap.ckpt").write_bytes(raw)
    yield "overlap", folder / "overlap.ckpt"


def entry(dtype="F32", shape=(4,), start=0, stop=16):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


LIES = {
    "huge shape": {"a": entry(shape=(10**6, 10**6))},
    "huge and consistent": {"a": entry(shape=(10**12,), stop=4 * 10**12)},
    "overflow": {"a": entry(shape=(2**62, 2**62))},
    "negative": {"a": entry(shape=(-4,))},
    "negative offsets": {"a": entry(start=-16, stop=0)},
    "overlap": {"a": entry(), "b": entry()},
    "gap": {"a": entry(), "b": entry(start=32, stop=48)},
    "backwards": {"a": entry(start=16, stop=0)},
    "too short": {"a": entry(shape=(3,), stop=12)},
    "too long": {"a": entry(shape=(5,), stop=20)},
    "unknown type": {"a": entry("F128")},
    "type of a list": {"a": entry(["F32"])},
    "float shape": {"a": entry(shape=(4.0,))},
    "boolean shape": {"a": entry(shape=(True, 4))},
    "string offsets": {"a": {"dtype": "F32", "shape": [4], "data_offsets": ["0", "16"]}},
    "three offsets": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
    "null": {"a": None}, "number": {"a": 3}, "list": ["a"], "string": "a",
    "many axes": {"a": entry(shape=(1,) * 500 + (4,))},
}


def with_header(path, header, body=b"\0" * 16, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def lying_headers(folder):
    for name, header in LIES.items():
        if not isinstance(header, dict):
            text = json.dumps({"x": header}).encode()
            yield name, with_header(folder / f"{name}.safetensors", text)
        else:
            yield name, with_header(folder / f"{name}.safetensors", header)
    good = json.dumps({"a": entry()}).encode()
    for name, data, length in (
            ("endless header", good, 2**63), ("long header", good, 10**9),
            ("zero header", good, 0), ("short header", good, 5),
            ("twice", b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), None),
            ("deep", b'{"a": ' + b"[" * 200_000, None), ("nan", b'{"a": NaN}', None),
            ("big integer", b'{"a": ' + b"9" * 6000 + b"}", None),
            ("surrogate", b'{"\xed\xa0\x80": 1}', None), ("cut json", good[:-3], None),
            ("huge header", b"{" + b" " * (11 * 2**20) + b"}", None)):
        yield name, with_header(folder / f"{name}.safetensors", data, length=length)


def damaged_files(folder):
    """Truncated and bit-flipped files, from seeds."""
    whole = {"safetensors": folder / "a.safetensors", "ckpt": folder / "a.ckpt"}
    state = {f"layer.{i}.weight": torch.randn(3, 4) for i in range(5)}
    save_file(state, whole["safetensors"])
    torch.save({"state_dict": state, "epoch": 3}, whole["ckpt"])
    inner = zipfile.ZipFile(whole["ckpt"]).read("a/data.pkl")
    header = int.from_bytes(whole["safetensors"].read_bytes()[:8], "little")
    for seed in range(60):
        rng = random.Random(seed)
        for kind, path in whole.items():
            data = path.read_bytes()
            cut = folder / f"cut-{seed}.{kind}"
            cut.write_bytes(data[:rng.randrange(len(data))])
            yield f"cut-{kind}-{seed}", cut
        data = bytearray(whole["safetensors"].read_bytes())
        data[rng.randrange(8 + header)] ^= 1 << rng.randrange(8)
        (folder / f"flip-{seed}.safetensors").write_bytes(data)
        yield f"flip-{seed}", folder / f"flip-{seed}.safetensors"
        data = bytearray(inner)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        yield f"pickle-{seed}", archive(folder / f"p-{seed}.ckpt", bytes(data))
        data = bytearray(whole["ckpt"].read_bytes())
        data[rng.randrange(len(data) - 700, len(data))] ^= 1 << rng.randrange(8)
        (folder / f"zip-{seed}.ckpt").write_bytes(data)
        yield f"zip-{seed}", folder / f"zip-{seed}.ckpt"


def outcome(path):
    """"read", or the one error that a broken file may give."""
    try:
        tensors, _ = read_tensors(path)
        assert all(v.numel() <= path.stat().st_size for v in tensors.values())
        return "read"
    except CheckpointError as error:
        message = str(error)
        assert str(path) in message and len(error.reason) > 8, message
        assert message.rstrip()[-1].isalnum() or message.rstrip()[-1] in ".)'", message
        return error.reason


@pytest.mark.parametrize("make, least", [(hostile_files, 25), (lying_headers, 30),
                                         (damaged_files, 300)])
def test_broken_and_hostile_files(tmp_path, make, least):
    """No code, no hang, no gigabytes; each error names the file and the reason."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total, accepted = 0, []
    for name, path in make(tmp_path):
        began = time.process_time()
        if outcome(path) == "read":
            accepted.append(name)
        assert time.process_time() - began < 10, name
        total += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert total >= least
    assert grown < 400, f"{grown:.0f} MiB"
    if make is damaged_files:  # a flipped letter in a name leaves a sound file
        assert len(accepted) < total / 4, accepted
    else:
        assert not accepted, accepted


def test_no_process_is_started_and_no_module_loaded(tmp_path):
    """As seen by Python's own audit events, in a process of its own."""
    for k, gadget in enumerate(GADGETS):
        archive(tmp_path / f"{k}.ckpt", call(gadget, "echo", "GLOBAL"))
    code = """
import sys
from pathlib import Path
from sdlib.weight_files import read_tensors
from sdlib.safe_reading import CheckpointError
import torch
seen = []
bad = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "exec", "compile",
       "pickle.find_class", "socket.connect", "os.remove", "webbrowser.open"}
torch.save({"a": torch.zeros(1)}, sys.argv[1] + "/ok.pt")
read_tensors(sys.argv[1] + "/ok.pt")
"x".encode("cp437")  # the names in old archives: Python loads this when it is needed
sys.addaudithook(lambda name, args: seen.append((name, args)) if name in bad else None)
for path in sorted(Path(sys.argv[1]).glob("*.ckpt")):
    try:
        read_tensors(path)
        print("read", path)
    except CheckpointError:
        pass
print(len(seen), seen[:1])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout.strip() == "0 []", done.stdout + done.stderr[-1500:]


def test_torch_load_is_called_with_weights_only(tmp_path, monkeypatch):
    calls, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: (calls.append(k), load(*a, **k))[1])
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    read_tensors(tmp_path / "a.pt")
    assert len(calls) == 1 and calls[0]["weights_only"] is True
    with pytest.raises(CheckpointError):
        read_tensors(archive(tmp_path / "b.pt", call("os system", "x", "GLOBAL")))
    assert len(calls) == 1, "refused before torch was asked"


def test_the_second_gate_holds_alone(tmp_path, monkeypatch):
    """If our scan saw nothing, torch would still refuse."""
    marker = tmp_path / "ran"
    monkeypatch.setattr(pickle_files, "scan_pickle", lambda data: set())
    path = archive(tmp_path / "a.ckpt", call("os system", f"touch {marker}", "GLOBAL"))
    with pytest.raises(CheckpointError, match="could not be read"):
        read_tensors(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", [
    "../secret.safetensors", "../../etc/passwd", "/etc/passwd", "a/b.safetensors",
    "..\\secret.safetensors", "C:\\x.safetensors", "C:x", "..", ".", "", ".hidden",
    "a\0b", 3, None, ["x"], {"a": 1}])
def test_shard_names_stay_in_the_folder(tmp_path, name):
    (tmp_path / "m").mkdir()
    write(tmp_path / "secret.safetensors", {"a": torch.ones(2)})
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="index"):
        read_shards(index)


@pytest.mark.parametrize("change, words", [
    (lambda v: v.update(c="two.safetensors"), "disagree about c"),
    (lambda v: v.update(a="two.safetensors"), "disagree about a"),
    (lambda v: v.pop("b"), "disagree|missing"),
    (lambda v: v.update(z="three.safetensors"), "three.safetensors, which is missing"),
])
def test_index_and_shards_must_agree(tmp_path, change, words):
    write(tmp_path / "one.safetensors", {"a": torch.ones(2), "b": torch.ones(1)})
    write(tmp_path / "two.safetensors", {"d": torch.ones(3)})
    places = {"a": "one.safetensors", "b": "one.safetensors", "d": "two.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert set(read_shards(index)[0]) == {"a", "b", "d"}
    change(places)
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=words):
        read_shards(index)
    for bad in ("[]", "{}", '{"weight_map": []}', "{", '{"weight_map": {"a": [1]}}'):
        index.write_text(bad)
        with pytest.raises(CheckpointError, match="index"):
            read_shards(index)


# YAML ---------------------------------------------------------------------------------

V1 = {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {
    "scale_factor": 0.18215, "linear_start": 0.00085, "image_size": 64,
    "unet_config": {"target": "os.system", "params": {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
        "attention_resolutions": [4, 2, 1], "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4], "num_heads": 8, "use_spatial_transformer": True,
        "transformer_depth": 1, "context_dim": 768, "legacy": False}},
    "first_stage_config": {"params": {"embed_dim": 4, "ddconfig": {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3,
        "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2,
        "attn_resolutions": [], "dropout": 0.0}}}}}}


def described(**settings):
    """The YAML file with other settings of the U-Net."""
    values = json.loads(json.dumps(V1))
    values["model"]["params"]["unet_config"]["params"].update(settings)
    return yaml.safe_dump(values)


def test_original_yaml(tmp_path):
    path = tmp_path / "v1-inference.yaml"
    path.write_text(yaml.safe_dump(V1))
    assert read_original_config(path) == full_size()
    assert Blueprint.like(path).configs == full_size()


@pytest.mark.parametrize("text, words", [
    ("!!python/object/apply:os.system ['touch {marker}']", "no plain YAML"),
    ("a: !!python/name:os.system", "no plain YAML"),
    ("!!python/object/new:os.system [x]", "no plain YAML"),
    ("a: !!int ''", "no plain YAML"), ("a: !!bool foo", "no plain YAML"),
    ("a: !!timestamp foo", "no plain YAML"), ("a: &a [1]\nb: *a", "aliases"),
    ("&x a: {<<: *x}", "aliases"), ("[1, 2]", "no settings"), ("", "no settings"),
    ("model: {params: 3}", "does not describe"), ("{", "no plain YAML"),
    ("a: " + "[" * 5000, "no plain YAML"), ("x" * 200_000, "too large"),
    ("x: " + "- " * 9000, "no plain YAML"),
    ("model: {params: {unet_config: {params: {model_channels: 9}}}}", "does not describe"),
    ("\x00", "no plain YAML"), ("...\n" * 2000 + "[" * 1500, "nested too deeply"),
    (described(model_channels=[1], channel_mult=[3 * 10**9]), "impossible widths"),
    (described(model_channels="ab", channel_mult=[10**9]), "impossible widths"),
    (described(channel_mult=[1, -2]), "impossible widths"),
    (described(num_heads=0), "does not describe"),
    (described(in_channels="4"), "is no number"),
])
def test_hostile_yaml(tmp_path, text, words):
    path = tmp_path / "a.yaml"
    path.write_text(text.replace("{marker}", str(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=words) as caught:
        read_original_config(path)
    assert str(path) in str(caught.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("setting", [{"parameterization": "v"}, {"linear_start": 0.1},
                                     {"timesteps": 50}, {"linear_end": 0.02}])
def test_original_yaml_of_another_noise_schedule(tmp_path, setting):
    values, path = json.loads(json.dumps(V1)), tmp_path / "a.yaml"
    values["model"]["params"].update(setting)
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(CheckpointError, match=f"{next(iter(setting))}: .*else a model folder"):
        read_original_config(path)


# The hub ------------------------------------------------------------------------------

@pytest.fixture
def known(tmp_path, monkeypatch):
    good = write(tmp_path / "good.safetensors", {"a": torch.ones(2)})
    bad = write(tmp_path / "bad.safetensors", {"a": torch.zeros(2)})
    record = checkpoints.record_file(good)
    entry = hub.Known("model.safetensors", (("one/model", "abc"), ("two/model", "main")),
                      record.sha256, record.size)
    monkeypatch.setitem(hub.KNOWN, "test", entry)
    return good, bad


def player(answers, asked):
    def download(repository, filename, revision):
        asked.append((repository, filename, revision))
        answer = answers[len(asked) - 1]
        if isinstance(answer, Exception):
            raise answer
        return str(answer)
    return download


def test_second_address_and_checksum(known):
    good, bad = known
    asked = []
    assert hub.fetch("test", player([good], asked)) == good
    assert asked == [("one/model", "model.safetensors", "abc")]
    for first in (OSError("404"), RuntimeError("gated"), bad):
        asked = []
        assert hub.fetch("test", player([first, good], asked)) == good
        assert asked[1] == ("two/model", "model.safetensors", "main")
    with pytest.raises(ConnectionError, match="one/model.*gone.*two/model.*offline"):
        hub.fetch("test", player([OSError("gone"), OSError("offline")], []))
    with pytest.raises(CheckpointError, match="has SHA-256"):
        hub.fetch("test", player([bad, bad], []))
    with pytest.raises(KeyError):
        hub.fetch("sd99")


def test_known_files_are_pinned():
    assert set(hub.KNOWN) == {"sd15", "sd15-inpainting"}
    for known in hub.KNOWN.values():
        assert len(known.places) == 2 and re.fullmatch("[0-9a-f]{40}", known.places[0][1])
        assert re.fullmatch("[0-9a-f]{64}", known.sha256)
        assert 4 * 1_066_235_307 < known.size < 4.3e9  # float32, and little else


def test_hub_folder_is_compared(tmp_path):
    blob = write(tmp_path / "x", {"a": torch.ones(2)})
    digest = checkpoints.record_file(blob).sha256
    (tmp_path / "snap" / "unet").mkdir(parents=True)
    blob.rename(tmp_path / digest)
    link = tmp_path / "snap" / "unet" / "model.safetensors"
    link.symlink_to(tmp_path / digest)
    seen = {}

    def download(repository, revision, allow_patterns):
        seen.update(repository=repository, revision=revision)
        return str(tmp_path / "snap")

    assert hub.fetch_folder("o/n", "abc", download) == tmp_path / "snap"
    assert seen == {"repository": "o/n", "revision": "abc"}
    (tmp_path / digest).write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="the hub promised"):
        hub.fetch_folder("o/n", "abc", download)
    for bad in ("../x", "a/b/c", "name", "", "/etc", "./x"):
        with pytest.raises(ValueError, match="owner/name"):
            hub.fetch_folder(bad, "main", download)


def test_names_are_located(tmp_path, monkeypatch, plan):
    path = write(tmp_path / "a.safetensors", compvis())
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda name: asked.append(name) or path)
    monkeypatch.setattr(hub, "fetch_folder", lambda *a: asked.append(a) or path)
    assert load("sd15", plan)[1].files[0].path == str(path)
    load("owner/name@" + "0123456789" * 4, plan)
    assert asked == ["sd15", ("owner/name", "0123456789" * 4)]
    for name, words in (("owner/name", "40 digits"), ("owner/name@main", "40 digits"),
                        ("sd99", "right"), ("a/b/c@" + "0" * 40, "right")):
        with pytest.raises(FileNotFoundError, match=words):
            load(name, plan)
    monkeypatch.chdir(tmp_path)
    path.rename("sd15")
    assert hub.locate("sd15") == Path("sd15") and len(asked) == 2


def test_the_real_download_function_fits():
    """Offline, huggingface_hub refuses; our arguments are those that it takes."""
    import inspect

    import huggingface_hub

    taken = inspect.signature(huggingface_hub.hf_hub_download).parameters
    assert {"repo_id", "filename", "revision"} <= set(taken)
    assert list(taken)[:2] == ["repo_id", "filename"]
    assert {"revision", "allow_patterns"} <= set(
        inspect.signature(huggingface_hub.snapshot_download).parameters)


# Side by side -------------------------------------------------------------------------

def unet_pair():
    reference = plain_parts()["unet"]
    ours = UNet2DConditionModel(CONFIGS["unet"])
    ours.load_state_dict(reference.state_dict())
    g = torch.Generator().manual_seed(2)
    z, c = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 7, 24, generator=g)
    return ours.eval(), reference, lambda m: m(z, 500, c)


def test_equal_models_do_not_differ():
    ours, reference, run = unet_pair()
    assert first_difference(ours, reference, run) is None
    rows = side_by_side(ours, reference, run)
    assert len(rows) > 100 and rows[-1].name == "(the whole)"
    assert not different_tensors(ours, reference)
    assert not any(m._forward_hooks for m in ours.modules())


@pytest.mark.parametrize("seed", range(8))
def test_the_spoiled_layer_is_named(seed):
    ours, reference, run = unet_pair()
    names = [n for n, m in ours.named_modules() if isinstance(
        m, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm))]
    name = random.Random(seed).choice(names)
    with torch.no_grad():
        ours.get_submodule(name).weight.mul_(1.1)
    assert first_difference(ours, reference, run).startswith(f"{name}: same input")
    assert different_tensors(ours, reference) == [f"{name}.weight"]


def test_a_fault_between_layers_is_placed_before_the_next():
    class Net(torch.nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.one, self.two, self.scale = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), scale

        def forward(self, x):
            return {"y": self.two(self.one(x) * self.scale)}

    ours, theirs = Net(1.0), Net(2.0)
    theirs.load_state_dict(ours.state_dict())
    found = first_difference(ours, theirs, lambda m: m(torch.ones(1, 3)))
    assert found.startswith("before two: its input differs")


def test_every_input_of_a_layer_is_compared():
    class Add(torch.nn.Module):
        def forward(self, x, more):
            return x + more

    class Net(torch.nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.add, self.scale = Add(), scale

        def forward(self, x):
            return self.add(x, more=x * self.scale)

    found = first_difference(Net(1.0), Net(2.0), lambda m: m(torch.ones(1, 3)))
    assert found.startswith("before add: its input differs")


def test_hooks_are_removed_after_an_error():
    net = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError):
        side_by_side(net, net, lambda m: m(torch.ones(3)))
    assert not net._forward_hooks


# Full size, with numbers --------------------------------------------------------------

PEAK = """
import resource, sys, torch
from sdlib.checkpoints import load_checkpoint
from sdlib.parts import Parts
from sdlib.vae import AutoencoderKL, VAEConfig
with torch.device("meta"):
    AutoencoderKL(VAEConfig.sd15())
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pipe, report = load_checkpoint(sys.argv[1], torch.float16, "cpu")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tensors = [t for p in Parts.modules for t in getattr(pipe, p).state_dict().values()]
weights = sum(t.numel() * t.element_size() for t in tensors)
sums = [int(t.view(torch.int16).sum(dtype=torch.int64)) for t in tensors]
print((peak - start) * 1024, weights, len(report.used), pipe.unet.config.in_channels,
      hash(tuple(sums)))
"""


def full_run(path):
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], cwd=ROOT,
                          capture_output=True, text=True,
                          env={**os.environ, "PYTHONHASHSEED": "0"})
    assert done.returncode == 0, done.stderr[-3000:]
    peak, weights, used, channels, total = map(int, done.stdout.split())
    assert peak <= 1.3 * weights, f"{peak / weights:.2f} times the weights"
    return weights // 2, used, channels, total


def half_noise(named_shapes, seed):
    """Random float16 numbers, cheaply: random bits without the exponents of infinity."""
    g, state = torch.Generator().manual_seed(seed), {}
    for name, shape in named_shapes.items():
        bits = torch.randint(-2**15, 2**15, shape, generator=g, dtype=torch.int16)
        state[name] = (bits & ~0x4000).view(torch.float16)
    return state


@pytest.mark.full
def test_full_size_in_every_layout(tmp_path):
    """1,066,235,307 random numbers as single file, .ckpt, folder and shards; 9 channels."""
    configs = full_size()
    names = {UNET + k: s for k, s in unet_shapes(configs["unet"]).items()}
    names |= {VAE + k: s for k, s in vae_shapes(configs["vae"]).items()}
    names |= {TEXT_LONG + k: s for k, s in text_shapes(configs["text_encoder"]).items()}
    state = half_noise(names, 0)
    path = write(tmp_path / "full.safetensors", state)
    pipe, report = load_checkpoint(path, torch.float16, "cpu")
    assert_equal(pipe, by_diffusers(state, configs))
    assert report.files[0].size > 2 * 1_066_235_307
    found = full_run(path)
    assert found[:3] == (1_066_235_307, 1130, 4)
    path.unlink()

    torch.save({"state_dict": state}, tmp_path / "full.ckpt")
    assert full_run(tmp_path / "full.ckpt") == found
    (tmp_path / "full.ckpt").unlink()

    nine = "input_blocks.0.0.weight"
    more = state | {UNET + nine: torch.zeros(320, 9, 3, 3, dtype=torch.float16)}
    write(tmp_path / "nine.safetensors", more)
    assert full_run(tmp_path / "nine.safetensors")[:3] == (
        1_066_235_307 + 859_535_364 - 859_520_964, 1130, 9)
    (tmp_path / "nine.safetensors").unlink()
    del state, more

    pipe.save_pretrained(tmp_path / "folder", torch.float16)
    assert full_run(tmp_path / "folder") == found
    unet = tmp_path / "folder" / "unet"
    reference = diffusers.UNet2DConditionModel.from_pretrained(unet,
                                                               torch_dtype=torch.float16)
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    reference.save_pretrained(unet, variant="fp16", max_shard_size="500MB")
    assert len(list(unet.glob("*-of-*.safetensors"))) > 2
    assert full_run(tmp_path / "folder") == found
    save_checkpoint(pipe, tmp_path / "mine.safetensors")
    assert full_run(tmp_path / "mine.safetensors") == found


@pytest.mark.full
def test_full_size_openai_clip(tmp_path):
    with torch.device("meta"):
        theirs = original.OpenAICLIP(768, 224, 14, 1024, 24, 16, 77, 49408, 768, 12, 12)
    state = half_noise(shapes(theirs), 3)
    torch.save(state, tmp_path / "clip.pt")
    clip, report = load_openai_clip(tmp_path / "clip.pt", torch.float16)
    assert len(report.used) == 196 + 392 + 2
    assert sum(p.numel() for p in clip.text_model.parameters()) == 123_060_480
    back = to_layout(layouts.Wanted("clip", None, lambda: clip), clip, "OpenAI")
    assert all(torch.equal(back[k], v) for k, v in state.items())
    assert isinstance(clip.text_model, CLIPTextModel)


def test_safetensors_reader_equals_the_library():
    assert sniff(ROOT / "models/emoji-sd/unet/diffusion_pytorch_model.safetensors") == (
        "safetensors")
    header = read_safetensors(ROOT / "models/emoji-sd/vae/diffusion_pytorch_model.safetensors")
    state = load_file(ROOT / "models/emoji-sd/vae/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(header[k], v) for k, v in state.items())
