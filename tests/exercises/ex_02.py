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
    ],
    "02_2": [
        ("""
def ex_02_2(alphas_cumprod, xr, noise, r, t):
    bar = alphas_cumprod[t]
    return bar**0.5 * xr + (1 - bar) ** 0.5 * noise
""", "that is for a start at x_0"),
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
    return 1 - torch.sigmoid(log_snr)
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
    return 1 - torch.cat([bar[:1] / bar[:1] * 0.9, bar[1:] / bar[:-1]])
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
    return (1 - torch.cumprod(1 - betas, 0)) ** 0.5
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
    for beta in betas:
        n = (1 - beta) * n + beta**0.5
        out.append(n)
    return torch.stack(out)
""", "at the end the scale should be"),
    ],
}
