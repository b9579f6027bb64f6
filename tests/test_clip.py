"""sdlib.clip against transformers: equal numbers, equal names, and traps that are noticed."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import load_into, randomize, relative_error, shapes
from torch import nn

from sdlib.attention import attention, merge_heads, split_heads
from sdlib.clip import (
    CLIP,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    clip_loss,
    clip_pixels,
    contrastive_loss,
    load_clip,
    save_clip,
)
from sdlib.clip_towers import CLIPEncoderLayer, end_of_text, quick_gelu

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOL = 1e-5
BEGIN, END = 97, 98
TEXT = dict(vocab_size=99, hidden_size=32, intermediate_size=80, projection_dim=24,
            num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=12,
            bos_token_id=BEGIN, eos_token_id=END, pad_token_id=END)
VISION = dict(hidden_size=48, intermediate_size=80, projection_dim=24, num_hidden_layers=3,
              num_attention_heads=4, image_size=24, patch_size=4)


def some_ids(pad=END):
    """Five texts of different lengths, padded to 12 tokens with `pad`."""
    ids = torch.randint(0, BEGIN, (5, 12), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = BEGIN
    for row, end in zip(ids, [3, 5, 11, 7, 1]):
        row[end:] = pad
        row[end] = END
    return ids


def some_pixels():
    return torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(4))


def their_text(**changes):
    return randomize(transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT | changes)))


def their_vision(**changes):
    config = transformers.CLIPVisionConfig(**VISION | changes)
    return randomize(transformers.CLIPVisionModelWithProjection(config))


def their_clip():
    return randomize(transformers.CLIPModel(transformers.CLIPConfig(
        text_config=TEXT, vision_config=VISION, projection_dim=24)))


def our_text(reference=None, **changes):
    return load_into(CLIPTextModel(CLIPTextConfig(**TEXT | changes)), reference or their_text())


def our_vision(reference=None, **changes):
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION | changes))
    return load_into(model, reference or their_vision())


def our_clip(reference=None):
    clip = CLIP(CLIPTextModel(CLIPTextConfig(**TEXT)),
                CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)))
    return load_into(clip, reference or their_clip())


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# ---------------------------------------------------------------------- equal numbers


@pytest.mark.parametrize("changes", [
    {}, {"hidden_act": "gelu"}, {"eos_token_id": 2}, {"layer_norm_eps": 1e-3},
    {"num_attention_heads": 2}, {"num_hidden_layers": 1},
], ids=str)
def test_text(changes):
    reference, ids = their_text(**changes), some_ids()
    ours = our_text(reference, **changes)
    theirs = reference(ids)
    hidden = ours(ids)
    assert hidden.shape == (5, 12, 32)
    assert relative_error(hidden, theirs.last_hidden_state) < TOL
    assert relative_error(ours.pooled(hidden, ids), theirs.pooler_output) < TOL


@pytest.mark.parametrize("length", [1, 5, 12])
def test_text_of_any_length(length):
    ids = some_ids()[:, :length]
    assert relative_error(our_text()(ids), their_text()(ids).last_hidden_state) < TOL


def test_two_ways_to_find_the_end():
    """Old files say eos_token_id 2, and then the highest id is the end."""
    ids = some_ids()
    assert end_of_text(ids, END).tolist() == end_of_text(ids, 2).tolist() == [3, 5, 11, 7, 1]
    added = ids.clone()
    added[:, 0] = END  # the rules differ when a token stands above the end token
    assert end_of_text(added, END).tolist() == [0] * 5
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT | {"vocab_size": 120}))
    ids[2, 4] = 110  # as textual inversion adds tokens
    for eos in (END, 2):
        model.eos_token_id = eos
        model.config.eos_token_id = eos
        ours = load_into(CLIPTextModel(CLIPTextConfig(
            **TEXT | {"vocab_size": 120, "eos_token_id": eos})), randomize(model))
        assert relative_error(ours.pooled(ours(ids), ids), model(ids).pooler_output) < TOL


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_skip(skip):
    """Diffusers takes hidden_states[-(clip_skip + 1)] and then the final norm."""
    reference, ids = their_text(), some_ids()
    states = reference(ids, output_hidden_states=True).hidden_states
    theirs = reference.final_layer_norm(states[-(skip + 1)])
    assert relative_error(our_text()(ids, clip_skip=skip), theirs) < TOL


def test_text_with_projection():
    reference = randomize(transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**TEXT)))
    ours = our_clip()
    state = reference.state_dict()
    ours.load_state_dict(ours.state_dict() | state)
    assert relative_error(ours.encode_text(some_ids()), reference(some_ids()).text_embeds) < TOL


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu"}, {"patch_size": 8},
                                     {"num_channels": 1}], ids=str)
def test_vision(changes):
    reference = their_vision(**changes)
    pixels = some_pixels()[:, :changes.get("num_channels", 3)]
    ours, theirs = our_vision(reference, **changes), reference(pixels)
    assert relative_error(ours(pixels), theirs.image_embeds) < TOL
    hidden = ours.vision_model.hidden_states(pixels)
    assert relative_error(hidden, theirs.last_hidden_state) < TOL


def test_clip_logits_and_loss():
    reference, ids, pixels = their_clip(), some_ids()[:4], some_pixels()
    theirs = reference(ids, pixels, return_loss=True)
    ours = our_clip(reference)(ids, pixels)
    assert relative_error(ours, theirs.logits_per_image) < TOL
    assert relative_error(clip_loss(ours), theirs.loss) < TOL
    more = reference(some_ids(), pixels)  # 4 images, 5 texts
    assert relative_error(our_clip(reference)(some_ids(), pixels), more.logits_per_image) < TOL


def test_quick_gelu():
    x = torch.linspace(-8, 8, 1001)
    theirs = transformers.activations.ACT2FN["quick_gelu"](x)
    assert relative_error(quick_gelu(x), theirs) < 1e-6
    assert 0.02 < (quick_gelu(x) - F.gelu(x)).abs().max() < 0.021  # not the exact one


def test_explicit_attention_agrees():
    """The fused kernel in CLIPAttention computes chapter 06's attention."""
    layer = our_text().encoder.layers[0].self_attn
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    for causal in (False, True):
        q, k, v = (split_heads(p(x), 4) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        explicit = layer.out_proj(merge_heads(attention(q, k, v, causal=causal)))
        assert relative_error(layer(x, causal), explicit) < TOL


def test_encode_text_may_stop_at_the_last_end():
    """What follows the end token cannot change the pooled state."""
    clip, ids = our_clip(), some_ids()
    full = clip.text_projection(clip.text_model.pooled(clip.text_model(ids), ids))
    short = ids[[0, 1, 4]]
    assert relative_error(clip.encode_text(short), full[[0, 1, 4]]) < TOL
    short[:, 6:] = 17
    assert relative_error(clip.encode_text(short), full[[0, 1, 4]]) < TOL


def test_half_precision_is_close():
    clip, ids, pixels = our_clip(), some_ids(), some_pixels()
    exact = clip(ids, pixels)
    half = clip.to(torch.bfloat16)(ids, pixels)
    assert half.dtype == torch.bfloat16 and relative_error(half, exact) < 0.1


# ------------------------------------------------------------------------------ traps


def post_norm(self, x, causal=False):
    x = self.layer_norm1(x + self.self_attn(x, causal))
    return self.layer_norm2(x + self.mlp(x))


def no_mask(model):
    encoder = model.encoder.forward
    model.encoder.forward = lambda x, causal=False, skip=0: encoder(x, False, skip)


def padding_mask(model):
    """Hides what follows the end token, in addition to the causal mask."""
    length = 12
    keep = torch.arange(length)[None] <= torch.tensor([3, 5, 11, 7, 1])[:, None]
    mask = keep[:, None, None, :] & torch.ones(length, length, dtype=torch.bool).tril()
    for layer in model.encoder.layers:
        def forward(x, causal=False, a=layer.self_attn):
            q, k, v = (split_heads(p(x), a.heads) for p in (a.q_proj, a.k_proj, a.v_proj))
            return a.out_proj(merge_heads(attention(q, k, v, mask=mask)))
        layer.self_attn.forward = forward


def exact_gelu(model):
    for layer in model.encoder.layers:
        layer.mlp.activation = F.gelu


def wrong_heads(model):
    for layer in model.encoder.layers:
        layer.self_attn.heads = 2


def blocks_post_norm(model):
    for layer in model.encoder.layers:
        layer.forward = post_norm.__get__(layer, CLIPEncoderLayer)


def swapped_norms(model):
    for layer in model.encoder.layers:
        layer.layer_norm1, layer.layer_norm2 = layer.layer_norm2, layer.layer_norm1


def wrong_eps(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-3


def reversed_positions(model):
    weight = model.embeddings.position_embedding.weight
    weight.copy_(weight.flip(0).clone())


def shifted_positions(model):
    weight = model.embeddings.position_embedding.weight
    weight.copy_(weight.roll(1, 0).clone())


def no_final_norm(model):
    model.final_layer_norm = nn.Identity()


TEXT_TRAPS = [exact_gelu, no_mask, padding_mask, no_final_norm, wrong_heads, blocks_post_norm,
              swapped_norms, wrong_eps, reversed_positions, shifted_positions]


@pytest.mark.parametrize("trap", TEXT_TRAPS, ids=lambda trap: trap.__name__)
def test_text_traps_are_noticed(trap):
    model, ids = our_text(), some_ids()
    right = their_text()(ids).last_hidden_state
    assert relative_error(model(ids), right) < TOL
    trap(model)
    assert relative_error(model(ids), right) > 10 * TOL


def test_a_wrong_padding_token_is_noticed():
    """Nothing masks the padding: which token it is changes all states behind the end."""
    right = their_text()(some_ids()).last_hidden_state
    assert relative_error(our_text()(some_ids(pad=0)), right) > 10 * TOL


def test_a_wrong_end_is_noticed():
    model, ids = our_text(), some_ids()
    right = their_text()(ids).pooler_output
    assert relative_error(model(ids)[:, -1], right) > 10 * TOL
    assert relative_error(model(ids).mean(1), right) > 10 * TOL


def class_token_last(vision):
    embeddings = vision.embeddings
    forward = embeddings.forward
    embeddings.forward = lambda pixels: forward(pixels).roll(-1, 1)


def mean_instead_of_class(vision):
    vision.forward = lambda p: vision.post_layernorm(vision.hidden_states(p).mean(1))


def patches_by_column(vision):
    embeddings = vision.embeddings

    def forward(pixels):
        x = embeddings.patch_embedding(pixels).transpose(2, 3).flatten(2).transpose(1, 2)
        first = embeddings.class_embedding.expand(len(x), 1, -1)
        return torch.cat([first, x], 1) + embeddings.position_embedding.weight
    embeddings.forward = forward


def pre_and_post_swapped(vision):
    vision.pre_layrnorm, vision.post_layernorm = vision.post_layernorm, vision.pre_layrnorm


def no_pre_norm(vision):
    vision.pre_layrnorm = nn.Identity()


def no_post_norm(vision):
    vision.post_layernorm = nn.Identity()


def patch_bias(vision):
    vision.embeddings.patch_embedding.bias = nn.Parameter(torch.linspace(-0.1, 0.1, 48))


def causal_vision(vision):
    encoder = vision.encoder.forward
    vision.encoder.forward = lambda x: encoder(x, True)


VISION_TRAPS = [exact_gelu, wrong_heads, blocks_post_norm, swapped_norms, wrong_eps,
                reversed_positions, class_token_last, mean_instead_of_class, patches_by_column,
                pre_and_post_swapped, no_pre_norm, no_post_norm, patch_bias, causal_vision]


@pytest.mark.parametrize("trap", VISION_TRAPS, ids=lambda trap: trap.__name__)
def test_vision_traps_are_noticed(trap):
    model, pixels = our_vision(), some_pixels()
    right = their_vision()(pixels).image_embeds
    assert relative_error(model(pixels), right) < TOL
    trap(model.vision_model)
    assert relative_error(model(pixels), right) > 10 * TOL


# ------------------------------------------------------------- names, shapes and counts


def test_text_at_real_size():
    with torch.device("meta"):
        ours = CLIPTextModel(CLIPTextConfig.sd15())
        theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    assert shapes(ours) == shapes(theirs)
    assert len(shapes(ours)) == 196
    assert sum(p.numel() for p in ours.parameters()) == 123_060_480


def test_vision_at_real_size():
    with torch.device("meta"):
        ours = CLIPVisionModelWithProjection(CLIPVisionConfig.sd15())
        theirs = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
            num_attention_heads=16, patch_size=14, projection_dim=768))
    assert shapes(ours) == shapes(theirs)
    assert len(shapes(ours)) == 392
    assert sum(p.numel() for p in ours.parameters()) == 303_966_208


def test_clip_at_real_size():
    with torch.device("meta"):
        ours = CLIP(CLIPTextModel(CLIPTextConfig.sd15()),
                    CLIPVisionModelWithProjection(CLIPVisionConfig.sd15()))
    assert sum(p.numel() for p in ours.parameters()) == 427_616_513  # ViT-L/14 as published
    assert shapes(our_clip()) == shapes(their_clip())


def test_defaults_are_those_of_transformers():
    """A key that is missing in a file must mean what transformers takes it to mean."""
    for ours, theirs in ((CLIPTextConfig, transformers.CLIPTextConfig),
                         (CLIPVisionConfig, transformers.CLIPVisionConfig)):
        values = theirs().to_dict()
        for key, value in ours().to_dict().items():
            if key not in ("image_mean", "image_std"):
                assert values[key] == value, key
    clip = CLIPVisionConfig()
    assert list(clip.image_mean) == list(transformers.image_utils.OPENAI_CLIP_MEAN)
    assert list(clip.image_std) == list(transformers.image_utils.OPENAI_CLIP_STD)


def test_the_start_is_that_of_transformers():
    """Fresh weights have the same spread, tensor by tensor."""
    torch.manual_seed(0)
    theirs = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=TEXT | {"hidden_size": 128, "intermediate_size": 256},
        vision_config=VISION | {"hidden_size": 128}, projection_dim=64)).state_dict()
    ours = CLIP(CLIPTextModel(CLIPTextConfig(
        **TEXT | {"hidden_size": 128, "intermediate_size": 256, "projection_dim": 64})),
        CLIPVisionModelWithProjection(CLIPVisionConfig(
            **VISION | {"hidden_size": 128, "projection_dim": 64}))).state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if value.ndim > 1:
            assert math.isclose(ours[name].std(), value.std(), rel_tol=0.1), name
        elif value.ndim == 1 and "class" not in name:
            assert torch.equal(ours[name], value), name  # biases 0, norms 1
    assert math.isclose(ours["logit_scale"], theirs["logit_scale"], abs_tol=1e-4)


# ------------------------------------------------------------------------------ folders


def test_text_encoder_of_sdlib_loads_in_transformers(tmp_path):
    ours, ids = our_text(), some_ids()
    ours.save_pretrained(tmp_path / "text_encoder")
    theirs, info = transformers.CLIPTextModel.from_pretrained(
        tmp_path / "text_encoder", output_loading_info=True)
    assert not any(info.values()), info
    assert relative_error(theirs(ids).last_hidden_state, ours(ids)) < TOL
    assert relative_error(theirs(ids).pooler_output, ours.pooled(ours(ids), ids)) < TOL


def test_image_encoder_of_sdlib_loads_in_transformers(tmp_path):
    ours, pixels = our_vision(), some_pixels()
    ours.save_pretrained(tmp_path / "image_encoder")
    theirs, info = transformers.CLIPVisionModelWithProjection.from_pretrained(
        tmp_path / "image_encoder", output_loading_info=True)
    assert not any(info.values()), info
    assert relative_error(theirs(pixels).image_embeds, ours(pixels)) < TOL


def test_folders_of_transformers_load_in_sdlib(tmp_path):
    text, vision, clip = their_text(), their_vision(), their_clip()
    text.save_pretrained(tmp_path / "text")
    vision.save_pretrained(tmp_path / "vision")
    clip.save_pretrained(tmp_path / "clip")
    ids, pixels = some_ids(), some_pixels()
    ours = CLIPTextModel.from_pretrained(tmp_path / "text")
    assert relative_error(ours(ids), text(ids).last_hidden_state) < TOL
    ours = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "vision")
    assert relative_error(ours(pixels), vision(pixels).image_embeds) < TOL
    ours = load_clip(tmp_path / "clip")
    assert relative_error(ours(ids, pixels), clip(ids, pixels).logits_per_image) < TOL


def test_save_and_load_clip(tmp_path):
    ours, ids, pixels = our_clip(), some_ids(), some_pixels()
    save_clip(ours, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "image_encoder", "text_encoder", "text_projection"]
    again = load_clip(tmp_path)
    assert not again.training
    assert torch.equal(again(ids, pixels), ours(ids, pixels))
    save_clip(ours, tmp_path / "half", dtype=torch.float16)
    half = load_clip(tmp_path / "half")
    assert half.logit_scale.dtype == torch.float32
    assert 0 < relative_error(half(ids, pixels), ours(ids, pixels)) < 0.02


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_spellings_of_the_text_encoder(tmp_path, prefix):
    """Older files: a prefix, a buffer of positions, other settings in config.json."""
    from safetensors.torch import save_file

    reference, ids = their_text(), some_ids()
    state = {prefix + k: v.clone() for k, v in reference.state_dict().items()}
    state[prefix + "embeddings.position_ids"] = torch.arange(12)[None]
    save_file(state, tmp_path / "model.safetensors")
    config = {"_name_or_path": "openai/clip-vit-large-patch14", "dropout": 0.0,
              "architectures": ["CLIPTextModel"], "attention_dropout": 0.0,
              "initializer_factor": 1.0, "initializer_range": 0.02, "torch_dtype": "float32",
              "model_type": "clip_text_model", "transformers_version": "4.22.0.dev0"}
    (tmp_path / "config.json").write_text(json.dumps(config | TEXT))
    ours = CLIPTextModel.from_pretrained(tmp_path)
    assert relative_error(ours(ids), reference(ids).last_hidden_state) < TOL


def test_old_vision_files_have_a_position_buffer():
    state = {k: v for k, v in their_vision().state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(37)[None]
    assert len(CLIPVisionModelWithProjection.rename_state(state)) == len(state) - 1


def test_sd15_config_file_is_read():
    """The text_encoder/config.json that Stable Diffusion 1.5 was published with."""
    config = CLIPTextConfig.from_dict({
        "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
        "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0,
        "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77, "model_type": "clip_text_model",
        "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
        "projection_dim": 768, "torch_dtype": "float32",
        "transformers_version": "4.22.0.dev0", "vocab_size": 49408})
    ours = CLIPTextConfig.sd15()
    shape = {k: v for k, v in ours.to_dict().items() if not k.endswith("token_id")}
    assert shape.items() <= config.to_dict().items()
    assert config.eos_token_id == 2 and ours.pad_token_id == 49407


# ----------------------------------------------------------------------- image preparation


@pytest.mark.parametrize("height,width", [(300, 401), (401, 300), (224, 224), (224, 301),
                                          (100, 100), (640, 97), (225, 224), (512, 512)])
def test_clip_pixels_equals_the_image_processor(height, width):
    """Within 1.5 gray levels of 255: PIL rounds to bytes after either direction."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    rng = np.random.default_rng(height + width)
    y, x = np.mgrid[:height, :width][..., None]
    picture = 128 + 60 * np.sin(x / 17 + y / 29 + np.arange(3))
    picture = (picture + rng.normal(0, 12, picture.shape)).clip(0, 255).astype(np.uint8)
    theirs = CLIPImageProcessorPil()(picture, return_tensors="pt")["pixel_values"]
    images = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    config = CLIPVisionConfig.sd15()
    ours = clip_pixels(images, config)
    assert ours.shape == theirs.shape == (1, 3, 224, 224)
    levels = (ours - theirs).abs() * 255 * torch.tensor(config.image_std).view(3, 1, 1)
    assert levels.max() < 1.5


def test_clip_pixels_of_emoji_scenes_is_the_identity():
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    assert relative_error(clip_pixels(images, CLIPVisionConfig.emoji()), images) < 1e-6


def test_clip_pixels_lets_gradients_through():
    with torch.enable_grad():
        images = torch.rand(1, 3, 90, 70, requires_grad=True)
        clip_pixels(images, CLIPVisionConfig.emoji()).sum().backward()
    assert images.grad.abs().sum() > 0


# ----------------------------------------------------------------------------------- loss


def test_loss_by_hand():
    logits = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    rows = [math.log(1 + math.exp(-3)), math.log(1 + math.exp(-2.5))]
    columns = [math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(-5))]
    assert math.isclose(clip_loss(logits), (sum(rows) + sum(columns)) / 4, rel_tol=1e-6)


def test_loss_with_near_misses_by_hand():
    logits, extra = torch.zeros(2, 2), torch.tensor([[0.0, 0.0, 0.0], [-1e9, -1e9, -1e9]])
    expected = (math.log(5) + math.log(2)) / 4 + math.log(2) / 2
    assert math.isclose(clip_loss(logits, extra), expected, rel_tol=1e-6)


def test_contrastive_loss_from_embeddings():
    clip, ids, pixels = our_clip(), some_ids()[:4], some_pixels()
    image, text = clip.encode_image(pixels), clip.encode_text(ids)
    expected = clip_loss(clip(ids, pixels))
    assert relative_error(contrastive_loss(image, text, None, clip.logit_scale), expected) < TOL
    assert relative_error(contrastive_loss(3 * image, text / 7, None, clip.logit_scale),
                          expected) < TOL
    # K = 2 near misses per image, by the definition
    wrong = clip.encode_text(some_ids()[[4, 4, 3, 2, 1, 0, 4, 2]]).view(4, 2, -1)
    loss = 0
    unit = [F.normalize(e, dim=-1) for e in (image, text, wrong)]
    scale = clip.logit_scale.exp()
    for i in range(4):
        scores = [scale * unit[0][i] @ t for t in unit[1]]
        scores += [scale * unit[0][i] @ n for n in unit[2][i]]
        loss += torch.stack(scores).logsumexp(0) - scores[i]
        column = torch.stack([scale * v @ unit[1][i] for v in unit[0]])
        loss += column.logsumexp(0) - column[i]
    assert relative_error(contrastive_loss(image, text, wrong, clip.logit_scale), loss / 8) < TOL


def test_loss_is_exact_under_autocast_and_bounded():
    clip, ids, pixels = our_clip(), some_ids()[:4], some_pixels()
    image, text = clip.encode_image(pixels), clip.encode_text(ids)
    wrong = text.roll(1, 0)[:, None] + text.roll(2, 0)[:, None]
    exact = contrastive_loss(image, text, wrong, math.log(100))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(image, text, wrong, math.log(100)), exact)
    assert torch.equal(contrastive_loss(image, text, wrong, 9.0), exact)


def test_every_parameter_learns():
    clip, ids, pixels = our_clip(), some_ids(), some_pixels()
    with torch.enable_grad():
        clip.train()
        image, text = clip.encode_image(pixels), clip.encode_text(ids)
        contrastive_loss(image, text[:4], text[4:].expand(4, 1, -1), clip.logit_scale).backward()
    for name, parameter in clip.named_parameters():
        if not name.endswith("k_proj.bias"):  # softmax does not see a constant
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_temperature_is_kept_in_bounds():
    clip = our_clip()
    for start, end in ((9.0, math.log(100)), (-3.0, 0.0), (2.0, 2.0)):
        clip.logit_scale.fill_(start)
        clip.clamp_logit_scale()
        assert math.isclose(clip.logit_scale, end, rel_tol=1e-6)


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("action,words", [
    (lambda: our_text()(torch.zeros(1, 13, dtype=torch.long)), "13 tokens.* 12 positions"),
    (lambda: our_text()(torch.zeros(12, dtype=torch.long)), r"\(B, L\)"),
    (lambda: our_text()(torch.full((1, 5), 99)), "vocabulary has 99"),
    (lambda: our_text()(torch.full((1, 5), -1)), "vocabulary has 99"),
    (lambda: our_text()(some_ids(), clip_skip=3), "clip_skip must be 0 to 2"),
    (lambda: our_text()(some_ids(), clip_skip=-1), "clip_skip must be 0 to 2"),
    (lambda: end_of_text(torch.zeros(2, 5, dtype=torch.long), END), "text 0 has no end token"),
    (lambda: our_vision()(torch.zeros(1, 3, 32, 24)), r"\(B, 3, 24, 24\).*clip_pixels"),
    (lambda: our_vision()(torch.zeros(3, 24, 24)), "clip_pixels"),
    (lambda: clip_pixels(torch.zeros(3, 24, 24), CLIPVisionConfig()), r"\(B, 3, H, W\)"),
    (lambda: clip_pixels(torch.zeros(2, 1, 24, 24), CLIPVisionConfig()), r"\(B, 3, H, W\)"),
    (lambda: clip_loss(torch.zeros(2, 3)), r"\(B, B\)"),
    (lambda: CLIPTextConfig(hidden_size=100, num_attention_heads=3), "does not divide"),
    (lambda: CLIPTextConfig(hidden_act="relu"), "'relu' is not one of"),
    (lambda: CLIPTextConfig(eos_token_id=[1, 2]), "one token id"),
    (lambda: CLIPVisionConfig(image_size=60, patch_size=14), "not a multiple of patch_size"),
    (lambda: CLIPTextConfig.from_dict({"attention_dropout": 0.1}), "attention_dropout=0.1"),
    (lambda: CLIPTextConfig.from_dict({"rotary": True}), "'rotary'"),
    (lambda: CLIP(CLIPTextModel(CLIPTextConfig(**TEXT)),
                  CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)),
                  our_head(7)), "not one space"),
    (lambda: CLIPTextModel.rename_state({"a": 1, "text_model.a": 2}), "twice"),
])
def test_bad_input_is_explained(action, words):
    with warnings.catch_warnings(), pytest.raises(ValueError, match=words):
        action()


def our_head(size):
    from sdlib.clip import CLIPHead, CLIPHeadConfig
    return CLIPHead(CLIPHeadConfig(32, size))


def test_wrong_folders_are_named(tmp_path):
    our_text().save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="CLIPTextModel"):
        CLIPVisionModelWithProjection.from_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="clip_text_model"):
        load_clip(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="text_encoder"):
        load_clip(tmp_path)
