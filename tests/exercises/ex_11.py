"""Plausible wrong answers to the exercises of chapter 11, and what they must be told."""

WRONG = {
    "11_1": [
        ("""
def ex_11_1(total, n):
    return [round(total - k * total / n) for k in range(n)]
""", "subtract 1"),
        ("""
def ex_11_1(total, n):
    return [k * (total // n) for k in range(n)][::-1]
""", "leading spacing"),
        ("""
def ex_11_1(total, n):
    return [round((total - 1) * (n - 1 - k) / (n - 1)) for k in range(n)]
""", "does not end at 0"),
        ("""
def ex_11_1(total, n):
    return [total - k * (total // n) - 1 for k in range(n)]
""", "round at the end"),
    ],
    "11_2": [
        ("""
def ex_11_2(x, noise, bar_t, bar_u):
    x0 = (x - (1 - bar_t) ** 0.5 * noise) / bar_t**0.5
    return bar_u**0.5 * x0 + (1 - bar_t) ** 0.5 * noise
""", "you kept the old noise scale"),
        ("""
def ex_11_2(x, noise, bar_t, bar_u):
    x0 = x - (1 - bar_t) ** 0.5 * noise
    return bar_u**0.5 * x0 + (1 - bar_u) ** 0.5 * noise
""", "divide by a_t"),
        ("""
def ex_11_2(x, noise, bar_t, bar_u):
    x0 = (x - (1 - bar_t) * noise) / bar_t
    return bar_u * x0 + (1 - bar_u) * noise
""", "square roots"),
    ],
    "11_3": [
        ("""
def ex_11_3(bar_t, bar_u):
    return (1 - bar_u) / (1 - bar_t) * (1 - bar_t / bar_u)
""", "its share of s_u^2 is asked for"),
        ("""
def ex_11_3(bar_t, bar_u):
    return 1 - bar_t / bar_u
""", "divide it by s_t^2"),
        ("""
def ex_11_3(bar_t, bar_u):
    return ((1 - bar_t / bar_u) / (1 - bar_t)) ** 0.5
""", "no square root"),
    ],
    "11_4": [
        ("""
def ex_11_4(scheduler, latents, noise, strength):
    n = len(scheduler.timesteps)
    steps = scheduler.timesteps[int(n * (1 - strength)):]
    if len(steps) == 0:
        return steps, latents
    return steps, scheduler.add_noise(latents, noise, steps[:1].expand(len(latents)))
""", "round the number of steps down"),
        ("""
def ex_11_4(scheduler, latents, noise, strength):
    n = len(scheduler.timesteps)
    steps = scheduler.timesteps[:int(n * strength)]
    if len(steps) == 0:
        return steps, latents
    return steps, scheduler.add_noise(latents, noise, steps[:1].expand(len(latents)))
""", "the last steps are run"),
        ("""
def ex_11_4(scheduler, latents, noise, strength):
    n = len(scheduler.timesteps)
    return scheduler.timesteps[n - int(n * strength):], noise
""", "the latents are gone"),
        ("""
def ex_11_4(scheduler, latents, noise, strength):
    n = len(scheduler.timesteps)
    steps = scheduler.timesteps[n - min(int(n * strength), n):]
    if len(steps) == 0:
        return steps, latents
    return steps, scheduler.add_noise(latents, noise, steps[:1].expand(len(latents)))
""", "keep 13; you kept 14"),
        ("""
def ex_11_4(scheduler, latents, noise, strength):
    n = scheduler.num_inference_steps
    steps = scheduler.timesteps[n - int(n * strength):]
    if len(steps) == 0:
        return steps, latents
    return steps, scheduler.add_noise(latents, noise, steps[:1].expand(len(latents)))
""", "keep 13; you kept 16"),
    ],
    "11_5": [
        ("""
def ex_11_5(denoise, x, levels):
    for now, then in pairwise(levels):
        x = ddim_step(denoise(x, now), now, then)
    return x
""", "still Euler"),
        ("""
def ex_11_5(denoise, x, levels):
    for now, then in pairwise(levels):
        start = denoise(x, now)
        end = denoise(ddim_step(start, now, then), then)
        x = follow(x, (start.noise + end.noise) / 2, now, then)
    return x
""", "that is Heun's method"),
        ("""
def ex_11_5(denoise, x, levels):
    for now, then in pairwise(levels):
        middle = SigmaLevel((now.s / now.a + then.s / then.a) / 2)
        half = ddim_step(denoise(x, now), now, middle)
        x = follow(x, denoise(half / middle.a, middle).noise, now, then)
    return x
""", "wants x = a y"),
        ("""
def ex_11_5(denoise, x, levels):
    for now, then in pairwise(levels):
        middle = SigmaLevel((now.s / now.a + then.s / then.a) / 2)
        half = ddim_step(denoise(x, now), now, middle)
        slope = denoise(half, middle).noise
        x = then.a * (half / middle.a + (then.s / then.a - now.s / now.a) * slope)
    return x
""", "starts at the start"),
    ],
    "11_6": [
        ("""
def ex_11_6(here, before, end):
    return 1.5 * (end - here), -0.5 * (end - here)
""", "equal distances"),
        ("""
def ex_11_6(here, before, end):
    h, middle = here - end, (here + end) / 2
    return (h * (middle - before) / (here - before),
            h * (middle - here) / (before - here))
""", "sigma falls"),
        ("""
def ex_11_6(here, before, end):
    h, middle = end - here, (here + end) / 2
    return (h * (middle - here) / (before - here),
            h * (middle - before) / (here - before))
""", "comes first"),
        ("""
def ex_11_6(here, before, end):
    h, middle = end - here, (here + end) / 2
    return h * (middle - before), h * (middle - here)
""", "must give end - here"),
        ("""
def ex_11_6(here, before, end):
    middle = (here + end) / 2
    return -(middle - before) / (here - before), -(middle - here) / (before - here)
""", "grow with the length"),
    ],
    "11_7": [
        ("""
def ex_11_7(first, last, n):
    return np.linspace(first, last, n).tolist()
""", "even in sigma itself"),
        ("""
def ex_11_7(first, last, n):
    return (np.linspace(first**7, last**7, n) ** (1 / 7)).tolist()
""", "wrong way round"),
        ("""
def ex_11_7(first, last, n):
    return (np.linspace(last ** (1 / 7), first ** (1 / 7), n) ** 7).tolist()
""", "falling"),
        ("""
def ex_11_7(first, last, n):
    return np.exp(np.linspace(np.log(first), np.log(last), n)).tolist()
""", "exponential levels"),
        ("""
def ex_11_7(first, last, n):
    return (np.linspace(first ** (1 / 7), last, n) ** 7).tolist()
""", "from 128 to 1/128"),
    ],
    "11_8": [
        ("""
def ex_11_8(x, x0, earlier, before, now, then):
    l1, l2 = (torch.log(level.a / level.s) for level in (now, then))
    return then.s / now.s * x + then.a * (1 - torch.exp(l1 - l2)) * x0
""", "the earlier estimate is not used"),
        ("""
def ex_11_8(x, x0, earlier, before, now, then):
    l0, l1, l2 = (torch.log(level.a / level.s) for level in (before, now, then))
    d = x0 + (l2 - l1) / (l1 - l0) * (x0 - earlier)
    return then.s / now.s * x + then.a * (1 - torch.exp(l1 - l2)) * d
""", "half of h"),
        ("""
def ex_11_8(x, x0, earlier, before, now, then):
    l0, l1, l2 = (torch.log(level.a / level.s) for level in (before, now, then))
    d = x0 + (l1 - l0) / (l2 - l1) / 2 * (x0 - earlier)
    return then.s / now.s * x + then.a * (1 - torch.exp(l1 - l2)) * d
""", "upside down"),
        ("""
def ex_11_8(x, x0, earlier, before, now, then):
    l0, l1, l2 = (level.s / level.a for level in (before, now, then))
    d = x0 + (l2 - l1) / (l1 - l0) / 2 * (x0 - earlier)
    return then.s / now.s * x + then.a * (1 - l2 / l1) * d
""", "straight in lambda"),
        ("""
def ex_11_8(x, x0, earlier, before, now, then):
    l0, l1, l2 = (torch.log(level.a / level.s) for level in (before, now, then))
    d = x0 + (l2 - l1) / (l1 - l0) / 2 * (earlier - x0)
    return then.s / now.s * x + then.a * (1 - torch.exp(l1 - l2)) * d
""", "ahead, not back"),
    ],
    "11_9": [
        ("""
def ex_11_9(here, there, eta):
    up = eta * (here**2 - there**2) ** 0.5
    return abs(there**2 - up**2) ** 0.5, up
""", "the posterior's is smaller"),
        ("""
def ex_11_9(here, there, eta):
    up = eta * there * (here**2 - there**2) ** 0.5 / here
    return there, up
""", "go down below"),
        ("""
def ex_11_9(here, there, eta):
    up = there * (here**2 - there**2) ** 0.5 / here
    return (there**2 - up**2) ** 0.5, eta * up
""", "low depends on eta"),
        ("""
def ex_11_9(here, there, eta):
    up = eta**0.5 * there * (here**2 - there**2) ** 0.5 / here
    return (there**2 - up**2) ** 0.5, up
""", "not its square"),
        ("""
def ex_11_9(here, there, eta):
    up = eta * (here**2 - there**2) ** 0.5 / here
    return (there**2 - up**2) ** 0.5, up
""", "where does sigma there enter"),
    ],
    "11_10": [
        ("""
def ex_11_10(n):
    return exponential_sigmas(14.6, 0.03, n + 1).tolist()
""", "even steps in log sigma have"),
        ("""
def ex_11_10(n):
    return karras_sigmas(14.6, 0.03, n + 1).tolist()
""", "your error is"),
        ("""
def ex_11_10(n):
    return exponential_sigmas(14.6, 0.03, n).tolist()
""", "levels, not"),
    ],
}
