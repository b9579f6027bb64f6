"""The original's tensors, made by its own procedure: independent of the course's rules.

`compvis_unet` and `compvis_vae` list names and shapes in the order in which the program of
Rombach et al. builds its networks (input_blocks, middle_block, output_blocks; down, mid,
up). `OpenAICLIP` is CLIP as OpenAI wrote it, from PyTorch's own attention.
"""

from collections import OrderedDict

import torch
from torch import nn


def _put(names, prefix, *shapes):
    """A weight, and with a second shape a bias."""
    for kind, shape in zip(("weight", "bias"), shapes):
        names[f"{prefix}.{kind}"] = tuple(shape)


def _conv(names, prefix, out, inp, size=3):
    _put(names, prefix, (out, inp, size, size), (out,))


def _res_block(names, prefix, inp, out, emb):
    _put(names, f"{prefix}.in_layers.0", (inp,), (inp,))
    _conv(names, f"{prefix}.in_layers.2", out, inp)
    _put(names, f"{prefix}.emb_layers.1", (out, emb), (out,))
    _put(names, f"{prefix}.out_layers.0", (out,), (out,))
    _conv(names, f"{prefix}.out_layers.3", out, out)
    if inp != out:
        _conv(names, f"{prefix}.skip_connection", out, inp, 1)


def _transformer(names, prefix, width, context):
    _put(names, f"{prefix}.norm", (width,), (width,))
    _conv(names, f"{prefix}.proj_in", width, width, 1)
    block = f"{prefix}.transformer_blocks.0"
    for attn, other in (("attn1", width), ("attn2", context)):
        _put(names, f"{block}.{attn}.to_q", (width, width))
        _put(names, f"{block}.{attn}.to_k", (width, other))
        _put(names, f"{block}.{attn}.to_v", (width, other))
        _put(names, f"{block}.{attn}.to_out.0", (width, width), (width,))
    _put(names, f"{block}.ff.net.0.proj", (8 * width, width), (8 * width,))
    _put(names, f"{block}.ff.net.2", (width, 4 * width), (width,))
    for k in (1, 2, 3):
        _put(names, f"{block}.norm{k}", (width,), (width,))
    _conv(names, f"{prefix}.proj_out", width, width, 1)


def compvis_unet(in_channels=4, out_channels=4, model_channels=320, mult=(1, 2, 4, 4),
                 layers=2, attends=(True, True, True, False), context=768):
    """name -> shape of the original's UNetModel."""
    names, emb = {}, 4 * model_channels
    _put(names, "time_embed.0", (emb, model_channels), (emb,))
    _put(names, "time_embed.2", (emb, emb), (emb,))
    _conv(names, "input_blocks.0.0", model_channels, in_channels)
    chans, ch, n = [model_channels], model_channels, 1
    for level, m in enumerate(mult):
        for _ in range(layers):
            _res_block(names, f"input_blocks.{n}.0", ch, m * model_channels, emb)
            ch = m * model_channels
            if attends[level]:
                _transformer(names, f"input_blocks.{n}.1", ch, context)
            chans.append(ch)
            n += 1
        if level != len(mult) - 1:
            _conv(names, f"input_blocks.{n}.0.op", ch, ch)
            chans.append(ch)
            n += 1
    _res_block(names, "middle_block.0", ch, ch, emb)
    _transformer(names, "middle_block.1", ch, context)
    _res_block(names, "middle_block.2", ch, ch, emb)
    n = 0
    for level, m in reversed(list(enumerate(mult))):
        for i in range(layers + 1):
            _res_block(names, f"output_blocks.{n}.0", ch + chans.pop(), m * model_channels,
                       emb)
            ch, k = m * model_channels, 1
            if attends[level]:
                _transformer(names, f"output_blocks.{n}.1", ch, context)
                k = 2
            if level and i == layers:
                _conv(names, f"output_blocks.{n}.{k}.conv", ch, ch)
            n += 1
    _put(names, "out.0", (ch,), (ch,))
    _conv(names, "out.2", out_channels, ch)
    return names


def _vae_block(names, prefix, inp, out):
    _put(names, f"{prefix}.norm1", (inp,), (inp,))
    _conv(names, f"{prefix}.conv1", out, inp)
    _put(names, f"{prefix}.norm2", (out,), (out,))
    _conv(names, f"{prefix}.conv2", out, out)
    if inp != out:
        _conv(names, f"{prefix}.nin_shortcut", out, inp, 1)


def _vae_middle(names, prefix, width):
    _vae_block(names, f"{prefix}.block_1", width, width)
    _put(names, f"{prefix}.attn_1.norm", (width,), (width,))
    for part in ("q", "k", "v", "proj_out"):
        _conv(names, f"{prefix}.attn_1.{part}", width, width, 1)
    _vae_block(names, f"{prefix}.block_2", width, width)


def compvis_vae(ch=128, mult=(1, 2, 4, 4), layers=2, z=4):
    """name -> shape of the original's AutoencoderKL."""
    names, width = {}, ch
    _conv(names, "encoder.conv_in", ch, 3)
    for level, m in enumerate(mult):
        for i in range(layers):
            _vae_block(names, f"encoder.down.{level}.block.{i}", width, m * ch)
            width = m * ch
        if level != len(mult) - 1:
            _conv(names, f"encoder.down.{level}.downsample.conv", width, width)
    _vae_middle(names, "encoder.mid", width)
    _put(names, "encoder.norm_out", (width,), (width,))
    _conv(names, "encoder.conv_out", 2 * z, width)
    _conv(names, "decoder.conv_in", width, z)
    _vae_middle(names, "decoder.mid", width)
    for level in reversed(range(len(mult))):
        for i in range(layers + 1):
            _vae_block(names, f"decoder.up.{level}.block.{i}", width, mult[level] * ch)
            width = mult[level] * ch
        if level:
            _conv(names, f"decoder.up.{level}.upsample.conv", width, width)
    _put(names, "decoder.norm_out", (width,), (width,))
    _conv(names, "decoder.conv_out", 3, width)
    _conv(names, "quant_conv", 2 * z, 2 * z, 1)
    _conv(names, "post_quant_conv", z, z, 1)
    return names


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width, heads, mask):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(),
            c_proj=nn.Linear(4 * width, width)))
        self.ln_2 = nn.LayerNorm(width)
        self.mask = mask

    def forward(self, x):  # (L, B, D)
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    def __init__(self, width, layers, heads, mask=None):
        super().__init__()
        self.resblocks = nn.Sequential(
            *(ResidualAttentionBlock(width, heads, mask) for _ in range(layers)))

    def forward(self, x):
        return self.resblocks(x.transpose(0, 1)).transpose(0, 1)


class Visual(nn.Module):
    def __init__(self, size, patch, width, layers, heads, out):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((size // patch) ** 2 + 1, width))
        self.proj = nn.Parameter(torch.zeros(width, out))
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Tower(width, layers, heads)

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([first, x], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class OpenAICLIP(nn.Module):
    """CLIP with the names and the arithmetic of openai/CLIP's model.py."""

    def __init__(self, out, size, patch, v_width, v_layers, v_heads, length, vocab, width,
                 heads, layers):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(length, width))
        self.text_projection = nn.Parameter(torch.zeros(width, out))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.visual = Visual(size, patch, v_width, v_layers, v_heads, out)
        mask = torch.full((length, length), float("-inf")).triu(1)
        self.transformer = Tower(width, layers, heads, mask)
        self.token_embedding = nn.Embedding(vocab, width)
        self.ln_final = nn.LayerNorm(width)

    def hidden(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding
        return self.ln_final(self.transformer(x))

    def encode_text(self, ids):
        x = self.hidden(ids)
        return x[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection
