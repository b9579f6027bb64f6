"""sdlib.noise against diffusers (bit for bit), its known numbers, properties, bad input."""

import dataclasses
import itertools

import pytest
import torch
from diffusers import DDPMScheduler
from helpers import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlib.noise import (
    NoiseSchedule,
    alpha_bar_like,
    cosine_betas,
    linear_betas,
    make_betas,
    rescale_zero_terminal_snr,
    scaled_linear_betas,
    scales,
)

KINDS = ["linear", "scaled_linear", "squaredcos_cap_v2"]
CONFIGS = [
    dict(zip(["beta_schedule", "rescale_betas_zero_snr", "num_train_timesteps"], values))
    for values in itertools.product(KINDS, [False, True], [2, 37, 1000])
]
BETAS = dict(beta_start=0.00085, beta_end=0.012)


def pair(config):
    theirs = DDPMScheduler(**BETAS, **config, clip_sample=False)
    return NoiseSchedule.from_config(**BETAS, **config), theirs


def batch(steps, shape=(3, 8, 8)):
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([0, steps // 3, steps // 2, steps - 2, steps - 1])
    x0, noise = torch.randn(2, len(t), *shape, generator=generator)
    return x0, noise, t


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_schedule_equals_diffusers_bit_for_bit(config):
    ours, theirs = pair(config)
    assert torch.equal(ours.betas, theirs.betas)
    assert torch.equal(ours.alphas, theirs.alphas)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert ours.betas.dtype == torch.float32
    assert ours.num_train_timesteps == config["num_train_timesteps"]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", [(), (2,), (3, 8, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_add_noise_equals_diffusers_bit_for_bit(config, shape, dtype):
    ours, theirs = pair(config)
    x0, noise, t = batch(config["num_train_timesteps"], shape)
    x0, noise = x0.to(dtype), noise.to(dtype)
    mine = ours.add_noise(x0, noise, t)
    assert mine.dtype == dtype
    assert torch.equal(mine, theirs.add_noise(x0, noise, t))


def test_one_step_for_the_whole_batch():
    schedule = NoiseSchedule.sd15()
    x0, noise, _ = batch(1000)
    expected = schedule.add_noise(x0, noise, torch.full((len(x0),), 700))
    for t in (700, torch.tensor(700)):
        assert torch.equal(schedule.add_noise(x0, noise, t), expected)


def test_numbers_of_stable_diffusion():
    """The figures of REFERENCE.md and of Lin et al. (2024), table 1."""
    schedule = NoiseSchedule.sd15()
    assert float(schedule.sigma(0)) == pytest.approx(0.029167, abs=1e-6)
    assert float(schedule.sigma(999)) == pytest.approx(14.614641, abs=1e-5)
    assert float(schedule.a(999)) == pytest.approx(0.068265, abs=5e-6)
    assert float(schedule.snr(999)) == pytest.approx(0.004682, abs=5e-6)
    assert torch.equal(schedule.betas, NoiseSchedule.from_config().betas)


def test_emoji_keeps_no_signal_at_the_end():
    schedule, plain = NoiseSchedule.emoji(), NoiseSchedule.sd15()
    assert schedule.a(999) == 0 and schedule.s(999) == 1 and schedule.snr(999) == 0
    assert torch.isinf(schedule.sigma(999))
    assert schedule.betas[-1] == 1
    assert float(schedule.a(0)) == pytest.approx(float(plain.a(0)), abs=1e-7)
    assert (schedule.a(torch.arange(1, 1000)) < plain.a(torch.arange(1, 1000))).all()
    x0, noise, _ = batch(1000)
    assert torch.equal(schedule.add_noise(x0, noise, 999), noise)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_scales_agree_with_each_other(config):
    schedule, _ = pair(config)
    t = torch.arange(config["num_train_timesteps"])
    a, s = schedule.a(t), schedule.s(t)
    assert relative_error(a**2 + s**2, torch.ones(len(t))) < 1e-6
    keeps = a > 0
    assert relative_error(schedule.sigma(t)[keeps], (s / a)[keeps]) < 1e-6
    assert relative_error(schedule.snr(t), a**2 / s**2) < 1e-6
    assert (a[1:] < a[:-1]).all(), "each step must leave less signal"


def test_broadcasting():
    schedule = NoiseSchedule.sd15()
    t = torch.tensor([5, 800])
    a, s = scales(schedule, t, like=torch.zeros(2, 3, 4, 4))
    assert a.shape == s.shape == (2, 1, 1, 1)
    assert torch.equal(a.flatten(), schedule.a(t))
    assert alpha_bar_like(schedule, 5, torch.zeros(2, 3)).shape == (1, 1)
    # a batch as large as the width must not be broadcast along the width
    x0, noise = torch.ones(4, 4), torch.zeros(4, 4)
    rows = schedule.add_noise(x0, noise, torch.tensor([0, 300, 600, 900]))
    assert (rows == rows[:, :1]).all() and (rows[0] != rows[1]).all()


def test_half_precision_is_not_computed_in_half_precision():
    schedule = NoiseSchedule.sd15()
    x0, noise, t = batch(1000)
    mine = schedule.add_noise(x0.bfloat16(), noise.bfloat16(), t)
    assert mine.dtype == torch.bfloat16
    exact = schedule.add_noise(x0.bfloat16().float(), noise.bfloat16().float(), t)
    assert relative_error(mine.float(), exact) < 2**-8
    bar = schedule.alphas_cumprod.bfloat16()[t].reshape(-1, 1, 1, 1)
    trap = bar**0.5 * x0.bfloat16() + (1 - bar) ** 0.5 * noise.bfloat16()
    first = relative_error(trap[0].float(), exact[0])
    assert first > 10 * relative_error(mine[0].float(), exact[0])


def test_moving_and_precision():
    schedule = NoiseSchedule.emoji()
    double = schedule.to(torch.float64)
    assert isinstance(double, NoiseSchedule) and double.a(3).dtype == torch.float64
    assert torch.equal(double.betas.float(), schedule.betas)
    assert schedule.to("cpu").betas.device.type == "cpu"
    exact = NoiseSchedule.from_betas(schedule.betas.double())
    assert relative_error(schedule.alphas_cumprod, exact.alphas_cumprod) < 1e-5
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.betas = None


def test_rescaling_leaves_its_argument_alone():
    betas = scaled_linear_betas(1000, 0.00085, 0.012)
    before = betas.clone()
    rescale_zero_terminal_snr(betas)
    assert torch.equal(betas, before)


# Wrong schedules that look right: each must be noticed by the comparison above.
def trap_not_squared():
    return torch.linspace(0.00085, 0.012, 1000)


def trap_squared_ends():
    return torch.linspace(0.00085**2, 0.012**2, 1000) ** 0.5


def trap_no_offset():
    return cosine_betas(1000, offset=0.0)


def trap_no_cap():
    return cosine_betas(1000, max_beta=1.0)


def trap_unscaled_shift():
    a = torch.cumprod(1 - scaled_linear_betas(1000, 0.00085, 0.012), 0).sqrt()
    bar = (a - a[-1]) ** 2
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


def trap_rescaled_alpha_bar():
    bar = torch.cumprod(1 - scaled_linear_betas(1000, 0.00085, 0.012), 0)
    bar = (bar - bar[-1]) * bar[0] / (bar[0] - bar[-1])
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


@pytest.mark.parametrize("trap, config", [
    (trap_not_squared, dict(beta_schedule="scaled_linear")),
    (trap_squared_ends, dict(beta_schedule="scaled_linear")),
    (trap_no_offset, dict(beta_schedule="squaredcos_cap_v2")),
    (trap_no_cap, dict(beta_schedule="squaredcos_cap_v2")),
    (trap_unscaled_shift, dict(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)),
    (trap_rescaled_alpha_bar,
     dict(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)),
])
def test_wrong_schedules_are_noticed(trap, config):
    theirs = DDPMScheduler(**BETAS, **config)
    assert relative_error(trap(), theirs.betas) > 1e-5  # 10 x the tolerance


@pytest.mark.parametrize("name, wrong", [
    ("variance for deviation", lambda n, x, e, t: (
        (bar := alpha_bar_like(n, t, x)) * x + (1 - bar) * e)),
    ("one step's alpha", lambda n, x, e, t: (
        (al := n.alphas[t].reshape(-1, 1, 1, 1)) ** 0.5 * x + (1 - al) ** 0.5 * e)),
    ("off by one", lambda n, x, e, t: n.add_noise(x, e, (t - 1).clamp(min=0))),
    ("swapped", lambda n, x, e, t: n.add_noise(e, x, t)),
])
def test_wrong_noising_is_noticed(name, wrong):
    schedule, theirs = pair(CONFIGS[8])
    assert schedule.num_train_timesteps == 1000
    x0, noise, t = batch(1000)
    assert relative_error(wrong(schedule, x0, noise, t), theirs.add_noise(x0, noise, t)) > 1e-5


def test_bad_input_is_explained():
    schedule = NoiseSchedule.sd15()
    x0, noise, t = batch(1000)
    with pytest.raises(ValueError, match=r"t must lie in 0\.\.999, got 1000"):
        schedule.a(1000)
    with pytest.raises(ValueError, match=r"0\.\.999, got \[-1\]"):
        schedule.sigma(torch.tensor([-1]))
    with pytest.raises(TypeError, match="integers, the numbers of steps; got torch.float32"):
        schedule.add_noise(x0, noise, 0.5)
    with pytest.raises(ValueError, match=r"one per example, 5 of them; got the shape \(3,\)"):
        schedule.add_noise(x0, noise, t[:3])
    with pytest.raises(ValueError, match="'sigmoid': choose 'linear'"):
        NoiseSchedule.from_config(beta_schedule="sigmoid")
    with pytest.raises(ValueError, match="must be >= 1, got 0"):
        NoiseSchedule.from_config(num_train_timesteps=0)
    with pytest.raises(ValueError, match="got 0.02 and 0.0001"):
        make_betas(10, 0.02, 0.0001, "linear")
    with pytest.raises(ValueError, match="at least 2 steps"):
        rescale_zero_terminal_snr(linear_betas(1, 0.1, 0.2))
    with pytest.raises(ValueError, match=r"numbers in \(0, 1\]"):
        NoiseSchedule.from_betas(torch.tensor([0.1, 1.5]))


# ------------------------------------------------- properties, for schedules of all kinds
FEW = settings(max_examples=40, deadline=None, derandomize=True)
DTYPES = st.sampled_from([torch.float32, torch.float64])
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


@st.composite
def schedules(draw, smallest=1):
    """Any schedule that a config can describe, computed in float32 or float64."""
    kind, steps = draw(st.sampled_from(KINDS)), draw(st.integers(smallest, 300))
    start = draw(st.floats(1e-4, 0.02))
    end = draw(st.floats(start, 0.04))
    rescale = steps > 1 and draw(st.booleans())
    betas = make_betas(steps, start, end, kind, rescale).to(draw(DTYPES))
    return NoiseSchedule.from_betas(betas)


def tolerance(schedule, factor=16):
    """Rounding grows with the number of factors in alpha-bar."""
    return factor * EPS[schedule.betas.dtype] * (schedule.num_train_timesteps + 4)


@FEW
@given(schedules())
def test_property_signal_falls_and_squares_add_to_one(schedule):
    t = torch.arange(schedule.num_train_timesteps)
    bar, a, s = schedule.alphas_cumprod, schedule.a(t), schedule.s(t)
    assert bar.dtype == a.dtype == s.dtype == schedule.betas.dtype
    assert ((bar >= 0) & (bar <= 1)).all()
    assert (a.diff() <= 0).all() and (s.diff() >= 0).all()
    assert (schedule.snr(t).diff() <= 0).all()
    assert (a**2 + s**2 - 1).abs().max() <= tolerance(schedule)


@FEW
@given(schedules())
def test_property_each_name_gives_back_the_others(schedule):
    """alpha-bar from SNR, from sigma and from log-SNR; betas from alpha-bar."""
    t = torch.arange(schedule.num_train_timesteps)
    bar, snr, sigma = schedule.alphas_cumprod, schedule.snr(t), schedule.sigma(t)
    tol = tolerance(schedule)
    assert (snr / (1 + snr) - bar).abs().max() <= tol
    assert (1 / (1 + sigma**2) - bar).abs().max() <= tol
    assert (torch.sigmoid(snr.log()) - bar).abs().max() <= tol
    keeps = torch.cat([bar[:1], bar[1:] / bar[:-1]])
    assert (1 - keeps - schedule.betas).abs().max() <= tol


@FEW
@given(schedules(smallest=2), st.data())
def test_property_two_jumps_are_one(schedule, data):
    """Variances after x_0 -> x_r -> x_t are those of x_0 -> x_t."""
    t = data.draw(st.integers(1, schedule.num_train_timesteps - 1))
    r = data.draw(st.integers(0, t - 1))
    ratio = schedule.alphas_cumprod[t] / schedule.alphas_cumprod[r]
    variance = ratio * schedule.s(r) ** 2 + (1 - ratio)
    tol = tolerance(schedule)
    assert abs(float(ratio**0.5 * schedule.a(r) - schedule.a(t))) <= tol
    assert abs(float(variance - schedule.s(t) ** 2)) <= tol


@FEW
@given(schedules(), st.integers(0, 10**6), st.integers(1, 5), DTYPES)
def test_property_noising_can_be_inverted(schedule, seed, size, dtype):
    """x_0 comes back from x_t and the noise; add_noise is linear in both."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(schedule.num_train_timesteps, (size,), generator=generator)
    x0, noise = torch.randn(2, size, 2, 3, generator=generator, dtype=dtype)
    xt = schedule.add_noise(x0, noise, t)
    assert xt.shape == x0.shape and xt.dtype == dtype
    a, s = scales(schedule, t, like=x0)
    assert a.shape == (size, 1, 1)
    tol = 16 * EPS[dtype] * (1 + float(x0.abs().max() + noise.abs().max()))
    assert (a * x0 - (xt - s * noise)).abs().max() <= tol
    doubled = schedule.add_noise(2 * x0, 2 * noise, t)
    assert (doubled - 2 * xt).abs().max() <= 2 * tol
    for row in range(size):  # each example has its own step, and only that
        alone = schedule.add_noise(x0[row:row + 1], noise[row:row + 1], int(t[row]))
        assert (alone[0] - xt[row]).abs().max() <= tol


@FEW
@given(st.integers(2, 300), st.floats(1e-4, 0.02), st.sampled_from(KINDS), DTYPES)
def test_property_rescaling(steps, start, kind, dtype):
    """Ends at exactly no signal, keeps the first step, ruins more in each other one."""
    before = make_betas(steps, start, 2 * start, kind).to(dtype)
    after = rescale_zero_terminal_snr(before)
    assert after.dtype == dtype and after[-1] == 1
    assert ((after > 0) & (after <= 1)).all()
    slack = 64 * EPS[dtype]
    assert abs(float(after[0] - before[0])) <= slack
    assert (after[1:] >= before[1:] - slack).all()
    twice = NoiseSchedule.from_betas(rescale_zero_terminal_snr(after))
    once = NoiseSchedule.from_betas(after)
    assert (twice.alphas_cumprod - once.alphas_cumprod).abs().max() <= tolerance(once)


@FEW
@given(schedules(), DTYPES)
def test_property_precisions_agree(schedule, dtype):
    """The same betas in float64 give the same scales, up to float32's rounding."""
    t = torch.arange(schedule.num_train_timesteps)
    other = NoiseSchedule.from_betas(schedule.betas.to(dtype))
    coarse = max(EPS[dtype], EPS[schedule.betas.dtype])
    tol = 4 * coarse * (schedule.num_train_timesteps + 4)
    assert (other.alphas_cumprod - schedule.alphas_cumprod).abs().max() <= tol
    # s^2 = 1 - alpha-bar loses digits where alpha-bar is near 1: compare the square
    assert (other.s(t) ** 2 - schedule.s(t) ** 2).abs().max() <= 2 * tol
