"""Plausible wrong answers to the exercises of chapter 02, and what each must be told.

"02_1": [(source of the answer, a fragment of the message it must get), ...]. The sources
run with the names that the chapter's set-up, import and export cells define.
"""

WRONG = {
    "02_1": [
        ("""
def ex_02_1(alphas_cumprod):
    return int((1 - alphas_cumprod > alphas_cumprod).int().argmax())
""", "at alpha-bar = 0.5 they are equal"),
        ("""
def ex_02_1(alphas_cumprod):
    return int((alphas_cumprod**0.5 <= 0.5).int().argmax())
""", "the *variances* are compared"),
        ("""
def ex_02_1(alphas_cumprod):
    return int((alphas_cumprod >= 0.5).int().argmax())
""", "the answer is 2, yours is 0"),
        ("""
def ex_02_1(alphas_cumprod):
    return int((alphas_cumprod - 0.5).abs().argmin())
""", "not the nearest to one half"),
    ],
    "02_2": [
        ("""
def ex_02_2(alphas_cumprod, xr, noise, r, t):
    bar = alphas_cumprod[t]
    return bar**0.5 * xr + (1 - bar) ** 0.5 * noise
""", "that is for a start at x_0"),
        ("""
def ex_02_2(alphas_cumprod, xr, noise, r, t):
    ratio = alphas_cumprod[t - 1] / alphas_cumprod[r - 1]
    return ratio**0.5 * xr + (1 - ratio) ** 0.5 * noise
""", "you counted r and t from 1"),
        ("""
def ex_02_2(alphas_cumprod, xr, noise, r, t):
    ratio = alphas_cumprod[t] / alphas_cumprod[r]
    return ratio * xr + (1 - ratio) * noise
""", "the *root* of the ratio"),
        ("""
def ex_02_2(alphas_cumprod, xr, noise, r, t):
    ratio = alphas_cumprod[t] / alphas_cumprod[r]
    return ratio**0.5 * xr + (1 - alphas_cumprod[t]) ** 0.5 * noise
""", "x_r is noisy already"),
        ("""
def ex_02_2(alphas_cumprod, xr, noise, r, t):
    ratio = alphas_cumprod[t] / alphas_cumprod[r]
    s = (1 - alphas_cumprod) ** 0.5
    return ratio**0.5 * xr + (s[t] - s[r]) * noise
""", "noise scales do not subtract"),
    ],
    "02_3": [
        ("""
def ex_02_3(log_snr):
    return 1 - torch.sigmoid(log_snr.float())
""", "beta_t is what step t alone adds"),
        ("""
def ex_02_3(log_snr):
    bar = torch.sigmoid(log_snr)
    return 1 - bar[1:] / bar[:-1]
""", "yours has the shape (19,)"),
        ("""
def ex_02_3(log_snr):
    bar = torch.sigmoid(-log_snr)
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])
""", "the sigmoid of minus the log-SNR"),
        ("""
def ex_02_3(log_snr):
    bar = torch.sigmoid(log_snr)
    return (1 - torch.cat([bar[:1] / bar[:1] * 0.9, bar[1:] / bar[:-1]])).float()
""", "after the first step the log-SNR should be 5"),
        ("""
def ex_02_3(log_snr):
    snr = 10 ** log_snr
    bar = snr / (1 + snr)
    return 1 - torch.cat([torch.sigmoid(log_snr[:1]), bar[1:] / bar[:-1]])
""", "It is the natural logarithm"),
    ],
    "02_4": [
        ("""
def ex_02_4(betas):
    return (1 - torch.cumprod(1 - betas.float(), 0)) ** 0.5
""", "scales s_t for *independent* noise"),
        ("""
def ex_02_4(betas):
    return torch.cumsum(betas**0.5, 0)
""", "each step also shrinks"),
        ("""
def ex_02_4(betas):
    n, out = 0.0, []
    for beta in betas:
        n = (1 - beta) * n + beta
        out.append(n)
    return torch.stack(out)
""", "after one step the scale is sqrt(beta_1)"),
        ("""
def ex_02_4(betas):
    n, out = 0.0, []
    for beta in betas.tolist():
        n = (1 - beta) * n + beta**0.5
        out.append(n)
    return torch.tensor(out)  # float32
""", "at the end the scale should be"),
    ],
    "02_5": [
        ("""
def ex_02_5(betas):
    return betas * torch.cumprod(1 - betas, 0)
""", "is shrunk by the steps *after* i"),
        ("""
def ex_02_5(betas):
    later = 1 - betas
    return betas * later.flip(0).cumprod(0).flip(0)
""", "its own alpha_i does not touch it"),
        ("""
def ex_02_5(betas):
    bar = torch.cumprod(1 - betas, 0)
    return ((betas * bar[-1] / bar) ** 0.5).tolist()
""", "these are the noise *scales*"),
        ("""
def ex_02_5(betas):
    return betas.float()
""", "the shares should add up to"),
    ],
    "02_6": [
        ("""
def ex_02_6(power, alphas_cumprod):
    drowned = alphas_cumprod * power[:, None] < 1 - alphas_cumprod
    return drowned.int().argmax(dim=1)
""", "argmax returns 0 when nothing is true"),
        ("""
def ex_02_6(power, alphas_cumprod):
    return (alphas_cumprod**0.5 * power[:, None] >= 1 - alphas_cumprod).sum(dim=1)
""", "Did you take a root"),
        ("""
def ex_02_6(power, alphas_cumprod):
    return (alphas_cumprod * power[:, None] >= 1 - alphas_cumprod).sum(dim=1) + 1
""", "count from 0"),
    ],
    "02_7": [
        ("""
def ex_02_7(x0, y0, alpha_bar):
    z = alpha_bar**0.5 * (x0 - y0).norm() / (2 * (1 - alpha_bar) ** 0.5)
    return 2 * Normal(0, 1).cdf(z) - 1
""", "that is the total variation"),
        ("""
def ex_02_7(x0, y0, alpha_bar):
    z = alpha_bar**0.5 * (x0 - y0).norm() / (1 - alpha_bar) ** 0.5
    return Normal(0, 1).cdf(z)
""", "in the *middle* between the centers"),
        ("""
def ex_02_7(x0, y0, alpha_bar):
    return Normal(0, 1).cdf(alpha_bar * (x0 - y0).norm() / (2 * (1 - alpha_bar)))
""", "you put variances where scales belong"),
        ("""
def ex_02_7(x0, y0, alpha_bar):
    distance = (x0 - y0).square().mean() ** 0.5
    return Normal(0, 1).cdf(alpha_bar**0.5 * distance / (2 * (1 - alpha_bar) ** 0.5))
""", "you took a mean over the pixels"),
    ],
    "02_8": [
        ("""
def ex_02_8(betas, n):
    bar = torch.cumprod(1 - betas.float(), 0)
    snr = bar / (1 - bar) / n
    bar = snr / (1 + snr)
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])
""", "a block has n^2 pixels"),
        ("""
def ex_02_8(betas, n):
    return betas.float() * n**2
""", "n^2 times the noise in each step"),
        ("""
def ex_02_8(betas, n):
    bar = torch.cumprod(1 - betas, 0)
    snr = bar / (1 - bar) * n**2
    bar = snr / (1 + snr)
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])
""", "the big picture needs more noise"),
        ("""
def ex_02_8(betas, n):
    bar = torch.cumprod(1 - betas, 0) / n**2
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])
""", "the SNR should be 4 times smaller at every step"),
    ],
    "02_9": [
        ("""
def ex_02_9(share):
    return 1.0
""", "1 is where the exact chain settles"),
        ("""
def ex_02_9(share):
    return 2.0
""", "is squared when it meets a variance"),
        ("""
def ex_02_9(share):
    return 1 / (1 - share / 2) if share < 2 else math.inf
""", "for a share of 0.2 it settles at 1.0526"),
        ("""
def ex_02_9(share):
    return 1 / (1 - share / 4) if share < 5 else math.inf
""", "the variance grows without end"),
    ],
    "02_10": [
        ("""
def ex_02_10(power, counts, steps, high, low):
    return torch.linspace(high, low, steps)
""", "this is an even log-SNR"),
        ("""
def ex_02_10(power, counts, steps, high, low):
    return solution_02_10(power, torch.ones_like(counts), steps, high, low)
""", "you forgot the counts"),
        ("""
def ex_02_10(power, counts, steps, high, low):
    return solution_02_10(power, counts, steps, high, low).flip(0)
""", "must fall from step to step"),
        ("""
def ex_02_10(power, counts, steps, high, low):
    snr = torch.linspace(high, low, steps, dtype=torch.float64).exp()
    return torch.linspace(float(snr[0]), float(snr[-1]), steps, dtype=torch.float64).log()
""", "the losses should be equal"),
    ],
}
