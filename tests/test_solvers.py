"""Solvers of higher order without any library: exact laws, in float64."""

import inspect
import math
from itertools import pairwise

import pytest
import torch
from helpers import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlib import exponential_solvers, samplers, solvers
from sdlib.exponential_solvers import (
    exponential_step,
    extrapolate,
    half_log_snr,
    sample_dpm,
    sample_unipc,
)
from sdlib.samplers import (
    Estimate,
    Level,
    SigmaLevel,
    ddim_step,
    ddpm_step,
    draw_noise,
    make_estimate,
    posterior_variance,
    sample_ddim,
)
from sdlib.solvers import (
    adams_bashforth,
    ancestral_step,
    follow,
    lms_weights,
    sample_heun,
    sample_lms,
)
from sdlib.spacing import (
    SPACINGS,
    exponential_sigmas,
    karras_sigmas,
    solver_timesteps,
    spaced_timesteps,
    times_of_sigmas,
)

MEAN, VARIANCE = 0.5, 0.25
COUNTS = (40, 80, 160, 320)


def level_of(sigma, exploding=False, dtype=torch.float64):
    sigma = torch.as_tensor(sigma, dtype=dtype)
    return Level(torch.ones_like(sigma), sigma**2) if exploding else SigmaLevel(sigma)


def levels_between(n, high=10.0, low=0.1, exploding=False):
    sigmas = torch.logspace(math.log10(high), math.log10(low), n + 1, dtype=torch.float64)
    return [level_of(sigma, exploding) for sigma in sigmas]


def denoise(x, level):
    """The exact denoiser of data N(MEAN, VARIANCE)."""
    gain = level.a * VARIANCE / (level.a2 * VARIANCE + level.s2)
    x0 = MEAN + gain * (x - level.a * MEAN)
    return Estimate(x0, (x - level.a * x0) / level.s)


def exact(x, first, last):
    """Where the flow carries x: each point keeps its rank."""
    stretch = ((last.a2 * VARIANCE + last.s2) / (first.a2 * VARIANCE + first.s2)) ** 0.5
    return last.a * MEAN + stretch * (x - first.a * MEAN)


def error(sample, n, **where):
    levels = levels_between(n, **where)
    x = levels[0].a * torch.linspace(-2, 2, 9, dtype=torch.float64) * 10
    *_, got = sample(denoise, x, levels)
    return relative_error(got, exact(x, levels[0], levels[-1]))


def orders(sample, **where):
    errors = [error(sample, n, **where) for n in COUNTS]
    return [math.log2(a / b) for a, b in pairwise(errors)]


def second_order_lms(denoise, x, levels):
    return sample_lms(denoise, x, levels, order=2)


# ------------------------------------------------------------------ order of convergence
@pytest.mark.parametrize("exploding", [False, True])
@pytest.mark.parametrize("sample,order", [
    (sample_ddim, 1), (sample_heun, 2), (sample_dpm, 2), (second_order_lms, 2)])
def test_order_of_convergence(sample, order, exploding):
    found = orders(sample, exploding=exploding)
    assert all(abs(each - order) < 0.15 for each in found), found


def test_unipc_gains_an_order_by_its_corrector():
    found = orders(sample_unipc)
    assert all(2.5 < each < 3.5 for each in found), found
    assert error(sample_unipc, 40) < error(sample_dpm, 40) / 3


def test_lms_of_order_four():
    found = orders(sample_lms)
    assert found[-1] > 2.7, found
    for bad in (0, 5, 1.5):
        with pytest.raises(ValueError, match="order must be 1, 2, 3 or 4"):
            list(sample_lms(denoise, torch.ones(1), levels_between(2), order=bad))


def test_first_order_members_are_one_method():
    levels = levels_between(17)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    *_, euler = sample_ddim(denoise, x, levels)
    *_, lms = sample_lms(denoise, x, levels, order=1)
    *_, heun = sample_heun(denoise, x, levels)
    for now, then in pairwise(levels):
        x = exponential_step(x, denoise(x, now).x0, now, then)
    assert relative_error(lms, euler) < 1e-12 and relative_error(x, euler) < 1e-12
    assert relative_error(heun, euler) > 1e-3


def test_the_last_step_to_clean_data():
    clean = Level(torch.tensor(1.0).double(), torch.tensor(0.0).double(), -1)
    levels = [*levels_between(10), clean]
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    for sample in (sample_ddim, sample_heun, sample_lms, sample_dpm, sample_unipc):
        *_, before, last = sample(denoise, x, levels)
        assert last.isfinite().all()
    assert relative_error(last, denoise(before, levels[-2]).x0) < 0.05


# ----------------------------------------------------------- a wrong coefficient, planted
def planted(module, name, old, new):
    """The module's functions, with a mistake in one of them."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, (old, source.count(old))
    source = source.replace(old, new).replace("from .", "from sdlib.")
    space = {"__name__": "planted"}
    exec(source, space)
    return space[name]


WRONG = [
    (solvers, "sample_heun", "(start.noise + end.noise) / 2", "(start.noise + end.noise) / 2.04"),
    (solvers, "sample_heun", "(start.noise + end.noise) / 2", "start.noise"),
    (solvers, "sample_lms", "float(then.s / then.a)), slopes)",
     "float(then.s / then.a)), slopes[::-1])"),
    (solvers, "sample_lms", "weights.append(half * total)", "weights.append(0.98 * half * total)"),
    (exponential_solvers, "sample_dpm", "coming / passed / 2", "coming / passed / 3"),
    (exponential_solvers, "sample_dpm", "coming / passed / 2", "passed / coming / 2.1"),
    (exponential_solvers, "sample_unipc", "torch.full_like(ratios, 0.5)",
     "torch.full_like(ratios, 0.6)"),
    (exponential_solvers, "sample_unipc", "phi = phi / -h - 1 / factorial",
     "phi = phi / -h + 1 / factorial"),
]


@pytest.mark.parametrize("module,name,old,new", WRONG)
def test_a_wrong_coefficient_spoils_the_order(module, name, old, new):
    right, wrong = getattr(module, name), planted(module, name, old, new)
    want = orders(right)[-1]
    assert abs(orders(wrong)[-1] - want) > 0.15
    assert error(wrong, 160) > 2 * error(right, 160)


def test_a_wrong_first_order_method_is_noticed():
    wrong = planted(samplers, "sample_ddim", "then.a * estimate.x0 +",
                    "0.99 * then.a * estimate.x0 +")
    assert abs(orders(wrong)[-1] - 1) > 0.15


# ------------------------------------------------------- laws of the samplers with noise
def ancestral(denoise, x, levels, generator):
    for now, then in pairwise(levels):
        x = ancestral_step(x, denoise(x, now).noise, now, then, draw_noise(x, generator))
    return x


def sde_1(denoise, x, levels, generator, step=exponential_step):
    for now, then in pairwise(levels):
        x = step(x, denoise(x, now).x0, now, then, draw_noise(x, generator))
    return x


def sde_2m(denoise, x, levels, generator):
    *_, x = sample_dpm(denoise, x, levels, sde=True, generator=generator)
    return x


def ddim_eta_1(denoise, x, levels, generator):
    *_, x = sample_ddim(denoise, x, levels, 1.0, generator)
    return x


def law_1(levels, noise=1.0):
    """Mean and variance after ancestral steps on Gaussian data: plain numbers, no sdlib.

    In y = x / a: down to `low` along the slope (y - m) sigma / (v + sigma^2), then noise.
    """
    sigmas = [float(level.s / level.a) for level in levels]
    mean, var = 0.0, float(1 / levels[0].a2)
    for here, there in pairwise(sigmas):
        up2 = there**2 * (here**2 - there**2) / here**2
        low = (there**2 - up2) ** 0.5
        gain = 1 + (low - here) * here / (VARIANCE + here**2)
        mean, var = MEAN + gain * (mean - MEAN), gain**2 * var + noise**2 * up2
    a = float(levels[-1].a)
    return a * mean, a**2 * var


def law_2m(levels):
    """The same for the two-step SDE method: the joint law of (x, last x0) is propagated."""
    cov, mean = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    cov[0, 0] = 1.0
    lam = [math.log(float(level.a / level.s)) for level in levels]
    for k, (now, then) in enumerate(pairwise(levels)):
        a, s, au, su = (float(z) for z in (now.a, now.s, then.a, then.s))
        gain = a * VARIANCE / (a * a * VARIANCE + s * s)
        h = lam[k + 1] - lam[k]
        r = h / (lam[k] - lam[k - 1]) / 2 if k else 0.0
        fresh = 1 - math.exp(-2 * h)
        kept, push = su / s * math.exp(-h), au * fresh
        # x0 = gain x + (1 - gain a) m;  x' = kept x + push ((1 + r) x0 - r earlier)
        step = torch.tensor([[kept + push * (1 + r) * gain, -push * r], [gain, 0.0]],
                            dtype=torch.float64)
        shift = torch.tensor([push * (1 + r), 1.0], dtype=torch.float64) * (1 - gain * a) * MEAN
        mean, cov = step @ mean + shift, step @ cov @ step.T
        cov[0, 0] += su**2 * fresh
    return float(mean[0]), float(cov[0, 0])


N = 40_000


@pytest.mark.parametrize("sample,law", [(ancestral, law_1), (sde_1, law_1), (ddim_eta_1, law_1),
                                        (sde_2m, law_2m)])
def test_mean_and_variance_of_the_samplers_with_noise(sample, law):
    """Within four standard errors of the law of the discrete sampler."""
    levels = levels_between(12)
    g = torch.Generator().manual_seed(0)
    x = sample(denoise, torch.randn(N, generator=g, dtype=torch.float64), levels, g)
    mean, var = law(levels)
    assert abs(x.mean() - mean) < 4 * (var / N) ** 0.5
    assert abs(x.var() - var) < 4 * var * (2 / N) ** 0.5


def test_wrong_noise_would_not_pass():
    levels = levels_between(12)
    _, var = law_1(levels)
    assert abs(law_1(levels, noise=1.05)[1] - var) > 8 * var * (2 / N) ** 0.5


@pytest.mark.parametrize("law", [law_1, law_2m])
def test_the_law_tends_to_the_data(law):
    """At the last level the exact law is N(a m, a^2 v + s^2)."""
    last = levels_between(10, high=80.0)[-1]
    want = float(last.a2 * VARIANCE + last.s2)
    errors = [abs(law(levels_between(n, high=80.0))[1] - want) for n in (40, 80, 160)]
    assert errors[0] > 1.7 * errors[1] > 1.7**2 * errors[2], errors
    assert abs(law(levels_between(640, high=80.0))[0] - float(last.a) * MEAN) < 5e-3


def test_the_sde_form_of_order_two_is_closer_than_ddpm():
    levels = levels_between(40, high=80.0)
    want = float(levels[-1].a2 * VARIANCE + levels[-1].s2)
    assert abs(law_2m(levels)[1] - want) < abs(law_1(levels)[1] - want) / 3


def test_ddim_at_eta_one_has_ddpms_variance():
    zero = torch.zeros(1, dtype=torch.float64)
    for now, then in pairwise(levels_between(9)):
        std = posterior_variance(now, then) ** 0.5
        for got in (ddim_step(Estimate(zero, zero), now, then, 1.0, zero + 1),
                    ancestral_step(zero, zero, now, then, zero + 1),
                    exponential_step(zero, zero, now, then, zero + 1),
                    ddpm_step(zero, zero, now, then, std, zero + 1)):
            assert relative_error(got, std[None]) < 1e-9


# -------------------------------------------------------------------------- properties
SIGMA = st.floats(0.03, 20.0)
NUMBER = st.floats(-3, 3)
DTYPES = st.sampled_from([torch.float32, torch.float64])
few = settings(max_examples=25, deadline=None, derandomize=True)


def tolerance(dtype):
    return 2e-4 if dtype == torch.float32 else 1e-9


@few
@given(SIGMA, SIGMA, NUMBER, NUMBER, DTYPES)
def test_the_true_noise_leads_to_the_true_sample(sigma, other, x0, noise, dtype):
    """With the true noise any first-order step lands on the line x0 + sigma noise."""
    now, then = (level_of(s, dtype=dtype) for s in (max(sigma, other), min(sigma, other)))
    one = torch.ones(1, dtype=dtype)
    x, want = now.a * x0 + now.s * noise * one, then.a * x0 + then.s * noise * one
    size = 1 + abs(x0) + abs(noise)
    for got in (follow(x, noise * one, now, then), ddim_step(Estimate(x0, noise * one), now, then),
                exponential_step(x, x0 * one, now, then)):
        assert got.dtype == dtype
        assert float((got - want).abs()) < tolerance(dtype) * size


@few
@given(SIGMA, NUMBER, NUMBER, DTYPES, st.booleans())
def test_estimates_of_all_kinds_agree(sigma, x0, noise, dtype, exploding):
    level = level_of(sigma, exploding, dtype)
    x0, noise = (torch.tensor([v], dtype=dtype) for v in (x0, noise))
    x = level.a * x0 + level.s * noise
    v = (level.a * noise - level.s * x0) / level.scale
    size = float(1 + x0.abs() + noise.abs()) * max(1.0, sigma, 1 / sigma)
    for kind, answer in (("epsilon", noise), ("sample", x0), ("v_prediction", v)):
        estimate = make_estimate(answer, x, level, kind)
        assert float((estimate.x0 - x0).abs()) < tolerance(dtype) * size
        assert float((estimate.noise - noise).abs()) < tolerance(dtype) * size


@few
@given(st.lists(SIGMA, min_size=1, max_size=4, unique=True), SIGMA, st.lists(NUMBER, min_size=4,
                                                                          max_size=4))
def test_lms_integrates_polynomials_exactly(sigmas, end, coefficients):
    """Slopes that are a polynomial of degree k - 1 at k levels: no error at all."""
    close = min([abs(a - b) for a in sigmas for b in sigmas if a != b], default=1)
    if close < 0.05:
        return

    def slope(s):
        return sum(c * s**k for k, c in enumerate(coefficients[:len(sigmas)]))

    def primitive(s):
        return sum(c * s ** (k + 1) / (k + 1) for k, c in enumerate(coefficients[:len(sigmas)]))

    weights = lms_weights(sigmas, end)
    got = sum(w * slope(s) for w, s in zip(weights, sigmas))
    want = primitive(end) - primitive(sigmas[0])
    size = sum(abs(w * slope(s)) for w, s in zip(weights, sigmas)) + abs(want) + 1e-6
    assert abs(got - want) < 1e-6 * size


def test_adams_bashforth_is_lms_at_even_levels():
    for k in range(1, 5):
        even = [1.0 - 0.1 * j for j in range(k)][::-1]         # newest first is smallest
        weights = lms_weights(even, even[0] - 0.1)
        slopes = [torch.eye(k, dtype=torch.float64)[j] for j in range(k)]
        assert relative_error(adams_bashforth(slopes), [w / -0.1 for w in weights]) < 1e-9


@few
@given(NUMBER, NUMBER, st.floats(0.1, 3), st.floats(0.1, 3), st.floats(-1, 2))
def test_extrapolation_continues_a_line_in_lambda(start, slope, passed, coming, lam):
    def at(value):
        return level_of(math.exp(-value))

    x0 = torch.tensor([start + slope * lam], dtype=torch.float64)
    earlier = x0 - slope * passed
    got = extrapolate(x0, earlier, at(lam - passed), at(lam), at(lam + coming))
    assert abs(float(got) - float(x0) - slope * coming / 2) < 1e-9
    assert abs(float(half_log_snr(at(lam))) - lam) < 1e-9


@few
@given(st.integers(1, 1000), st.sampled_from(SPACINGS))
def test_spacings_fall_and_stay_inside(n, spacing):
    steps = spaced_timesteps(1000, n, spacing)
    assert len(steps) == n and steps.max() <= 999 and steps.min() >= 0
    assert (steps[1:] < steps[:-1]).all()
    if n < 1000:
        solver = solver_timesteps(1000, n, spacing)
        assert len(solver) == n and (solver[1:] < solver[:-1]).all() and solver.max() <= 999


@few
@given(st.floats(1, 100), st.floats(0.01, 0.9), st.integers(2, 60))
def test_free_sigmas_run_between_their_ends(high, low, n):
    for sigmas in (karras_sigmas(high, low, n), exponential_sigmas(high, low, n)):
        assert len(sigmas) == n and (sigmas[1:] < sigmas[:-1]).all()
        assert relative_error(sigmas[[0, -1]], [high, low]) < 1e-9
    logs = torch.as_tensor(exponential_sigmas(high, low, n)).log()
    assert relative_error(logs.diff(), logs.diff().mean().expand(n - 1)) < 1e-6


def test_times_of_sigmas_invert_the_table():
    table = torch.logspace(-1.5, 1.2, 1000).numpy()
    times = times_of_sigmas(table[[0, 1, 500, 999]].astype("float64"), table)
    assert relative_error(times, [0, 1, 500, 999]) < 1e-5
    assert times_of_sigmas(torch.tensor([1e-9, 1e9]).numpy(), table).tolist() == [0, 999]
