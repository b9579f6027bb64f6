"""Plausible wrong answers to the exercises of chapter 06, and what each must be told.

"06_1": [(source of the answer, a fragment of the message it must get), ...]. The sources
run with the names that the chapter's set-up, import and export cells define.
"""

WRONG = {
    "06_1": [
        ("""
def ex_06_1(scores, temperature=1.0):
    e = (scores / temperature).exp()
    return e / e.sum(dim=-1, keepdim=True)
""", "exp(1000) overflows"),
        ("""
def ex_06_1(scores, temperature=1.0):
    e = ((scores - scores.max(dim=-1, keepdim=True).values) * temperature).exp()
    return e / e.sum(dim=-1, keepdim=True)
""", "divide by it"),
        ("""
def ex_06_1(scores, temperature=1.0):
    e = ((scores - scores.max()) / temperature).exp()
    return e / e.sum()
""", "rows do not sum to 1"),
        ("""
def ex_06_1(scores, temperature=1.0):
    e = ((scores - scores.max()) / temperature).exp()
    return e / e.sum(dim=-1, keepdim=True)
""", "each row's own maximum"),
        ("""
def ex_06_1(scores, temperature=1.0):
    e = (scores - scores.max(dim=-1, keepdim=True).values).exp() / temperature
    return e / e.sum(dim=-1, keepdim=True)
""", "the temperature has no effect"),
    ],
    "06_2": [
        ("""
def ex_06_2(lengths, keys):
    return (torch.arange(keys) >= lengths[:, None])[:, None, None, :]
""", "True and False are exchanged"),
        ("""
def ex_06_2(lengths, keys):
    return torch.arange(keys) < lengths[:, None]
""", "be taken for heads or queries"),
        ("""
def ex_06_2(lengths, keys):
    return (torch.arange(keys) <= lengths[:, None])[:, None, None, :]
""", "words are counted from 0"),
        ("""
def ex_06_2(lengths, keys):
    return (torch.arange(keys) < lengths[:, None])[:, None, None, :].float()
""", "use bool"),
        ("""
def ex_06_2(lengths, keys):
    return (torch.arange(keys).flip(0) < lengths[:, None])[:, None, None, :]
""", "padding stands at the end"),
    ],
    "06_3": [
        ("""
def ex_06_3(side):
    return 2 * (4 * (side // 8) ** 4 * 256 + 6 * (side // 16) ** 4 * 512)
""", "half of the right number"),
        ("""
def ex_06_3(side):
    return 4 * (4 * (side // 8) ** 4 * 256 * 4 + 6 * (side // 16) ** 4 * 512 * 8)
""", "do not multiply by h again"),
        ("""
def ex_06_3(side):
    return 4 * (4 * (side // 8) ** 2 * 256 + 6 * (side // 16) ** 2 * 512)
""", "16 times, not 4"),
        ("""
def ex_06_3(side):
    return 4 * ((side // 8) ** 4 * 256 + (side // 16) ** 4 * 512)
""", "one layer per level"),
        ("""
def ex_06_3(side):
    return 4 * (side // 8) ** 4 * 256 + 6 * (side // 16) ** 4 * 512
""", "a quarter of the right number"),
    ],
    "06_4": [
        ("""
def ex_06_4(weights, word, height, width):
    return weights[..., word].sum(dim=1).unflatten(1, (height, width))
""", "average over the heads"),
        ("""
def ex_06_4(weights, word, height, width):
    return weights[:, :, word].mean(dim=1).unflatten(1, (height, width))
""", "that is where patch 2 looks"),
        ("""
def ex_06_4(weights, word, height, width):
    return weights[..., word].mean(dim=1).unflatten(1, (width, height)).transpose(1, 2)
""", "rows and columns are exchanged"),
        ("""
def ex_06_4(weights, word, height, width):
    return weights[..., word].unflatten(2, (height, width))
""", "the heads are averaged away"),
        ("""
def ex_06_4(weights, word, height, width):
    return weights[:, 0, :, word].unflatten(1, (height, width))
""", "the first head alone"),
    ],
    "06_5": [
        ("""
def ex_06_5(out1, log1, out2, log2):
    return (out1 + out2) / 2
""", "the plain mean"),
        ("""
def ex_06_5(out1, log1, out2, log2):
    return out1 + out2
""", "a sum of two means"),
        ("""
def ex_06_5(out1, log1, out2, log2):
    l1, l2 = log1[..., None], log2[..., None]
    return (l1 * out1 + l2 * out2) / (l1 + l2)
""", "take exp first"),
        ("""
def ex_06_5(out1, log1, out2, log2):
    l1, l2 = log1.exp()[..., None], log2.exp()[..., None]
    return (l1 * out1 + l2 * out2) / (l1 + l2)
""", "use only their difference"),
    ],
    "06_6": [
        ("""
def ex_06_6(q, k, v, factors):
    return attention(q, k, v, mask=factors[None, :])
""", "add ln f"),
        ("""
def ex_06_6(q, k, v, factors):
    return (attention_weights(q, k) * factors) @ v
""", "do not sum to 1"),
        ("""
def ex_06_6(q, k, v, factors):
    return attention(q, k * factors[:, None], v)
""", "negative scores more negative"),
        ("""
def ex_06_6(q, k, v, factors):
    return attention(q, k, v)
""", "no effect"),
        ("""
def ex_06_6(q, k, v, factors):
    return attention(q, k, v, mask=factors.clamp(min=0.1).log()[None, :])
""", "all but remove the word"),
    ],
    "06_7": [
        ("""
def ex_06_7(q, k, v, grad):
    weights = attention_weights(q, k)
    g = grad @ v.transpose(-2, -1)
    ds = weights * (g - (weights * g).sum(-1, keepdim=True))
    return ds @ k, ds.transpose(-2, -1) @ q, weights.transpose(-2, -1) @ grad
""", "the scale belongs in the backward pass"),
        ("""
def ex_06_7(q, k, v, grad):
    weights = attention_weights(q, k)
    ds = weights * (grad @ v.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return ds @ k, ds.transpose(-2, -1) @ q, weights.transpose(-2, -1) @ grad
""", "coupled by the denominator"),
        ("""
def ex_06_7(q, k, v, grad):
    weights = attention_weights(q, k)
    g = grad @ v.transpose(-2, -1)
    ds = weights * (g - (weights * g).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    return ds @ k, ds.transpose(-2, -1) @ q, torch.zeros_like(v)
""", "dv is wrong"),
        ("""
def ex_06_7(q, k, v, grad):
    weights = attention_weights(q, k)
    g = grad @ v.transpose(-2, -1)
    ds = weights * (g - (weights * g).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    return ds @ k, ds.transpose(-2, -1) @ (ds @ k), weights.transpose(-2, -1) @ grad
""", "dk is wrong"),
    ],
    "06_8": [
        ("""
def ex_06_8(q, k, v, side):
    return attention(q, k, v)
""", "of the exact FLOPs"),
        ("""
def ex_06_8(q, k, v, side):
    n = side * side // 4
    return attention(q, k[:, :, :n], v[:, :, :n])
""", "cheap enough, but"),
        ("""
def ex_06_8(q, k, v, side):
    return attention(q[:, :, ::2], k[:, :, ::2], v[:, :, ::2])
""", "the shape is not"),
        ("""
def ex_06_8(q, k, v, side):
    scores = (q[:, :, :, None] * k[:, :, None]).sum(-1) / q.shape[-1] ** 0.5
    return (scores.softmax(-1)[..., None] * v[:, :, None]).sum(-2)
""", "write products with @"),
    ],
}
