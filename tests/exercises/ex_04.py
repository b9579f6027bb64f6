"""Plausible wrong answers to the exercises of chapter 04, and what each must be told."""

WRONG = {
    "04_1": [
        ("""
def ex_04_1(xt, mu, c, a, s):
    return a * c / (a**2 * c + s**2) * xt
""", "where has mu gone"),
        ("""
def ex_04_1(xt, mu, c, a, s):
    return mu + a * c / (a**2 * c + s**2) * (xt - mu)
""", "the surprise is x_t - a mu"),
        ("""
def ex_04_1(xt, mu, c, a, s):
    return mu.expand_as(xt)
""", "before you have seen x_t"),
        ("""
def ex_04_1(xt, mu, c, a, s):
    return mu + c / (a**2 * c + s**2) * (xt - a * mu)
""", "check the factor"),
    ],
    "04_2": [
        ("""
def ex_04_2(points, means, weights):
    nearest = torch.cdist(points, means).argmin(dim=1)
    shares = torch.bincount(nearest, minlength=len(means)) / len(points)
    return float((shares - weights).abs().sum())
""", "take half of it"),
        ("""
def ex_04_2(points, means, weights):
    nearest = torch.cdist(points, means).argmin(dim=1)
    shares = torch.bincount(nearest) / len(points)
    return float((shares - weights[:len(shares)]).abs().sum() / 2)
""", "minlength"),
        ("""
def ex_04_2(points, means, weights):
    nearest = torch.cdist(points, means).argmin(dim=1)
    shares = torch.bincount(nearest, minlength=len(means)) / len(points)
    return float((shares - weights).sum() / 2)
""", "differences with their sign cancel"),
        ("""
def ex_04_2(points, means, weights):
    nearest = torch.cdist(points, means).argmin(dim=1)
    shares = torch.bincount(nearest, minlength=len(means)) / len(points)
    return float((shares - weights).abs().max())
""", "that is the largest difference"),
        ("""
def ex_04_2(points, means, weights):
    nearest = torch.cdist(points, means).argmin(dim=1)
    shares = torch.bincount(nearest, minlength=len(means)) / len(points)
    return float(((shares - weights).square().sum() / 2) ** 0.5)
""", "yours is 0.206"),
        ("""
def ex_04_2(points, means, weights):
    nearest = torch.cdist(points, means).argmin(dim=1)
    shares = torch.bincount(nearest) / len(points)
    return float((shares - weights[:len(shares)]).abs().sum())
""", "yours is 0.300"),
    ],
    "04_3": [
        ("""
def ex_04_3(n):
    return 1 - 1 / n
""", "has the mean age of about n steps"),
        ("""
def ex_04_3(n):
    return 1 - 1 / (2 * n)
""", "forgets linearly"),
        ("""
def ex_04_3(n):
    return math.exp(-1 / n)
""", "counts 1/e after n steps"),
        ("""
def ex_04_3(n):
    return 2 ** (1 / n)
""", "a decay lies between 0 and 1"),
    ],
    "04_4": [
        ("""
def ex_04_4(average, weights, decay):
    return {k: (1 - decay) * average[k] + decay * w if w.is_floating_point() else w
            for k, w in weights.items()}
""", "swapped: with decay 0.75"),
        ("""
def ex_04_4(average, weights, decay):
    return {k: decay * average[k] + (1 - decay) * w for k, w in weights.items()}
""", "the counter has become a floating-point number"),
        ("""
def ex_04_4(average, weights, decay):
    for k, w in weights.items():
        if w.is_floating_point():
            average[k].mul_(decay).add_(w, alpha=1 - decay)
        else:
            average[k] = w
    return average
""", "you changed the old average in place"),
        ("""
def ex_04_4(average, weights, decay):
    return {k: decay * average[k] + (1 - decay) * w if w.is_floating_point()
            else average[k] for k, w in weights.items()}
""", "the counter should be the network's"),
        ("""
def ex_04_4(average, weights, decay):
    return {k: decay * average[k] + (1 - decay) * w if w.is_floating_point()
            else average[k].copy_(w) for k, w in weights.items()}
""", "a counter of the arguments in place"),
    ],
    "04_5": [
        ("""
def ex_04_5(log_q, xt, s):
    xt = xt.requires_grad_()
    return s * torch.autograd.grad(log_q(xt).sum(), xt)[0]
""", "the gradient points uphill"),
        ("""
def ex_04_5(log_q, xt, s):
    xt = xt.requires_grad_()
    return -torch.autograd.grad(log_q(xt).sum(), xt)[0]
""", "the noise is s times that"),
        ("""
def ex_04_5(log_q, xt, s):
    xt = xt.requires_grad_()
    return -s**2 * torch.autograd.grad(log_q(xt).sum(), xt)[0]
""", "s squared belongs to the step"),
    ],
    "04_6": [
        ("""
def ex_04_6(xt, guess, k0, kt, variance, noise):
    return (k0 * guess + kt * xt + variance**0.5 * noise).clamp(-1, 1)
""", "you clipped the new state"),
        ("""
def ex_04_6(xt, guess, k0, kt, variance, noise):
    return k0 * guess.clamp(0, 1) + kt * xt + variance**0.5 * noise
""", "not in [0, 1]"),
        ("""
def ex_04_6(xt, guess, k0, kt, variance, noise):
    return k0 * guess.clamp(-1, 1) + kt * xt + variance * noise
""", "the square root of v"),
        ("""
def ex_04_6(xt, guess, k0, kt, variance, noise):
    return k0 * guess + kt * xt + variance**0.5 * noise
""", "the guess is not clipped"),
    ],
    "04_7": [
        ("""
def ex_04_7(xt, mu, c, a, s, k0, kt, small):
    V = a**2 * c + s**2
    return k0 * (mu + a * c / V * (xt - a * mu)) + kt * xt, small
""", "here it is only guessed"),
        ("""
def ex_04_7(xt, mu, c, a, s, k0, kt, small):
    V = a**2 * c + s**2
    return k0 * (mu + a * c / V * (xt - a * mu)) + kt * xt, small + k0**2 * c
""", "before you have seen x_t"),
        ("""
def ex_04_7(xt, mu, c, a, s, k0, kt, small):
    V = a**2 * c + s**2
    return k0 * (mu + a * c / V * (xt - a * mu)) + kt * xt, small + k0 * c * s**2 / V
""", "is squared in the variance"),
        ("""
def ex_04_7(xt, mu, c, a, s, k0, kt, small):
    V = a**2 * c + s**2
    return k0 * mu + kt * xt, small + k0**2 * c * s**2 / V
""", "the guess of x_0 is not mu"),
    ],
    "04_8": [
        ("""
def ex_04_8(x0, guess, k0, small):
    return small + k0**2 * (x0 - guess).square().sum(1).mean()
""", "divide by D"),
        ("""
def ex_04_8(x0, guess, k0, small):
    return small + k0 * (x0 - guess).square().mean()
""", "the factor k0 has to be squared"),
        ("""
def ex_04_8(x0, guess, k0, small):
    return small + k0**2 * (x0 - guess).square().mean() ** 0.5
""", "standard deviations do not"),
        ("""
def ex_04_8(x0, guess, k0, small):
    return small
""", "this gives nothing back"),
    ],
    "04_9": [
        ("""
def ex_04_9(own, state):
    return sorted(f"missing {k}" for k in own if k not in state)
""", "that nobody asked for"),
        ("""
def ex_04_9(own, state):
    found = [f"missing {k}" for k in own if k not in state]
    found += [f"unexpected {k}" for k in state if k not in own]
    found += [f"shape {k}" for k in own
              if k in state and own[k].numel() != state[k].numel()]
    return sorted(found)
""", "although both have six numbers"),
        ("""
def ex_04_9(own, state):
    found = [f"unexpected {k}" for k in state if k not in own]
    found += [f"shape {k}" for k in own
              if k in state and own[k].shape != state[k].shape]
    return sorted(found)
""", "and the file has none"),
    ],
    "04_10": [
        ("""
def ex_04_10(steps):
    return torch.linspace(999, -1, steps + 1).round().long().tolist()
""", "these are evenly spaced"),
        ("""
def ex_04_10(steps):
    return [round(999 * (1 - k / steps) ** 2) for k in range(steps + 1)]
""", "the end is -1"),
        ("""
def ex_04_10(steps):
    return [999 - round(999 * (k / steps) ** 2) for k in range(steps)] + [-1]
""", "where nothing is decided yet"),
        ("""
def ex_04_10(steps):
    return torch.linspace(999, -1, 51).round().long().tolist()
""", "10 steps have 11 ends"),
    ],
}
