"""Plausible wrong answers to the exercises of chapter 07, and what each must be told.

"07_1": [(source of the answer, a fragment of the message it must get), ...]. The sources
run with the names that the chapter's set-up, import and export cells define.
"""

WRONG = {
    "07_1": [
        ("""
def ex_07_1(x, groups, weight, bias, eps):
    g = x.unflatten(1, (groups, -1))
    v = g.var((2, 3, 4), keepdim=True)
    y = ((g - g.mean((2, 3, 4), keepdim=True)) / (v + eps).sqrt()).flatten(1, 2)
    return y * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
""", "by n here, not by n - 1"),
        ("""
def ex_07_1(x, groups, weight, bias, eps):
    g = x.unflatten(1, (groups, -1))
    m = g.mean((0, 2, 3, 4), keepdim=True)
    v = (g - m).square().mean((0, 2, 3, 4), keepdim=True)
    y = ((g - m) / (v + eps).sqrt()).flatten(1, 2)
    return y * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
""", "depends on the other pictures of the batch"),
        ("""
def ex_07_1(x, groups, weight, bias, eps):
    m = x.mean((2, 3), keepdim=True)
    v = (x - m).square().mean((2, 3), keepdim=True)
    return (x - m) / (v + eps).sqrt() * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
""", "each channel was normed by itself"),
        ("""
def ex_07_1(x, groups, weight, bias, eps):
    g = x.unflatten(1, (groups, -1))
    m = g.mean((2, 3, 4), keepdim=True)
    v = (g - m).square().mean((2, 3, 4), keepdim=True)
    y = ((g - m) / (v.sqrt() + eps)).flatten(1, 2)
    return y * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
""", "inside the root"),
        ("""
def ex_07_1(x, groups, weight, bias, eps):
    g = x.unflatten(1, (groups, -1))
    m = g.mean((2, 3, 4), keepdim=True)
    v = (g - m).square().mean((2, 3, 4), keepdim=True)
    return ((g - m) / (v + eps).sqrt()).flatten(1, 2)
""", "weight and bias are applied per channel"),
    ],
    "07_2": [
        ("""
def ex_07_2(mean, logvar, tau):
    return 0.5 * ((mean**2 + logvar.exp()) / tau**2 - 1 - logvar).sum((1, 2, 3))
""", "divergence 0"),
        ("""
def ex_07_2(mean, logvar, tau):
    return 0.5 * (mean**2 + logvar.exp() / tau**2 - 1 - logvar
                  + 2 * np.log(tau)).sum((1, 2, 3))
""", "the squared mean is divided by"),
        ("""
def ex_07_2(mean, logvar, tau):
    return 0.5 * ((mean**2 + logvar.exp()) / tau**2 - 1 - logvar + 2 * np.log(tau)).sum()
""", "one number per picture"),
        ("""
def ex_07_2(mean, logvar, tau):
    return 0.5 * ((mean**2 + (0.5 * logvar).exp()) / tau**2 - 1 - logvar
                  + 2 * np.log(tau)).sum((1, 2, 3))
""", "already wrong for tau = 1"),
    ],
    "07_3": [
        ("""
def ex_07_3(n, width, stride):
    counts = [0] * (n * stride)
    for i in range(n):
        for offset in range(width):
            if i * stride + offset < len(counts):
                counts[i * stride + offset] += 1
    return counts, width % stride == 0
""", "the output has (n - 1) * stride + width"),
        ("""
def ex_07_3(n, width, stride):
    counts = [0] * ((n - 1) * stride + width)
    for i in range(n):
        for offset in range(width):
            counts[i * stride + offset] += 1
    return counts, min(counts) == max(counts)
""", "Leave out the first and last width - 1"),
        ("""
def ex_07_3(n, width, stride):
    counts = [0] * ((n - 1) * stride + width)
    for i in range(n):
        for offset in range(width):
            counts[i + offset] += 1
    return counts, width % stride == 0
""", "stamp i starts at i * stride"),
    ],
    "07_4": [
        ("""
def ex_07_4(batches):
    return 1 / np.mean([b.std().item() for b in batches])
""", "the mean of the batches' deviations"),
        ("""
def ex_07_4(batches):
    return torch.cat(list(batches)).double().std().item()
""", "return 1 over it"),
        ("""
def ex_07_4(batches):
    n = q = 0
    for b in batches:
        n, q = n + b.numel(), q + b.double().square().sum().item()
    return (q / n) ** -0.5
""", "the mean was not subtracted"),
        ("""
def ex_07_4(batches):
    return 1 / torch.cat(list(batches)).double().std((0, 2, 3)).mean().item()
""", "not the mean of four"),
        ("""
def ex_07_4(batches):
    n, total, squares = 0, torch.tensor(0.0), torch.tensor(0.0)
    for b in batches:
        n, total, squares = n + b.numel(), total + b.sum(), squares + b.square().sum()
    return (squares / n - (total / n) ** 2).clamp(min=1e-12).item() ** -0.5
""", "float32 loses the digits"),
    ],
    "07_5": [
        ("""
def ex_07_5(x, y):
    return F.l1_loss(y, x)
""", "a constant should drop out"),
        ("""
def ex_07_5(x, y):
    return sum(F.l1_loss(a, b) for a, b in zip(edges(y), edges(x)))
""", "a shift by one pixel"),
        ("""
def ex_07_5(x, y):
    return (y - x).abs().mean((1, 2, 3))
""", "return a single number"),
    ],
}
