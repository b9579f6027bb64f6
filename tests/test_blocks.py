"""Chapter 07: the blocks that the VAE and the U-Net share, against diffusers'."""

import copy

import pytest
import torch
from diffusers.models.downsampling import Downsample2D as TheirDownsample
from diffusers.models.resnet import ResnetBlock2D as TheirResnet
from diffusers.models.upsampling import Upsample2D as TheirUpsample
from helpers import load_into, randomize, relative_error
from torch import nn

from sdlib.blocks import Downsample2D, ResnetBlock2D, Upsample2D

TOLERANCE = 1e-5


def picture(channels, height=10, width=14, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, height, width, generator=generator)


@pytest.mark.parametrize("channels", [(32, 32), (32, 64), (64, 32)])
@pytest.mark.parametrize("temb_channels", [None, 48])
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
@torch.no_grad()
def test_resnet_block_equals_diffusers(channels, temb_channels, eps):
    theirs = randomize(TheirResnet(in_channels=channels[0], out_channels=channels[1],
                                   temb_channels=temb_channels, groups=16, eps=eps))
    ours = load_into(ResnetBlock2D(*channels, temb_channels, groups=16, eps=eps), theirs)
    x = picture(channels[0])
    temb = None if temb_channels is None else torch.randn(2, temb_channels)
    assert relative_error(ours(x, temb), theirs(x, temb)) < TOLERANCE
    small = 1e-3 * x  # here eps, beside the variance, can be seen
    assert relative_error(ours(small, temb), theirs(small, temb)) < TOLERANCE


@torch.no_grad()
def test_planted_mistakes_in_the_resnet_block_are_noticed():
    theirs = randomize(TheirResnet(in_channels=32, out_channels=64, temb_channels=48,
                                   groups=16, eps=1e-6))
    ours = load_into(ResnetBlock2D(32, 64, 48, groups=16, eps=1e-6), theirs)
    x, temb = picture(32) * 1e-2, torch.randn(2, 48)
    reference = theirs(x, temb)
    assert relative_error(ours(x, temb), reference) < TOLERANCE

    def wrong(change):
        spoiled = copy.deepcopy(ours)
        change(spoiled)
        return relative_error(spoiled(x, temb), reference)

    def other_eps(block):
        block.norm1.eps = block.norm2.eps = 1e-5

    def other_groups(block):
        block.norm1.num_groups = 32

    def no_activation_of_time(block):
        silu = nn.functional.silu
        block.time_emb_proj.register_forward_pre_hook(
            lambda _, inputs: (temb if inputs[0].equal(silu(temb)) else None,))

    def no_shortcut(block):
        nn.init.zeros_(block.conv_shortcut.weight)

    def norm_after_convolution(block):
        norm = copy.deepcopy(block.norm2)
        block.norm2 = nn.Identity()
        block.conv2 = nn.Sequential(block.conv2, norm)

    for change in (other_eps, other_groups, no_activation_of_time, no_shortcut,
                   norm_after_convolution):
        assert wrong(change) > 10 * TOLERANCE, change.__name__


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", [(8, 12), (7, 10), (9, 9)])
@torch.no_grad()
def test_downsample_equals_diffusers(padding, size):
    theirs = randomize(TheirDownsample(16, use_conv=True, padding=padding, name="op"))
    ours = load_into(Downsample2D(16, padding), theirs)
    x = picture(16, *size)
    assert ours(x).shape == theirs(x).shape
    assert relative_error(ours(x), theirs(x)) < TOLERANCE
    if size == (8, 12):  # the other padding gives the same shape and other numbers
        other = load_into(Downsample2D(16, 1 - padding), theirs)
        assert other(x).shape == ours(x).shape
        assert relative_error(other(x), theirs(x)) > 10 * TOLERANCE


@pytest.mark.parametrize("size", [None, (13, 19), (14, 20)])
@torch.no_grad()
def test_upsample_equals_diffusers(size):
    theirs = randomize(TheirUpsample(16, use_conv=True))
    ours = load_into(Upsample2D(16), theirs)
    x = picture(16, 7, 10)
    assert ours(x, size).shape[-2:] == (size or (14, 20))
    assert relative_error(ours(x, size), theirs(x, size)) < TOLERANCE


def test_bad_input_is_explained():
    with pytest.raises(ValueError, match="time embedding is missing"):
        ResnetBlock2D(32, 32, temb_channels=8)(picture(32))
    with pytest.raises(ValueError, match="time embedding is not wanted"):
        ResnetBlock2D(32, 32)(picture(32), torch.randn(2, 8))
    with pytest.raises(ValueError, match="padding must be 0 or 1, not 2"):
        Downsample2D(8, padding=2)
