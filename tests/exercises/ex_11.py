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
""", "needs one division"),
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
        first = denoise(x, now)
        second = denoise(ddim_step(first, now, then), then)
        x = x + (then.s / then.a - now.s / now.a) * (first.noise + second.noise) / 2
    return x
""", "step in y = x / a"),
        ("""
def ex_11_5(denoise, x, levels):
    for now, then in pairwise(levels):
        first = denoise(x, now)
        step = then.s / then.a - now.s / now.a
        y = x / now.a + step * first.noise
        second = denoise(y, then)
        x = then.a * (x / now.a + step * (first.noise + second.noise) / 2)
    return x
""", "wants x = a y"),
    ],
}
