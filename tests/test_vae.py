"""Chapter 07: the autoencoder against diffusers', its traps, its files, its loss."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL as Theirs
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from helpers import load_into, randomize, relative_error, shapes
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from sdlib.blocks import Downsample2D
from sdlib.vae import (
    AttentionBlock,
    AutoencoderKL,
    DiagonalGaussian,
    VAEConfig,
    convert_old_attention,
    vae_loss,
)

TOLERANCE = 1e-5
SMALL = VAEConfig(block_out_channels=(16, 32, 48), layers_per_block=2, norm_num_groups=8,
                  sample_size=32)
EVEN = replace(SMALL, block_out_channels=(16, 16, 16), down_block_types=None,
               up_block_types=None)  # equal widths: a wrong order of levels fits


def their_config(config):
    """The arguments of diffusers' class, without what it does not take."""
    return config.to_dict()


def pair(config=SMALL, seed=0):
    """Theirs and ours with the same random weights, every tensor randomized."""
    theirs = randomize(Theirs(**their_config(config)), seed)
    return theirs, load_into(AutoencoderKL(config), theirs)


def pictures(height=32, width=32, seed=0, channels=3):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(2, channels, height, width, generator=generator) - 1


def latents(height=8, width=8, seed=0):
    return torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(seed))


def flat(value=0.25):
    return torch.full((1, 3, 32, 32), value)


def encode_error(ours, theirs, x):
    """The largest error among mean, log-variance and standard deviation."""
    a, b = ours.encode(x), theirs.encode(x).latent_dist
    return max(relative_error(getattr(a, name), getattr(b, name))
               for name in ("mean", "logvar", "std"))


def decode_error(ours, theirs, z):
    return relative_error(ours.decode(z), theirs.decode(z).sample)


# Parity

@pytest.mark.parametrize("config", [
    SMALL, EVEN, VAEConfig.emoji(),
    VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
              in_channels=1, out_channels=1, latent_channels=3, sample_size=16),
    VAEConfig(block_out_channels=(32,), layers_per_block=1, norm_num_groups=32),
], ids=["small", "even", "emoji", "gray", "one-level"])
@torch.no_grad()
def test_encode_and_decode_equal_diffusers(config):
    theirs, ours = pair(config)
    x = pictures(32, 48, channels=config.in_channels)  # not square
    assert encode_error(ours, theirs, x) < TOLERANCE
    z = ours.encode(x).mode()
    assert z.shape == (2, config.latent_channels, 32 // config.factor, 48 // config.factor)
    assert ours.decode(z).shape == x.shape
    assert decode_error(ours, theirs, z) < TOLERANCE


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.25, 1.0])
@torch.no_grad()
def test_flat_pictures_equal_diffusers(value):
    """On a flat picture variances are small, so that eps and padding matter most."""
    theirs, ours = pair()
    assert encode_error(ours, theirs, flat(value)) < TOLERANCE
    z = torch.full((1, 4, 8, 8), value)
    assert decode_error(ours, theirs, z) < TOLERANCE


def test_gradients_equal_diffusers():
    theirs, ours = pair()
    x = pictures()
    for model in (theirs, ours):
        posterior = model.encode(x)
        posterior = getattr(posterior, "latent_dist", posterior)
        y = model.decode(posterior.mode())
        y = getattr(y, "sample", y)
        (y.square().mean() + posterior.kl().mean() / x.numel()).backward()
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = reference[name].grad.abs().max()
        if scale > 1e-7:  # the bias of the keys has no influence: its gradient is noise
            assert relative_error(parameter.grad, reference[name].grad) < 1e-3, name


def test_sampling_equals_diffusers_for_the_same_generator():
    moments = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    ours, theirs = DiagonalGaussian(moments), DiagonalGaussianDistribution(moments)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    assert torch.equal(ours.sample(generators[0]), theirs.sample(generators[1]))
    assert torch.equal(ours.mode(), theirs.mode())
    assert relative_error(ours.kl(), theirs.kl()) < TOLERANCE


# Stable Diffusion's size

def test_names_shapes_and_counts_at_the_size_of_stable_diffusion():
    with torch.device("meta"):
        ours = AutoencoderKL(VAEConfig.sd15())
        theirs = Theirs(**their_config(VAEConfig.sd15()))
    assert shapes(ours) == shapes(theirs)
    count = {name: sum(p.numel() for p in module.parameters())
             for name, module in [("all", ours), ("encoder", ours.encoder),
                                  ("decoder", ours.decoder)]}
    assert count == {"all": 83_653_863, "encoder": 34_163_592, "decoder": 49_490_179}
    assert sum(p.numel() for m in (ours.quant_conv, ours.post_quant_conv)
               for p in m.parameters()) == 92
    assert len(ours.state_dict()) == 248
    assert VAEConfig.sd15().factor == 8 and VAEConfig.sd15().scaling_factor == 0.18215


def test_the_small_preset():
    config = VAEConfig.emoji()
    with torch.device("meta"):
        model = AutoencoderKL(config)
        assert model.encode(torch.empty(2, 3, 64, 64)).mean.shape == (2, 4, 16, 16)
        assert model.decode(torch.empty(2, 4, 16, 16)).shape == (2, 3, 64, 64)
    assert config.factor == 4
    assert sum(p.numel() for p in model.parameters()) == 1_524_703


# Planted mistakes: each must be seen by the comparison that the tests above make

def other_eps(model):
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-5


def symmetric_padding(model):
    for module in model.modules():
        if isinstance(module, Downsample2D):
            module.padding = 1
            module.conv.padding = (1, 1)


def padding_at_the_other_end(model):
    class Wrong(Downsample2D):
        def forward(self, x):
            return self.conv(F.pad(x, (1, 0, 1, 0)))

    for module in model.modules():
        if isinstance(module, Downsample2D):
            module.__class__ = Wrong


def no_quant_conv(model):
    model.quant_conv = nn.Identity()


def no_post_quant_conv(model):
    model.post_quant_conv = nn.Identity()


def scaled_inside(model):
    encode, decode, s = model.encode, model.decode, model.config.scaling_factor

    def scaled(x):
        posterior = encode(x)
        posterior.mean = posterior.mean * s
        return posterior

    model.encode = scaled
    model.decode = lambda z: decode(z / s)


def reversed_levels(model):
    """Levels loaded in the order of the single file, where up.0 is the last one."""
    first, second, _ = model.decoder.up_blocks
    state = copy.deepcopy(first.state_dict())
    first.load_state_dict(second.state_dict())
    second.load_state_dict(state)


def reversed_encoder_levels(model):
    first, second, _ = model.encoder.down_blocks
    state = copy.deepcopy(first.state_dict())
    first.load_state_dict(second.state_dict())
    second.load_state_dict(state)


def attentions(model):
    return [m for m in model.modules() if isinstance(m, AttentionBlock)]


def attention_without_residual(model):
    for block in attentions(model):
        block.register_forward_hook(lambda _, inputs, output: output - inputs[0])


def attention_without_norm(model):
    for block in attentions(model):
        block.group_norm = nn.Identity()


def attention_with_heads(model):
    for block in attentions(model):
        block.heads = 4


def attention_without_bias(model):
    for block in attentions(model):
        for layer in (block.to_q, block.to_k, block.to_v):
            nn.init.zeros_(layer.bias)


def queries_as_keys(model):
    for block in attentions(model):
        block.to_q, block.to_k = block.to_k, block.to_q


def middle_without_attention(model):
    for half in (model.encoder, model.decoder):
        half.mid_block.attentions[0] = nn.Identity()


def no_last_norm(model):
    model.encoder.conv_norm_out = model.decoder.conv_norm_out = nn.Identity()


def transposed_picture(model):
    encode = model.encode
    model.encode = lambda x: encode(x.transpose(2, 3))


def mean_and_variance_swapped(model):
    order = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    model.quant_conv.weight.data = model.quant_conv.weight.data[order]
    model.quant_conv.bias.data = model.quant_conv.bias.data[order]


def bilinear_upsampling(model):
    def smooth(module, inputs):
        (x,) = inputs
        low = F.avg_pool2d(x, 2)  # undo the repetition, then interpolate
        return (F.interpolate(low, scale_factor=2, mode="bilinear"),)

    for name, module in model.named_modules():
        if name.endswith("upsamplers.0.conv"):
            module.register_forward_pre_hook(smooth)


@pytest.mark.parametrize(("spoil", "where"), [
    (other_eps, "flat encode"), (symmetric_padding, "encode"),
    (padding_at_the_other_end, "encode"), (no_quant_conv, "encode"),
    (no_post_quant_conv, "decode"), (scaled_inside, "encode"), (scaled_inside, "decode"),
    (reversed_levels, "decode"), (reversed_encoder_levels, "encode"),
    (attention_without_residual, "encode"), (attention_without_residual, "decode"),
    (attention_without_norm, "encode"), (attention_with_heads, "encode"),
    (attention_without_bias, "encode"), (queries_as_keys, "decode"),
    (middle_without_attention, "decode"), (no_last_norm, "decode"),
    (transposed_picture, "encode"), (mean_and_variance_swapped, "encode"),
    (bilinear_upsampling, "decode"),
], ids=lambda value: value if isinstance(value, str) else value.__name__)
@torch.no_grad()
def test_planted_mistakes_are_noticed(spoil, where):
    theirs, ours = pair(EVEN)
    measure = {"encode": lambda m: encode_error(m, theirs, pictures()),
               "flat encode": lambda m: encode_error(m, theirs, flat()),
               "decode": lambda m: decode_error(m, theirs, latents())}[where]
    assert measure(ours) < TOLERANCE
    spoil(ours)
    assert measure(ours) > 10 * TOLERANCE


class Unclamped(DiagonalGaussian):
    def __init__(self, moments):
        self.mean, self.logvar = moments.chunk(2, dim=1)


class StdForgotten(DiagonalGaussian):
    @property
    def std(self):
        return self.logvar.exp()


class NoMinusLog(DiagonalGaussian):
    def kl(self):
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1).flatten(1).sum(1)


class MeanKL(DiagonalGaussian):
    def kl(self):
        return super().kl() / self.mean[0].numel()


@pytest.mark.parametrize(("wrong", "name"), [
    (Unclamped, "logvar"), (StdForgotten, "std"), (NoMinusLog, "kl"), (MeanKL, "kl")])
def test_planted_mistakes_in_the_gaussian_are_noticed(wrong, name):
    moments = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(2))
    moments[0, 4, 0, 0], moments[1, 5, 1, 1] = -80.0, 60.0  # a log-variance off the rails
    if name != "logvar":
        moments = moments.clamp(-5, 5)

    def value(gaussian):
        result = getattr(gaussian, name)
        return result() if callable(result) else result

    reference = value(DiagonalGaussianDistribution(moments))
    assert relative_error(value(DiagonalGaussian(moments)), reference) < TOLERANCE
    assert relative_error(value(wrong(moments)), reference) > 10 * TOLERANCE


def test_a_log_variance_off_the_rails_stays_finite():
    moments = torch.full((1, 8, 1, 1), 1.0)
    moments[:, 4:] = torch.tensor([-1e4, 1e4, -math.inf, math.inf]).view(1, 4, 1, 1)
    posterior = DiagonalGaussian(moments)
    assert posterior.logvar.flatten().tolist() == [-30, 20, -30, 20]
    assert posterior.kl().isfinite().all() and posterior.sample().isfinite().all()


# Files

def test_a_folder_of_diffusers_loads_and_agrees(tmp_path):
    theirs = randomize(Theirs(**their_config(SMALL)), 3)
    theirs.save_pretrained(tmp_path / "vae")
    ours = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert ours.config == SMALL
    with torch.no_grad():
        assert encode_error(ours, theirs, pictures()) < TOLERANCE
        assert decode_error(ours, theirs, latents()) < TOLERANCE


def test_our_folder_loads_in_diffusers_and_agrees(tmp_path):
    config = replace(SMALL, scaling_factor=0.7)
    ours = randomize(AutoencoderKL(config), 4)
    ours.save_pretrained(tmp_path / "vae")
    theirs, info = Theirs.from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.config.scaling_factor == 0.7 and theirs.config.sample_size == 32
    with torch.no_grad():
        assert encode_error(ours, theirs.eval(), pictures()) < TOLERANCE
        assert decode_error(ours, theirs, latents()) < TOLERANCE


def test_the_config_of_stable_diffusion_1_is_read():
    text = """{"_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0",
      "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
      "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D",
                           "DownEncoderBlock2D", "DownEncoderBlock2D"],
      "in_channels": 3, "latent_channels": 4, "layers_per_block": 2,
      "norm_num_groups": 32, "out_channels": 3, "sample_size": 512,
      "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D",
                         "UpDecoderBlock2D"]}"""
    assert VAEConfig.from_dict(json.loads(text)) == VAEConfig.sd15()


def old_names(state, convolutions):
    spelling = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in state.items():
        if ".attentions." in name:
            for new, before in spelling.items():
                name = name.replace(f".{new}.", f".{before}.")
            if convolutions and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        old[name] = tensor.clone()
    return old


@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("rename", [False, True])
def test_old_attention_names_and_convolutions_load(tmp_path, convolutions, rename):
    ours = randomize(AutoencoderKL(SMALL), 5)
    ours.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / AutoencoderKL.weights_name
    state = load_file(file)
    if rename:
        state = old_names(state, convolutions)
        assert "encoder.mid_block.attentions.0.query.weight" in state
    elif convolutions:
        state = {k: v[:, :, None, None] if ".attentions." in k and v.ndim == 2 else v
                 for k, v in state.items()}
    save_file({k: v.contiguous() for k, v in state.items()}, file)
    again = AutoencoderKL.from_pretrained(tmp_path / "vae")
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_convert_old_attention_leaves_the_rest_alone():
    state = AutoencoderKL(SMALL).state_dict()
    assert list(convert_old_attention(state)) == list(state)
    assert convert_old_attention(state)["quant_conv.weight"].ndim == 4
    assert shapes(convert_old_attention(old_names(state, True))) == shapes(state)
    name = "encoder.mid_block.attentions.0.{}.bias"
    both = {name.format("query"): torch.zeros(4), name.format("to_q"): torch.zeros(4)}
    with pytest.raises(ValueError, match="to_q.bias is there twice"):
        convert_old_attention(both)


# Loss

def test_loss_by_hand():
    x = torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])
    y = torch.tensor([[[[0.5, 1.0], [0.0, -0.5]]]])
    posterior = DiagonalGaussian(torch.tensor([2.0, 0.0]).view(1, 2, 1, 1))
    loss, parts = vae_loss(x, y, posterior, kl_weight=0.1, edge_weight=2.0)
    # down: (0, -1) against (-0.5, -1.5); across: (1, 0) against (0.5, -0.5)
    want = {"l1": 0.25, "kl": 2.0 / 4, "edge": 0.5}
    assert {k: v.item() for k, v in parts.items()} == pytest.approx(want)
    assert loss.item() == pytest.approx(0.25 + 0.1 * 0.5 + 2.0 * 0.5)
    assert not any(v.requires_grad for v in parts.values())


def test_loss_does_not_depend_on_the_batch_being_split():
    x, y = pictures(), pictures(seed=1)
    moments = torch.randn(2, 8, 8, 8)
    whole = vae_loss(x, y, DiagonalGaussian(moments), 0.1, 1.0)[0]
    halves = [vae_loss(*(t[i:i + 1] for t in (x, y)), DiagonalGaussian(moments[i:i + 1]),
                       0.1, 1.0)[0].item() for i in range(2)]
    assert whole.item() == pytest.approx(sum(halves) / 2, rel=1e-5)


def test_a_few_steps_of_training_lower_the_loss():
    torch.manual_seed(0)
    config = VAEConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)
    model = AutoencoderKL(config)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    x = F.interpolate(pictures(2, 2), size=(16, 16))  # four flat quarters
    losses = []
    for _ in range(30):
        y, posterior = model(x)
        loss, _ = vae_loss(x, y, posterior)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.grad is not None for p in model.parameters())


# Bad input

@pytest.mark.parametrize(("call", "message"), [
    (lambda m: m.encode(torch.zeros(1, 3, 30, 32)), "multiples of 4, not 30 x 32: crop or"),
    (lambda m: m.encode(torch.zeros(1, 3, 32, 33)), "multiples of 4, not 32 x 33"),
    (lambda m: m.encode(torch.zeros(1, 3, 0, 32)), "multiples of 4, not 0 x 32"),
    (lambda m: m.encode(torch.zeros(3, 32, 32)), r"shape \(batch, 3, height, width\)"),
    (lambda m: m.encode(torch.zeros(1, 4, 32, 32)), r"not \(1, 4, 32, 32\)"),
    (lambda m: m.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), "not torch.uint8"),
    (lambda m: m.decode(torch.zeros(1, 3, 8, 8)), r"shape \(batch, 4, height, width\)"),
    (lambda m: m.decode(torch.zeros(4, 8, 8)), r"not \(4, 8, 8\)"),
    (lambda m: vae_loss(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 4),
                        DiagonalGaussian(torch.zeros(1, 8, 2, 2))), "reconstructions"),
])
def test_bad_input_is_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call(AutoencoderKL(SMALL))


@pytest.mark.parametrize(("settings", "message"), [
    ({"block_out_channels": (16, 20)}, "20 does not split into 8 groups"),
    ({"act_fn": "relu"}, "act_fn must be 'silu', not 'relu'"),
    ({"down_block_types": ("DownEncoderBlock2D",)}, "down_block_types must be"),
    ({"up_block_types": ("AttnUpDecoderBlock2D",) * 3}, "up_block_types must be"),
    ({"mid_block_add_attention": False}, "mid_block_add_attention=False is not supported"),
    ({"shift_factor": 0.1}, "shift_factor=0.1 is not supported"),
    ({"use_quant_conv": False}, "use_quant_conv=False is not supported"),
    ({"surprise": 1}, "unknown setting 'surprise'"),
])
def test_bad_configs_are_explained(settings, message):
    good = SMALL.to_dict()
    if "block_out_channels" in settings:
        good |= {"down_block_types": None, "up_block_types": None}
    with pytest.raises(ValueError, match=message):
        VAEConfig.from_dict(good | settings)
