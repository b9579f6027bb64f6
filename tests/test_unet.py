"""Chapter 10: the U-Net equals diffusers' UNet2DConditionModel, and its traps show."""

import copy
import dataclasses
import gc
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import load_into, randomize, relative_error, shapes

from sdlib import unet as unet_module
from sdlib.attention import Attention
from sdlib.embeddings import timestep_embedding
from sdlib.transformer2d import (
    GEGLU,
    BasicTransformerBlock,
    FeedForward,
    Transformer2DModel,
)
from sdlib.unet import UNet2DConditionModel, UNetConfig

diffusers = pytest.importorskip("diffusers")
Reference = diffusers.UNet2DConditionModel

TOLERANCE = 1e-5
CROSS = 24
LEVELS = {
    2: dict(block_out_channels=(16, 32), layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
    3: dict(block_out_channels=(16, 32, 48), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2),
    4: dict(block_out_channels=(16, 32, 32, 48), layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3),
}


def small(levels=3, **changes) -> UNetConfig:
    settings = dict(sample_size=16, cross_attention_dim=CROSS, attention_head_dim=4,
                    norm_num_groups=8) | LEVELS[levels] | changes
    return UNetConfig(**settings)


def pair(config, seed=0):
    """The reference with random weights, and ours with the same ones."""
    reference = randomize(Reference.from_config(config.to_dict()), seed)
    return reference, load_into(UNet2DConditionModel(config), reference)


def inputs(config, size=(16, 16), length=77, batch=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    sample = torch.randn(batch, config.in_channels, *size, generator=g)
    context = torch.randn(batch, length, config.cross_attention_dim, generator=g)
    return sample, torch.tensor([0, 421, 999])[:batch], context


# Parity -------------------------------------------------------------------------------

@pytest.mark.parametrize("levels", [2, 3, 4])
@pytest.mark.parametrize("size, length", [((16, 16), 77), ((8, 24), 5), ((13, 18), 32),
                                          ((9, 11), 1)])
def test_parity(levels, size, length):
    """Several times in one batch, oblong and odd latents, other context lengths."""
    config = small(levels)
    reference, ours = pair(config)
    arguments = inputs(config, size, length)
    with torch.no_grad():
        assert relative_error(ours(*arguments), reference(*arguments).sample) <= TOLERANCE


@pytest.mark.parametrize("config", [
    small(in_channels=9),
    small(out_channels=8),
    small(layers_per_block=3),
    small(2, attention_head_dim=1),
    small(2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
          up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
    small(3, up_block_types=("CrossAttnUpBlock2D",) * 3),
    small(2, block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",),
          up_block_types=("CrossAttnUpBlock2D",)),
], ids=["inpainting", "wide-output", "three-layers", "one-head", "upside-down",
        "attentive-up", "one-level"])
def test_parity_of_other_configs(config):
    reference, ours = pair(config)
    arguments = inputs(config, length=7)
    with torch.no_grad():
        assert relative_error(ours(*arguments), reference(*arguments).sample) <= TOLERANCE


@pytest.mark.parametrize("timestep", [7, 981, 999.0, 0.25, torch.tensor(33),
                                      torch.tensor([640]), torch.tensor([1, 2, 3]),
                                      torch.tensor([0.5, 10.25, 998.75])])
def test_parity_of_timesteps(timestep):
    """A number, a tensor of one, one per picture; between the integers too."""
    reference, ours = pair(small(2))
    sample, _, context = inputs(small(2), length=7)
    with torch.no_grad():
        expected = reference(sample, timestep, context).sample
        assert relative_error(ours(sample, timestep, context), expected) <= TOLERANCE


@pytest.mark.parametrize("size", [(16, 16), (13, 10)])
def test_parity_with_the_residuals_of_a_controlnet(size):
    config = small(4)
    reference, ours = pair(config)
    arguments = inputs(config, size, length=7)
    control = randomize(diffusers.ControlNetModel.from_unet(reference), 5)
    image = torch.randn(3, 3, 8 * size[0], 8 * size[1])
    with torch.no_grad():
        down, mid = control(*arguments, controlnet_cond=image, return_dict=False)
        extra = dict(down_block_additional_residuals=down,
                     mid_block_additional_residual=mid)
        expected = reference(*arguments, **extra).sample
        without = reference(*arguments).sample
        assert relative_error(ours(*arguments, **extra), expected) <= TOLERANCE
    assert relative_error(without, expected) > 0.01  # the residuals matter


def test_gradients_agree():
    config = small(3)
    reference, ours = pair(config)
    arguments = inputs(config, (8, 8), length=7)
    ours(*arguments).square().mean().backward()
    reference(*arguments).sample.square().mean().backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        if theirs[name].grad.abs().max() > 1e-7:
            assert relative_error(parameter.grad, theirs[name].grad) <= 1e-3, name


def test_timestep_embedding_is_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 1.0, 17.5, 500.0, 999.0])
    for flip in (True, False):
        for shift in (0.0, 1.0):
            expected = get_timestep_embedding(t, 320, flip, shift)
            got = timestep_embedding(t, 320, flip_sin_to_cos=flip, freq_shift=shift)
            assert relative_error(got, expected) <= 1e-6
    with pytest.raises(ValueError, match="even number of channels, not 7"):
        timestep_embedding(t, 7)


# Full size ----------------------------------------------------------------------------

@pytest.mark.parametrize("config, total", [(UNetConfig.sd15(), 859_520_964),
                                           (UNetConfig.sd15_inpainting(), 859_535_364)])
def test_names_shapes_and_counts_at_full_size(config, total):
    with torch.device("meta"):
        ours = UNet2DConditionModel(config)
        reference = Reference.from_config(config.to_dict())
    assert shapes(ours) == shapes(reference)
    assert len(shapes(ours)) == 686
    assert sum(p.numel() for p in ours.parameters()) == total


def test_shapes_at_full_size_are_right():
    with torch.device("meta"):
        ours = UNet2DConditionModel(UNetConfig.sd15())
        out = ours(torch.zeros(2, 4, 64, 96), torch.tensor([1, 2]), torch.zeros(2, 77, 768))
    assert out.shape == (2, 4, 64, 96)


def test_emoji_preset_is_diffusers_too():
    config = UNetConfig.emoji()
    with torch.device("meta"):
        assert (shapes(UNet2DConditionModel(config))
                == shapes(Reference.from_config(config.to_dict())))


# Folders ------------------------------------------------------------------------------

def test_folder_of_diffusers_loads_here(tmp_path):
    reference, _ = pair(small(3))
    reference.save_pretrained(tmp_path / "unet")
    ours = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert ours.config == small(3)
    arguments = inputs(small(3), length=7)
    with torch.no_grad():
        assert relative_error(ours(*arguments), reference(*arguments).sample) <= TOLERANCE


def test_our_folder_loads_in_diffusers(tmp_path):
    ours = randomize(UNet2DConditionModel(small(3)), 3)
    ours.save_pretrained(tmp_path / "unet")
    reference, report = Reference.from_pretrained(
        tmp_path / "unet", output_loading_info=True, low_cpu_mem_usage=False)
    assert not any(report.values()), report
    arguments = inputs(small(3), length=7)
    with torch.no_grad():
        expected = reference.eval()(*arguments).sample
        assert relative_error(ours(*arguments), expected) <= TOLERANCE


def test_config_reads_what_the_ecosystem_writes():
    assert UNetConfig.from_dict(dict(Reference(**{
        k: v for k, v in small(2).to_dict().items()}).config)) == small(2)
    published = {  # config.json of runwayml/stable-diffusion-v1-5, as published in 2022
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0",
        "act_fn": "silu", "attention_head_dim": 8, "center_input_sample": False,
        "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
        "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
        "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
    assert UNetConfig.from_dict(published) == UNetConfig.sd15()


@pytest.mark.parametrize("key, value", [
    ("use_linear_projection", True), ("dual_cross_attention", True), ("act_fn", "gelu"),
    ("addition_embed_type", "text_time"), ("norm_eps", 1e-6), ("freq_shift", 1),
    ("flip_sin_to_cos", False), ("resnet_time_scale_shift", "scale_shift"),
    ("transformer_layers_per_block", [1, 2, 10]), ("num_attention_heads", 8),
    ("warp_drive", 9)])
def test_config_refuses_what_it_does_not_implement(key, value):
    with pytest.raises(ValueError, match=key):
        UNetConfig.from_dict(UNetConfig.sd15().to_dict() | {key: value})


@pytest.mark.parametrize("changes, message", [
    (dict(block_out_channels=(16, 32)), "down_block_types has 3 entries"),
    (dict(up_block_types=("UpBlock2D",)), "up_block_types has 1 entries"),
    (dict(down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")),
     "AttnDownBlock2D"),
    (dict(norm_num_groups=7), "norm_num_groups=7 does not divide 16"),
    (dict(attention_head_dim=3), "3 heads .* do not divide 16 channels"),
    (dict(attention_head_dim=(5, 10, 20)), "attention_head_dim must be a positive integer"),
    (dict(cross_attention_dim=0), "cross_attention_dim must be a positive integer"),
    (dict(layers_per_block=(1, 2, 2)), "layers_per_block must be a positive integer")])
def test_config_explains_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        small(3, **changes)


# Bad input ----------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    (dict(sample=torch.zeros(2, 3, 8, 8)), r"sample must be \(B, 4, H, W\).*\(2, 3, 8"),
    (dict(sample=torch.zeros(4, 8, 8)), r"sample must be \(B, 4, H, W\)"),
    (dict(encoder_hidden_states=torch.zeros(2, 5, CROSS + 1)),
     rf"must be \(2, L, {CROSS}\).*not \(2, 5, {CROSS + 1}\)"),
    (dict(encoder_hidden_states=torch.zeros(1, 5, CROSS)), r"must be \(2, L"),
    (dict(encoder_hidden_states=torch.zeros(2, CROSS)), r"must be \(2, L"),
    (dict(timestep=torch.tensor([1, 2, 3])), r"timestep .* \(2,\).*not \(3,\)"),
    (dict(timestep=torch.tensor([[1], [2]])), r"timestep .*not \(2, 1\)"),
    (dict(down_block_additional_residuals=[torch.zeros(2, 16, 8, 8)]),
     "down_block_additional_residuals must be"),
    (dict(mid_block_additional_residual=torch.zeros(2, 16, 8, 8)),
     "mid_block_additional_residual must be"),
])
def test_bad_input_is_explained(change, message):
    arguments = dict(sample=torch.zeros(2, 4, 8, 8), timestep=3,
                     encoder_hidden_states=torch.zeros(2, 5, CROSS)) | change
    with pytest.raises(ValueError, match=message):
        UNet2DConditionModel(small(2))(**arguments)


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="5 heads do not divide 16 channels"):
        Transformer2DModel(16, 5, 8, 8)


# Behavior -----------------------------------------------------------------------------

@pytest.mark.parametrize("levels", [2, 3, 4])
def test_recorder_sees_every_attention_layer_and_changes_nothing(levels):
    config = small(levels)
    ours = randomize(UNet2DConditionModel(config), 0)
    sample, times, context = inputs(config, (16, 12), length=7)
    seen = {}

    def record(name, weights):
        assert name not in seen, f"{name} was recorded twice"
        seen[name] = weights

    with torch.no_grad():
        fused = ours(sample, times, context)
        explicit = ours(sample, times, context, recorder=record)
    assert relative_error(explicit, fused) <= TOLERANCE
    layers = [name for name, m in ours.named_modules() if isinstance(m, Attention)]
    assert sorted(seen) == sorted(layers)
    for name, weights in seen.items():
        places = weights.shape[2]
        keys = 7 if name.endswith("attn2") else places
        assert weights.shape == (3, 4, places, keys)
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    assert seen["down_blocks.0.attentions.0.transformer_blocks.0.attn2"].shape[2] == 16 * 12


def test_pictures_of_a_batch_do_not_meet():
    ours = randomize(UNet2DConditionModel(small(3)), 0)
    sample, times, context = inputs(small(3), length=7)
    with torch.no_grad():
        together = ours(sample, times, context)
        alone = torch.cat([ours(sample[i:i + 1], times[i:i + 1], context[i:i + 1])
                           for i in range(3)])
    assert relative_error(together, alone) <= TOLERANCE


@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16),
                                     lambda m: m.to(memory_format=torch.channels_last)])
def test_half_precision_and_channels_last(convert):
    ours = randomize(UNet2DConditionModel(small(3)), 0)
    sample, times, context = inputs(small(3), length=7)
    with torch.no_grad():
        expected = ours(sample, times, context)
        other = convert(copy.deepcopy(ours))
        dtype = other.conv_in.weight.dtype
        got = other(sample.to(dtype), times, context.to(dtype))
    assert got.dtype == dtype
    assert relative_error(got, expected) <= (1e-5 if dtype == torch.float32 else 0.1)


# Gradient checkpointing ---------------------------------------------------------------

def kept_and_gradients(model, *arguments, **extra):
    """Bytes that wait for the backward pass, without the weights; the gradients."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(*arguments, **extra).square().mean()
    for parameter in model.parameters():
        kept.pop(parameter.data_ptr(), None)
    loss.backward()
    return sum(kept.values()), {k: p.grad.clone() for k, p in model.named_parameters()}


@pytest.mark.parametrize("residuals", [False, True])
def test_checkpointing_keeps_less_and_changes_no_gradient(residuals):
    config = small(3)
    ours = randomize(UNet2DConditionModel(config), 0)
    arguments, extra = inputs(config, length=7), {}
    if residuals:
        shapes_down = [(16, 16), (16, 16), (16, 8), (32, 8), (32, 4), (48, 4)]
        extra = dict(down_block_additional_residuals=[torch.randn(3, c, s, s)
                                                      for c, s in shapes_down],
                     mid_block_additional_residual=torch.randn(3, 48, 4, 4))
    before, expected = kept_and_gradients(ours, *arguments, **extra)
    ours.enable_gradient_checkpointing()
    ours.enable_gradient_checkpointing()  # twice is once
    names = set(ours.state_dict())
    after, got = kept_and_gradients(ours, *arguments, **extra)
    assert after < before / 3
    assert all(torch.equal(got[k], expected[k]) for k in expected)
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        twin.conv_in.weight.zero_()  # the copy runs its own layers, not the original's
        twin.mid_block.resnets[0].conv1.weight.zero_()
    assert kept_and_gradients(ours, *arguments, **extra)[0] == after
    changed = kept_and_gradients(twin, *arguments, **extra)[1]
    assert not torch.equal(changed["conv_out.weight"], got["conv_out.weight"])
    ours.disable_gradient_checkpointing()
    assert kept_and_gradients(ours, *arguments, **extra)[0] == before
    assert set(ours.state_dict()) == names == set(UNet2DConditionModel(config).state_dict())


def test_checkpointing_in_bfloat16_and_without_gradients():
    config = small(2)
    ours = randomize(UNet2DConditionModel(config), 0)
    arguments = inputs(config, length=7)
    with torch.autocast("cpu", torch.bfloat16):
        _, expected = kept_and_gradients(ours, *arguments)
        ours.enable_gradient_checkpointing()
        _, got = kept_and_gradients(ours, *arguments)
    assert all(torch.equal(got[k], expected[k]) for k in expected)
    with torch.no_grad():
        assert not ours(*arguments).requires_grad


def test_a_recorder_is_called_once_with_checkpointing():
    config = small(2)
    ours = randomize(UNet2DConditionModel(config), 0)
    arguments, seen = inputs(config, length=7), []
    expected = ours(*arguments, recorder=lambda name, weights: None)
    ours.enable_gradient_checkpointing()
    out = ours(*arguments, recorder=lambda name, weights: seen.append(name))
    out.square().mean().backward()
    assert torch.equal(out, expected)
    layers = [name for name, m in ours.named_modules() if isinstance(m, Attention)]
    assert sorted(seen) == sorted(layers)


def test_checkpointing_on_and_off_leaves_nothing_behind():
    """No forward of its own in any module: that would be a cycle, and keep the memory."""
    ours = UNet2DConditionModel(small(2))
    ours.enable_gradient_checkpointing()
    assert any("forward" in vars(module) for module in ours.modules())
    ours.disable_gradient_checkpointing()
    assert not any("forward" in vars(module) for module in ours.modules())
    alive = [weakref.ref(module) for module in ours.modules()]
    gc.disable()
    try:
        del ours
        assert not any(module() is not None for module in alive)
    finally:
        gc.enable()


def test_checkpointing_gives_back_a_forward_of_the_module_s_own():
    """What somebody else has put in a module's place is there again afterwards."""
    ours = UNet2DConditionModel(small(2))
    block = ours.mid_block.resnets[0]
    theirs = block.forward = types.MethodType(lambda self, x, temb: x, block)
    ours.enable_gradient_checkpointing()
    assert block.forward is not theirs
    ours.disable_gradient_checkpointing()
    assert block.forward is theirs


# Planted traps ------------------------------------------------------------------------

def quiet(model):
    """Shrink what flows along the residual path, so that the eps of the norms matter."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("conv_in", "conv2", "conv_shortcut", "proj_",
                                         "samplers", "to_out", "ff.net.2")):
            parameter.data *= 3e-3
    return model


def each(model, kind):
    found = [m for m in model.modules() if isinstance(m, kind)]
    assert found, f"no {kind} to spoil"
    return found


def override(module, forward):
    module.forward = types.MethodType(forward, module)


def resnet_eps(model):
    for block in each(model, unet_module.ResnetBlock2D):
        block.norm1.eps = block.norm2.eps = 1e-6


def output_eps(model):
    model.conv_norm_out.eps = 1e-6


def transformer_eps(model):
    for block in each(model, Transformer2DModel):
        block.norm.eps = 1e-5


def layer_norm_eps(model):
    for norm in each(model, torch.nn.LayerNorm):
        norm.eps = 1e-6


def head_width_for_head_count(model):
    """attention_head_dim read as what it says: the width of a head."""
    changed = 0
    for layer in each(model, Attention):
        changed += layer.heads != layer.to_q.out_features // 4
        layer.heads = layer.to_q.out_features // 4
    assert changed


def geglu_swapped(model):
    def forward(self, x):
        gate, value = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)
    for layer in each(model, GEGLU):
        override(layer, forward)


def geglu_tanh(model):
    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate, approximate="tanh")
    for layer in each(model, GEGLU):
        override(layer, forward)


def geglu_quick(model):
    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * gate * torch.sigmoid(1.702 * gate)
    for layer in each(model, GEGLU):
        override(layer, forward)


def self_attention_twice(model):
    """attn2 looks at the picture again (the context's width allows it here)."""
    for layer in each(model, BasicTransformerBlock):
        inner = layer.attn2.forward
        layer.attn2.forward = lambda x, context, inner=inner, **more: inner(
            x, x[..., :1].expand(*x.shape[:2], CROSS), **more)


def no_transformer_residual(model):
    for layer in each(model, Transformer2DModel):
        inner = layer.forward
        layer.forward = lambda x, *more, inner=inner: inner(x, *more) - x


def time_mlp_without_activation(model):
    override(model.time_embedding,
             lambda self, x: self.linear_2(self.linear_1(x)))


def deaf_to_the_time(model):
    override(model.time_embedding,
             lambda self, x: torch.zeros(x.shape[0], self.linear_2.out_features))


def resnet_time_without_activation(model):
    """SiLU before time_emb_proj forgotten: fed x with silu(x) = the old input."""
    for block in each(model, unet_module.ResnetBlock2D):
        inner = block.time_emb_proj.forward
        values = {}
        block.register_forward_pre_hook(lambda m, args, v=values: v.update(temb=args[1]))
        block.time_emb_proj.forward = lambda x, inner=inner, v=values: inner(v["temb"])


def downsample_padding(model):
    for block in each(model, unet_module.Downsample2D):
        override(block, lambda self, x: F.conv2d(F.pad(x, (0, 1, 0, 1)), self.conv.weight,
                                                 self.conv.bias, stride=2))


def skip_first(model):
    """cat([skip, x]) for cat([x, skip]): channels of the two change places."""
    for level in each(model, unet_module.UpBlock):
        before = [level.resnets[0].norm1.num_channels]
        for resnet in level.resnets:
            inner = resnet.forward

            def forward(x, temb, inner=inner, level=level):
                skip = level.last_skip
                own = x.shape[1] - skip
                return inner(torch.cat([x[:, own:], x[:, :own]], dim=1), temb)
            resnet.forward = forward
        assert before

        def run(self, x, temb, context, skips, recorder=None):
            for i, resnet in enumerate(self.resnets):
                skip = skips.pop()
                self.last_skip = skip.shape[1]
                x = resnet(torch.cat([x, skip], dim=1), temb)
                if self.attentions:
                    x = self.attentions[i](x, context)
            for upsample in self.upsamplers:
                x = upsample(x, skips[-1].shape[2:])
            return x
        override(level, run)


def bilinear(model):
    for block in each(model, unet_module.Upsample2D):
        override(block, lambda self, x, size=None: self.conv(
            F.interpolate(x, size=size, mode="bilinear")))


def places_transposed(model):
    """(B, C, H, W) flattened column by column and put back row by row."""
    for layer in each(model, Transformer2DModel):
        override(layer.proj_out, lambda self, x: F.conv2d(
            x.transpose(2, 3).reshape(x.shape), self.weight, self.bias))


TRAPS = [resnet_eps, output_eps, transformer_eps, layer_norm_eps, head_width_for_head_count,
         geglu_swapped, geglu_tanh, geglu_quick, self_attention_twice,
         no_transformer_residual, time_mlp_without_activation, deaf_to_the_time,
         resnet_time_without_activation, downsample_padding, skip_first, bilinear,
         places_transposed]


@pytest.fixture(scope="module", params=[lambda m: m, quiet], ids=["loud", "quiet"])
def scene(request):
    config = small(3, attention_head_dim=8)
    reference = request.param(randomize(Reference.from_config(config.to_dict()), 2))
    ours = load_into(UNet2DConditionModel(config), reference)
    arguments = inputs(config, (16, 12), length=7)
    with torch.no_grad():
        return ours, arguments, reference(*arguments).sample


def test_parity_on_the_scenes_of_the_traps(scene):
    ours, arguments, expected = scene
    with torch.no_grad():
        assert relative_error(ours(*arguments), expected) <= TOLERANCE


NOTICED = {}


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
def test_planted_trap(scene, trap):
    """Collects the error that each trap makes; judged over both scenes below."""
    ours, arguments, expected = scene
    spoiled = copy.deepcopy(ours)
    trap(spoiled)
    with torch.no_grad():
        error = relative_error(spoiled(*arguments), expected)
    NOTICED[trap.__name__] = max(error, NOTICED.get(trap.__name__, 0))


def test_every_planted_trap_was_noticed():
    missed = {trap.__name__: NOTICED.get(trap.__name__, 0) for trap in TRAPS
              if not NOTICED.get(trap.__name__, 0) > 10 * TOLERANCE}
    assert not missed, f"parity would not notice: {missed}"


@pytest.mark.parametrize("name, spoil", [
    ("sines first", dict(flip_sin_to_cos=False)), ("frequency shift", dict(freq_shift=1.0)),
    ("period", dict(max_period=1000.0))])
def test_planted_trap_in_the_time_embedding(scene, name, spoil, monkeypatch):
    ours, arguments, expected = scene
    right = unet_module.timestep_embedding
    monkeypatch.setattr(unet_module, "timestep_embedding",
                        lambda t, dim: right(t, dim, **spoil))
    with torch.no_grad():
        assert relative_error(ours(*arguments), expected) > 10 * TOLERANCE


def test_planted_linear_projection_changes_the_shapes():
    """proj_in as a linear layer gives the same numbers and another file: shapes notice."""
    config = small(2)
    theirs = Reference.from_config(config.to_dict() | {"use_linear_projection": True})
    ours = UNet2DConditionModel(config)
    differing = {k for k in shapes(ours) if shapes(ours)[k] != shapes(theirs)[k]}
    assert differing and all(".proj_in." in k or ".proj_out." in k for k in differing)


def test_feed_forward_alone():
    """The tanh GELU is a small error in the whole network: here it is measured alone."""
    from diffusers.models.attention import FeedForward as Theirs

    theirs = randomize(Theirs(32, activation_fn="geglu"), 0)
    ours = load_into(FeedForward(32), theirs)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(x)
        assert relative_error(ours(x), expected) <= 1e-6
        for trap in (geglu_tanh, geglu_quick, geglu_swapped):
            spoiled = copy.deepcopy(ours)
            trap(spoiled)
            assert relative_error(spoiled(x), expected) > 10 * TOLERANCE


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        small(2).in_channels = 5
