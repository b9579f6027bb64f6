"""Plausible wrong answers to the exercises of chapter 05, and what each must be told.

"05_1": [(source of the answer, a fragment of the message it must get), ...]. The sources
run with the names that the chapter's set-up, import and export cells define.
"""

WRONG = {
    "05_1": [
        ("""
def ex_05_1(noise, a, s):
    return noise / s
""", "away from the data"),
        ("""
def ex_05_1(noise, a, s):
    return -noise
""", "larger where the noise scale is small"),
        ("""
def ex_05_1(noise, a, s):
    return -noise / s**2
""", "divided by s twice"),
        ("""
def ex_05_1(noise, a, s):
    return -noise / (a * s)
""", "the signal scale plays no role"),
    ],
    "05_2": [
        ("""
def ex_05_2(x, means, weights, variances):
    arrows = (means - x[:, None]) / variances[:, None]
    return (weights[:, None] * arrows).sum(1)
""", "weighted with the prior weights"),
        ("""
def ex_05_2(x, means, weights, variances):
    apart = means - x[:, None]
    logits = weights.log() - apart.square().sum(-1) / (2 * variances)
    return (logits.softmax(1)[..., None] * apart / variances[:, None]).sum(1)
""", "a narrow island is a high one"),
        ("""
def ex_05_2(x, means, weights, variances):
    apart = means - x[:, None]
    logits = (weights.log() - variances.log() / 2
              - apart.square().sum(-1) / (2 * variances))
    return (logits.softmax(1)[..., None] * apart / variances[:, None]).sum(1)
""", "that factor is for one dimension"),
        ("""
def ex_05_2(x, means, weights, variances):
    apart = means - x[:, None]
    logits = (weights.log() - variances.log()
              - apart.square().sum(-1) / (2 * variances))
    return (logits.softmax(1)[..., None] * apart / variances[:, None]).sum(1)
""", "that factor is for two dimensions"),
    ],
    "05_3": [
        ("""
def ex_05_3(denoise, x, a, s):
    x = x.requires_grad_()
    return gradient(denoise(x), x)
""", "the factor in front of it is missing"),
        ("""
def ex_05_3(denoise, x, a, s):
    x = x.requires_grad_()
    return s / a * gradient(denoise(x), x)
""", "made of a variance"),
        ("""
def ex_05_3(denoise, x, a, s):
    x = x.requires_grad_()
    return s**2 / a**2 * gradient(denoise(x), x)
""", "belongs to the second derivative"),
        ("""
def ex_05_3(denoise, x, a, s):
    x = x.requires_grad_()
    return (s**2 / a * gradient(denoise(x), x)) ** 0.5
""", "not the deviation"),
    ],
    "05_4": [
        ("""
def ex_05_4(model, x):
    x = x.requires_grad_()
    out = model(x)
    return (out.square().sum(1) / 2 + gradient(out, x).sum(1)).mean()
""", "the divergence has the diagonal only"),
        ("""
def ex_05_4(model, x):
    x = x.requires_grad_()
    out = model(x)
    div = sum(gradient(out[:, i], x)[:, i] for i in range(x.shape[1]))
    return (out.square().sum(1) + div).mean()
""", "the square comes with 1/2"),
        ("""
def ex_05_4(model, x):
    x = x.requires_grad_()
    out = model(x)
    div = sum(gradient(out[:, i], x)[:, i] for i in range(x.shape[1]))
    return (out.square().sum(1) / 2 - div).mean()
""", "the divergence enters with a plus"),
        ("""
def ex_05_4(model, x):
    x = x.requires_grad_()
    out = model(x)
    div = sum(gradient(out[:, i], x)[:, i] for i in range(x.shape[1])) / x.shape[1]
    return (out.square().mean(1) / 2 + div).mean()
""", "average over the samples only"),
    ],
    "05_5": [
        ("""
def ex_05_5(x, slope, h, temperature, noise):
    return x + h * slope + (2 * h) ** 0.5 * temperature * noise
""", "T counts twice"),
        ("""
def ex_05_5(x, slope, h, temperature, noise):
    return x + h * slope + (2 * h / temperature) ** 0.5 * noise
""", "you sample q to the power T"),
        ("""
def ex_05_5(x, slope, h, temperature, noise):
    return x + h * slope + (2 * h) ** 0.5 * noise
""", "the temperature has no effect"),
        ("""
def ex_05_5(x, slope, h, temperature, noise):
    return x + h * slope + (h * temperature) ** 0.5 * noise
""", "the 2 under the root is missing"),
        ("""
def ex_05_5(x, slope, h, temperature, noise):
    return x - h * slope + (2 * h * temperature) ** 0.5 * noise
""", "the step must still climb"),
    ],
    "05_6": [
        ("""
def ex_05_6(u, x, times):
    for tau, then in pairwise(times):
        x = x + (then - tau) * u(x, tau)
    return x
""", "this is Euler's rule"),
        ("""
def ex_05_6(u, x, times):
    for tau, then in pairwise(times):
        first = u(x, tau)
        second = u(x + (then - tau) * first, tau)
        x = x + (then - tau) * (first + second) / 2
    return x
""", "must be asked at the next time"),
        ("""
def ex_05_6(u, x, times):
    for tau, then in pairwise(times):
        d = abs(then - tau)
        first = u(x, tau)
        x = x + d * (first + u(x + d * first, then)) / 2
    return x
""", "goes the wrong way"),
        ("""
def ex_05_6(u, x, times):
    for tau, then in pairwise(times):
        first = u(x, tau)
        x = x + (then - tau) * (first + u(x, then))
    return x
""", "the error does not fall with more steps"),
        ("""
def ex_05_6(u, x, times):
    for tau, then in pairwise(times):
        d = then - tau
        x = x + d * u(x + d / 2 * u(x, tau), tau + d / 2)
    return x
""", "of order 2, but not Heun's rule"),
    ],
    "05_7": [
        ("""
def ex_05_7(v_label, v_empty, x, a, s, w_paper):
    return a * x - s * (v_empty + w_paper * (v_label - v_empty))
""", "in the paper's convention 0 means no guidance"),
        ("""
def ex_05_7(v_label, v_empty, x, a, s, w_paper):
    return a * x - s * (v_label + (1 + w_paper) * (v_empty - v_label))
""", "have changed places"),
        ("""
def ex_05_7(v_label, v_empty, x, a, s, w_paper):
    return (1 + w_paper) * v_label - w_paper * v_empty
""", "the picture is asked for"),
        ("""
def ex_05_7(v_label, v_empty, x, a, s, w_paper):
    return (x - s * ((1 + w_paper) * v_label - w_paper * v_empty)) / a
""", "that conversion is for predicted noise"),
    ],
    "05_8": [
        ("""
def ex_05_8(plain, one, two, w1, w2):
    return w1 * one + w2 * two
""", "counts the law without labels twice"),
        ("""
def ex_05_8(plain, one, two, w1, w2):
    return (w1 * one + w2 * two) / (w1 + w2)
""", "that of a compromise"),
        ("""
def ex_05_8(plain, one, two, w1, w2):
    return w1 * one + w2 * two - plain
""", "each *push* gets its weight"),
        ("""
def ex_05_8(plain, one, two, w1, w2):
    return plain + w1 * one + w2 * two
""", "wrong for both weights 1"),
    ],
    "05_9": [
        ("""
def ex_05_9(u, x, times, log_end):
    for tau, then in pairwise(times):
        x = x + (then - tau) * u(x, tau)
    return log_end(x)
""", "the stretching on the way is missing"),
        ("""
def ex_05_9(u, x, times, log_end):
    stretched = torch.zeros_like(x)
    for tau, then in pairwise(times):
        x = x.detach().requires_grad_()
        speed = u(x, tau)
        stretched = stretched + (then - tau) * gradient(speed, x).detach()
        x = x + (then - tau) * speed
    return log_end(x.detach()) - stretched
""", "the stretching has the wrong sign"),
        ("""
def ex_05_9(u, x, times, log_end):
    stretched = torch.zeros_like(x)
    for tau, then in pairwise(times):
        x = x.detach().requires_grad_()
        speed = u(x, tau)
        stretched = stretched + (then - tau) * gradient(speed, x).detach() / 2
        x = x + (then - tau) * speed
    return log_end(x.detach()) + stretched
""", "0.05 is allowed"),
    ],
    "05_10": [
        ("""
def ex_05_10(tau):
    return 1.0
""", "too few foxes"),
        ("""
def ex_05_10(tau):
    return 3.0
""", "one kind of fox is dying out"),
        ("""
def ex_05_10(tau):
    return 8.0 if tau > 0.2 else 1.0
""", "one kind of fox is dying out"),
        ("""
def ex_05_10(tau):
    return 40.0 if tau < 0.15 else 1.0
""", "too strong"),
    ],
}
