"""sdlib.attention against torch's fused kernel and diffusers' Attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention as Reference
from diffusers.models.attention_processor import AttnProcessor2_0
from helpers import load_into, randomize, relative_error, shapes

import sdlib.attention as module
from sdlib.attention import (
    Attention,
    attention,
    attention_weights,
    combine_masks,
    merge_heads,
    split_heads,
)

TOLERANCE = 1e-5
B, HEADS, LQ, LK = 2, 8, 12, 7


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def qkv(lq=LQ, lk=LK, d=16, dv=16, dtype=torch.float32):
    return (normal(B, HEADS, lq, d, seed=1, dtype=dtype),
            normal(B, HEADS, lk, d, seed=2, dtype=dtype),
            normal(B, HEADS, lk, dv, seed=3, dtype=dtype))


KEEP = torch.tensor([[1, 1, 1, 0, 1, 0, 1], [1, 0, 0, 1, 1, 1, 0]], dtype=torch.bool)


# ---- the explicit functions against torch's kernel

@pytest.mark.parametrize("dv", [16, 5])
@pytest.mark.parametrize("kind", ["none", "bool", "per head", "float", "row"])
def test_attention_equals_fused_kernel(kind, dv):
    q, k, v = qkv(dv=dv)
    mask = {"none": None,
            "bool": KEEP[:, None, None, :],
            "per head": normal(B, HEADS, LQ, LK, seed=4) > -1,
            "float": normal(LQ, LK, seed=5),
            "row": KEEP[:1]}[kind]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert relative_error(attention(q, k, v, mask), expected) < TOLERANCE


def test_causal_equals_fused_kernel():
    q, k, v = qkv(lk=LQ)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert relative_error(attention(q, k, v, causal=True), expected) < TOLERANCE


@pytest.mark.parametrize("floating", [False, True])
def test_mask_and_causal_together(floating):
    q, k, v = qkv(lk=LQ)
    keep = torch.ones(B, 1, 1, LQ, dtype=torch.bool)
    keep[1, ..., LQ // 2:] = False
    both = keep & torch.ones(LQ, LQ, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=both)
    mask = torch.zeros(keep.shape).masked_fill(~keep, -math.inf) if floating else keep
    assert relative_error(attention(q, k, v, mask, causal=True), expected) < TOLERANCE


def test_weights_are_weights():
    q, k, _ = qkv()
    weights = attention_weights(q, k, KEEP[:, None, None, :])
    assert weights.shape == (B, HEADS, LQ, LK)
    assert (weights >= 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(B, HEADS, LQ))
    assert (weights[~KEEP[:, None, None, :].expand_as(weights)] == 0).all()


@pytest.mark.parametrize("floating", [False, True])
def test_a_query_that_may_look_nowhere_gets_zeros_and_finite_gradients(floating):
    q, k, v = (x.requires_grad_() for x in qkv())
    keep = torch.ones(LQ, LK, dtype=torch.bool)
    keep[3] = False
    mask = torch.zeros(LQ, LK).masked_fill(~keep, -math.inf) if floating else keep
    out = attention(q, k, v, mask)
    assert (out[:, :, 3] == 0).all() and out.isfinite().all()
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert relative_error(out, fused) < TOLERANCE
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_large_scores_do_not_overflow():
    q, k, v = qkv()
    out = attention(1e3 * q, 1e3 * k, v)
    expected = F.scaled_dot_product_attention(1e3 * q, 1e3 * k, v)
    assert out.isfinite().all() and relative_error(out, expected) < TOLERANCE


def test_gradients_equal_fused_kernel():
    def gradients(function):
        q, k, v = (x.double().requires_grad_() for x in qkv())
        out = function(q, k, v, KEEP[:, None, None, :])
        return torch.autograd.grad(out.sin().sum(), (q, k, v))

    for ours, theirs in zip(gradients(attention),
                            gradients(F.scaled_dot_product_attention), strict=True):
        assert relative_error(ours, theirs) < 1e-10


def test_heads_round_trip_and_order():
    x = normal(B, LQ, 24)
    split = split_heads(x, 4)
    assert split.shape == (B, 4, LQ, 6)
    assert torch.equal(split[:, 1], x[..., 6:12])  # consecutive channels form a head
    assert torch.equal(merge_heads(split), x)


# ---- the module against diffusers' Attention

CASES = {  # query_dim, cross_attention_dim, heads, dim_head, bias
    "self": (64, None, 8, 8, False),
    "cross": (64, 96, 8, 8, False),
    "widths differ": (48, 40, 6, 12, False),
    "vae": (64, None, 1, 64, True),
}


def pair(case, seed=0):
    """Our module and diffusers', with the same random numbers in every tensor."""
    query_dim, cross, heads, dim_head, bias = CASES[case]
    reference = Reference(query_dim=query_dim, cross_attention_dim=cross, heads=heads,
                          dim_head=dim_head, bias=bias, processor=AttnProcessor2_0())
    randomize(reference, seed)
    ours = load_into(Attention(query_dim, cross, heads, dim_head, bias), reference)
    return ours, reference


def inputs(case, lq=LQ, lk=LK):
    query_dim, cross = CASES[case][:2]
    context = None if cross is None else normal(B, lk, cross, seed=8)
    return normal(B, lq, query_dim, seed=7), context


@pytest.mark.parametrize("lk", [1, 7, 77, 154])
@pytest.mark.parametrize("case", CASES)
def test_module_equals_diffusers(case, lk):
    ours, reference = pair(case)
    x, context = inputs(case, lk=lk)
    with torch.no_grad():
        expected = reference(x, encoder_hidden_states=context)
        assert relative_error(ours(x, context), expected) < TOLERANCE


@pytest.mark.parametrize("case", ["cross", "widths differ"])
def test_masked_module_equals_diffusers(case):
    ours, reference = pair(case)
    x, context = inputs(case)
    bias = torch.zeros(B, 1, LK).masked_fill(~KEEP[:, None, :], -10000.0)
    with torch.no_grad():
        expected = reference(x, encoder_hidden_states=context, attention_mask=bias)
        assert relative_error(ours(x, context, KEEP[:, None, None, :]), expected) < TOLERANCE
        assert relative_error(ours(x, context, bias[:, None]), expected) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_recorder_path_equals_fused_path(case, masked, causal):
    ours, _ = pair(case)
    x, context = inputs(case, lq=LK, lk=LK)
    mask = KEEP[:, None, None, :] if masked else None
    seen = []
    with torch.no_grad():
        fused = ours(x, context, mask, causal)
        explicit = ours(x, context, mask, causal, recorder=seen.append)
    assert relative_error(explicit, fused) < TOLERANCE
    (weights,) = seen
    assert weights.shape == (B, ours.heads, LK, LK)
    if not masked:
        assert torch.allclose(weights.sum(-1), torch.ones(B, ours.heads, LK))
    if causal:
        assert (weights.triu(1) == 0).all()


def test_half_precision_mask_of_another_dtype():
    ours, _ = pair("cross")
    ours = ours.to(torch.bfloat16)
    x, context = (value.to(torch.bfloat16) for value in inputs("cross"))
    bias = torch.zeros(B, 1, 1, LK).masked_fill(~KEEP[:, None, None, :], -math.inf)
    assert relative_error(ours(x, context, bias, recorder=lambda w: None),
                          ours(x, context, bias)) < 0.02


@pytest.mark.parametrize("query_dim", [320, 640, 1280])
@pytest.mark.parametrize("cross", [None, 768])
def test_names_and_shapes_at_sd_size(query_dim, cross):
    arguments = dict(query_dim=query_dim, cross_attention_dim=cross, heads=8,
                     dim_head=query_dim // 8)
    with torch.device("meta"):
        ours, reference = Attention(**arguments), Reference(**arguments)
    assert shapes(ours) == shapes(reference)
    assert list(ours.state_dict()) == list(reference.state_dict())


def test_names_and_shapes_of_the_vae_layer():
    with torch.device("meta"):
        ours = Attention(512, heads=1, dim_head=512, bias=True)
        reference = Reference(512, heads=1, dim_head=512, bias=True)
    assert shapes(ours) == shapes(reference)


# ---- planted mistakes: the parity test must notice each of them

def no_scale(q, k, v, mask, causal):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=1)


def scale_by_d(q, k, v, mask, causal):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1 / q.shape[-1])


def scale_by_model_width(q, k, v, mask, causal):
    width = q.shape[1] * q.shape[-1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=width ** -0.5)


def no_mask(q, k, v, mask, causal):
    return F.scaled_dot_product_attention(q, k, v)


def inverted_mask(q, k, v, mask, causal):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~mask)


def mask_after_softmax(q, k, v, mask, causal):
    return (attention_weights(q, k) * mask) @ v


def mask_as_number(q, k, v, mask, causal):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))


def softmax_over_queries(q, k, v, mask, causal):
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask.expand_as(scores), -math.inf)
    return scores.softmax(dim=-2).nan_to_num() @ v


def keys_and_values_swapped(q, k, v, mask, causal):
    return F.scaled_dot_product_attention(q, v, k, attn_mask=mask)


def heads_share_the_weights(q, k, v, mask, causal):
    weights = attention_weights(q, k, mask).mean(1, keepdim=True)
    return weights @ v


def split_interleaved(x, heads):
    return x.unflatten(2, (-1, heads)).permute(0, 3, 1, 2)


def split_by_view(x, heads):
    return x.reshape(x.shape[0], heads, x.shape[1], x.shape[2] // heads)


def merge_by_view(x):
    return x.reshape(x.shape[0], x.shape[2], -1)


TRAPS = {
    "no scale": ("_fused_attention", no_scale),
    "scale 1/d": ("_fused_attention", scale_by_d),
    "scale from the whole width": ("_fused_attention", scale_by_model_width),
    "mask forgotten": ("_fused_attention", no_mask),
    "mask inverted": ("_fused_attention", inverted_mask),
    "mask after the softmax": ("_fused_attention", mask_after_softmax),
    "mask added as 0 and 1": ("_fused_attention", mask_as_number),
    "softmax over the queries": ("_fused_attention", softmax_over_queries),
    "keys and values swapped": ("_fused_attention", keys_and_values_swapped),
    "one set of weights for all heads": ("_fused_attention", heads_share_the_weights),
    "heads interleaved": ("split_heads", split_interleaved),
    "heads split by view": ("split_heads", split_by_view),
    "heads merged by view": ("merge_heads", merge_by_view),
}


def trap_error(ours, reference):
    """How far `ours` is from diffusers on the masked cross-attention."""
    x, context = inputs("cross")
    bias = torch.zeros(B, 1, LK).masked_fill(~KEEP[:, None, :], -10000.0)
    with torch.no_grad():
        expected = reference(x, encoder_hidden_states=context, attention_mask=bias)
        return relative_error(ours(x, context, KEEP[:, None, None, :]), expected)


@pytest.mark.parametrize("trap", TRAPS)
def test_parity_notices_a_wrong_step(trap, monkeypatch):
    ours, reference = pair("cross")
    assert trap_error(ours, reference) < TOLERANCE
    name, wrong = TRAPS[trap]
    monkeypatch.setattr(module, name, wrong)
    assert trap_error(ours, reference) > 10 * TOLERANCE


@pytest.mark.parametrize("heads", [1, 2, 4, 16])
def test_parity_notices_a_wrong_head_count(heads):
    ours, reference = pair("cross")
    ours.heads = heads
    assert trap_error(ours, reference) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["to_q.weight", "to_k.weight", "to_v.weight",
                                  "to_out.0.weight", "to_out.0.bias"])
def test_parity_notices_a_missing_tensor(name):
    ours, reference = pair("cross")
    with torch.no_grad():
        ours.get_parameter(name).zero_()
    assert trap_error(ours, reference) > 10 * TOLERANCE


def test_parity_notices_a_missing_causal_mask():
    q, k, v = qkv(lk=LQ)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert relative_error(attention(q, k, v), expected) > 10 * TOLERANCE


# ---- what a reader may do wrong

def test_bad_head_counts():
    with pytest.raises(ValueError, match="8 heads cannot share 100 channels"):
        split_heads(torch.zeros(1, 3, 100), 8)
    with pytest.raises(ValueError, match="0 heads"):
        split_heads(torch.zeros(1, 3, 8), 0)
    with pytest.raises(ValueError, match="heads=0, dim_head=64"):
        Attention(64, heads=0)
    with pytest.raises(ValueError, match="dim_head=0"):
        Attention(64, dim_head=0)


@pytest.mark.parametrize("record", [None, lambda weights: None])
def test_bad_inputs_of_the_module(record):
    ours, _ = pair("cross")
    x, context = inputs("cross")
    for arguments, message in [
        ((x, context[..., :-1]), r"encoder_hidden_states must be \(batch, length, 96\), "
                                 r"got \(2, 7, 95\)"),
        ((x,), r"encoder_hidden_states must be \(batch, length, 96\)"),
        ((context, context), r"hidden_states must be \(batch, length, 64\)"),
        ((x[0], context), r"got \(12, 64\)"),
        ((x, context[:1]), "2 sequences but 1 contexts"),
        ((x, context, KEEP[0]), r"mask of shape \(7,\) does not broadcast"),
        ((x, context, KEEP), r"mask of shape \(2, 7\) does not broadcast"),
        ((x, context, KEEP[:, None, None, :].long()), "dtype torch.int64: use bool"),
        ((x, context, None, True), "causal needs as many queries as keys, got 12 and 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            ours(*arguments, recorder=record)


def test_combine_masks_leaves_no_mask_alone():
    assert combine_masks(None, False, (B, HEADS, LQ, LK)) is None
    seen = combine_masks(None, True, (B, HEADS, 3, 3))
    assert seen.tolist() == [[True, False, False], [True, True, False], [True, True, True]]
