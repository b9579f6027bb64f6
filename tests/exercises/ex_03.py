"""Plausible wrong answers to the exercises of chapter 03, and what each must be told.

"03_1": [(source of the answer, a fragment of the message it must get), ...]. The sources
run with the names that the chapter's set-up, import and export cells define.
"""

WRONG = {
    "03_1": [
        ("""
def ex_03_1(m1, v1, m2, v2):
    return m1 + m2, v1 + v2
""", "variances add for the *sum*"),
        ("""
def ex_03_1(m1, v1, m2, v2):
    return (m1 + m2) / 2, (v1 + v2) / 2
""", "the variance is not the average"),
        ("""
def ex_03_1(m1, v1, m2, v2):
    return (m1 * v1 + m2 * v2) / (v1 + v2), v1 * v2 / (v1 + v2)
""", "the less certain witness then"),
        ("""
def ex_03_1(m1, v1, m2, v2):
    return (m1 + m2) / 2, v1 * v2 / (v1 + v2)
""", "the plain average of the means"),
        ("""
def ex_03_1(m1, v1, m2, v2):
    return (m1 / v1 + m2 / v2) / (1 / v1 + 1 / v2), 1 / v1 + 1 / v2
""", "that is the precision"),
        ("""
def ex_03_1(m1, v1, m2, v2):
    return (m1 / v1 + m2 / v2) / (1 / v1 + 1 / v2), (v1 * v2) ** 0.5
""", "the variance should be 1 / (1/0.5 + 1/3)"),
        ("""
def ex_03_1(m1, v1, m2, v2):
    return m1 / v1 + m2 / v2, v1 * v2 / (v1 + v2)
""", "the mean should be 1.2857"),
    ],
    "03_2": [
        ("""
def ex_03_2(betas, xt, noise, t):
    bar = torch.cumprod(1 - betas, 0)[t]
    return (xt - (1 - bar) ** 0.5 * noise) / bar**0.5
""", "that goes back to x_0"),
        ("""
def ex_03_2(betas, xt, noise, t):
    bar = torch.cumprod(1 - betas, 0)[t]
    return xt - betas[t] / (1 - bar) ** 0.5 * noise
""", "undo the shrinking"),
        ("""
def ex_03_2(betas, xt, noise, t):
    return (xt - betas[t] ** 0.5 * noise) / (1 - betas[t]) ** 0.5
""", "the prediction is of *all* the noise"),
        ("""
def ex_03_2(betas, xt, noise, t):
    bar = torch.cumprod(1 - betas, 0)[t]
    return (xt + betas[t] / (1 - bar) ** 0.5 * noise) / (1 - betas[t]) ** 0.5
""", "the noise has to be subtracted"),
        ("""
def ex_03_2(betas, xt, noise, t):
    bar = torch.cumprod(1 - betas, 0)[t]
    return (xt - betas[t] / (1 - bar) * noise) / (1 - betas[t]) ** 0.5
""", "divided by sqrt(alpha_t)"),
    ],
    "03_3": [
        ("""
def ex_03_3(snr):
    return 1 + snr
""", "the rate from picture to velocity"),
        ("""
def ex_03_3(snr):
    return snr / (1 + snr)
""", "that is the inverse"),
        ("""
def ex_03_3(snr):
    return ((1 + snr) / snr) ** 0.5
""", "the losses are their squares"),
        ("""
def ex_03_3(snr):
    return 1 / snr
""", "the weights are"),
    ],
    "03_4": [
        ("""
def ex_03_4(c, xt, a, s):
    return s * xt
""", "is right for c = 1 only"),
        ("""
def ex_03_4(c, xt, a, s):
    return xt / s
""", "if there is no signal"),
        ("""
def ex_03_4(c, xt, a, s):
    return a * c / (a**2 * c + s**2) * xt
""", "the best guess of x_0"),
        ("""
def ex_03_4(c, xt, a, s):
    return s / (a**2 * c**2 + s**2) * xt
""", "c is a variance already"),
        ("""
def ex_03_4(c, xt, a, s):
    return s / (a**2 * c + s**2)
""", "multiply the factor by x_t"),
        ("""
def ex_03_4(c, xt, a, s):
    return torch.tensor(s / (a**2 * c + s**2)).expand(xt.shape)
""", "the same factor for every number"),
        ("""
def ex_03_4(c, xt, a, s):
    return s / (a * c + s) * xt
""", "the factor is"),
    ],
    "03_5": [
        ("""
def ex_03_5(beta, beta_small, f):
    share = (f + 1) / 2
    return share * beta + (1 - share) * beta_small
""", "interpolate their logarithms"),
        ("""
def ex_03_5(beta, beta_small, f):
    share = (f + 1) / 2
    return torch.exp(share * torch.log(beta_small) + (1 - share) * torch.log(beta))
""", "swapped ends"),
        ("""
def ex_03_5(beta, beta_small, f):
    return torch.exp(f * torch.log(beta) + (1 - f) * torch.log(beta_small))
""", "f runs from -1 to 1"),
        ("""
def ex_03_5(beta, beta_small, f):
    share = (f + 1) / 2
    return share * torch.log(beta) + (1 - share) * torch.log(beta_small)
""", "did you return its logarithm"),
    ],
    "03_6": [
        ("""
def ex_03_6(alphas_cumprod, t):
    now, then = alphas_cumprod[t], alphas_cumprod[t - 1]
    k0 = then**0.5 * (1 - now / then) / (1 - now)
    kt = (now / then) ** 0.5 * (1 - then) / (1 - now)
    return k0 / now**0.5 + kt, -k0 * (1 - now) ** 0.5 / now**0.5
""", "the velocity needs no division"),
        ("""
def ex_03_6(alphas_cumprod, t):
    now, then = alphas_cumprod[t], alphas_cumprod[t - 1]
    k0 = then**0.5 * (1 - now / then) / (1 - now)
    kt = (now / then) ** 0.5 * (1 - then) / (1 - now)
    return kt, -k0 * (1 - now) ** 0.5
""", "a_t k_0 is missing"),
        ("""
def ex_03_6(alphas_cumprod, t):
    now, then = alphas_cumprod[t], alphas_cumprod[t - 1]
    k0 = then**0.5 * (1 - now / then) / (1 - now)
    kt = (now / then) ** 0.5 * (1 - then) / (1 - now)
    return k0 * then**0.5 + kt, -k0 * (1 - then) ** 0.5
""", "take those of t"),
        ("""
def ex_03_6(alphas_cumprod, t):
    now, then = alphas_cumprod[t], alphas_cumprod[t - 1]
    k0 = then**0.5 * (1 - now / then) / (1 - now)
    kt = (now / then) ** 0.5 * (1 - then) / (1 - now)
    return k0 * now**0.5 + kt, k0 * (1 - now) ** 0.5
""", "*minus* s v"),
        ("""
def ex_03_6(alphas_cumprod, t):
    now, then = alphas_cumprod[t], alphas_cumprod[t - 1]
    k0 = then**0.5 * (1 - now / then) / (1 - now)
    kt = (now / then) * (1 - then) / (1 - now)
    return k0 * now**0.5 + kt, -k0 * (1 - now) ** 0.5
""", "in front of x_t should stand"),
    ],
    "03_7": [
        ("""
def ex_03_7(beta, xt, g, h):
    b = beta / (1 - beta)
    return xt / (1 - beta) ** 0.5 + b * g, b + b**2 * h
""", "with respect to u"),
        ("""
def ex_03_7(beta, xt, g, h):
    alpha = 1 - beta
    return (xt - beta * g) / alpha**0.5, beta * (1 - beta * h) / alpha
""", "the mean goes *up* the slope"),
        ("""
def ex_03_7(beta, xt, g, h):
    alpha = 1 - beta
    return (xt + beta * g) / alpha**0.5, beta / alpha
""", "the exact variance has a term with h"),
        ("""
def ex_03_7(beta, xt, g, h):
    alpha = 1 - beta
    return (xt + beta * g) / alpha**0.5, beta / alpha + (beta / alpha) ** 2 * h
""", "the chain rule, twice"),
        ("""
def ex_03_7(beta, xt, g, h):
    return xt + beta * g, beta + beta**2 * h
""", "the mean should be"),
    ],
    "03_8": [
        ("""
def ex_03_8(snr, c):
    return ((snr[:-1] - snr[1:]) * c / (1 + c * snr[1:])).sum()
""", "the half in front"),
        ("""
def ex_03_8(snr, c):
    return ((snr[:-1] - snr[1:]) * c / (1 + c * snr[:-1])).sum() / 2
""", "not at SNR_{t-1}"),
        ("""
def ex_03_8(snr, c):
    return ((snr[:-1] - snr[1:]) * c).sum() / 2
""", "before anything is seen"),
        ("""
def ex_03_8(snr, c):
    return ((snr[:-1] - snr[1:]) / (1 + snr[1:])).sum() / 2
""", "here the variance is c"),
        ("""
def ex_03_8(snr, c):
    return torch.log((1 + c * snr[0]) / (1 + c * snr[-1])) / 2
""", "the sum is"),
    ],
    "03_9": [
        ("""
def ex_03_9(log_y):
    return log_y.mean()
""", "is the ELBO again"),
        ("""
def ex_03_9(log_y):
    return torch.logsumexp(log_y.flatten(), 0) - math.log(log_y.numel())
""", "do it within each group"),
        ("""
def ex_03_9(log_y):
    return torch.logsumexp(log_y, dim=1).mean()
""", "log K too much"),
        ("""
def ex_03_9(log_y):
    return log_y.exp().mean(dim=1).log().mean()
""", "exp(-20,000) is 0"),
    ],
}
