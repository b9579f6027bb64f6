"""sdlib.ddpm against diffusers, against linear algebra without a library, bad input, and
properties that hold for any schedule, step, data and precision."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from helpers import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from sdlib.ddpm import (
    PREDICTION_TYPES,
    gaussian_kl,
    posterior,
    posterior_coefficients,
    predict_noise,
    predict_v,
    predict_x0,
    training_target,
)
from sdlib.noise import NoiseSchedule, scales

CONFIGS = [
    dict(beta_start=0.00085, beta_end=0.012, beta_schedule=kind, rescale_betas_zero_snr=zero)
    for kind, zero in itertools.product(
        ["linear", "scaled_linear", "squaredcos_cap_v2"], [False, True])
]
T = torch.tensor([0, 1, 40, 500, 998, 999])


def batch(schedule, t=T, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, len(t), 3, 4, 4, generator=generator, dtype=dtype)
    return x0, noise, schedule.add_noise(x0, noise, t)


def reference(config, prediction_type, **more):
    return DDPMScheduler(**config, clip_sample=False, prediction_type=prediction_type, **more)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("inference_steps", [None, 50, 7])
def test_posterior_equals_diffusers(config, inference_steps):
    """One ancestral step of ours with diffusers' noise is diffusers' step."""
    schedule, theirs = NoiseSchedule.from_config(**config), reference(config, "sample")
    ts, gap = T, 1
    if inference_steps:
        theirs.set_timesteps(inference_steps)
        ts, gap = theirs.timesteps, 1000 // inference_steps
    earlier = (ts - gap).clamp(min=-1)
    x0, _, xt = batch(schedule, ts)
    mean, variance = posterior(schedule, x0, xt, ts, earlier)
    assert mean.shape == x0.shape and variance.shape == (len(ts), 1, 1, 1)
    for i, t in enumerate(ts.tolist()):
        if earlier[i] >= 0:
            assert relative_error(variance[i].squeeze(), theirs._get_variance(t)) < 1e-6
        else:
            assert variance[i] == 0
        step = theirs.step(x0[i:i + 1], t, xt[i:i + 1],
                           generator=torch.Generator().manual_seed(t)).prev_sample
        z = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(t))
        assert relative_error(mean[i:i + 1] + variance[i] ** 0.5 * z, step) < 1e-6


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("earlier", [-1, 0, 123])
def test_posterior_is_the_conditional_of_the_joint_gaussian(config, earlier):
    """The textbook: condition the joint law of (x_earlier, x_t) given x_0, float64."""
    schedule = NoiseSchedule.from_config(**config).to(torch.float64)
    t, one = 499, torch.tensor(1.0, dtype=torch.float64)
    bar_t = schedule.alphas_cumprod[t]
    bar_e = schedule.alphas_cumprod[earlier] if earlier >= 0 else one
    x0, xt = torch.tensor([[0.7]]).double(), torch.tensor([[-1.3]]).double()
    covariance = (bar_t / bar_e) ** 0.5 * (1 - bar_e)
    mean = bar_e**0.5 * x0 + covariance / (1 - bar_t) * (xt - bar_t**0.5 * x0)
    variance = (1 - bar_e) - covariance**2 / (1 - bar_t)
    ours = posterior(schedule, x0, xt, t, earlier)
    assert relative_error(ours[0], mean) < 1e-12
    assert float((ours[1] - variance).abs()) < 1e-14


def test_first_step_returns_the_data():
    for config in CONFIGS:
        schedule = NoiseSchedule.from_config(**config)
        x0, _, xt = batch(schedule)
        k0, kt, variance = posterior_coefficients(schedule, 0, xt)
        assert (float(k0), float(kt), float(variance)) == (1, 0, 0)
        assert torch.equal(posterior(schedule, x0, xt, 0)[0], x0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_predictions_equal_diffusers(config, kind):
    schedule, theirs = NoiseSchedule.from_config(**config), reference(config, kind)
    ts = T[:-1] if kind == "epsilon" and config["rescale_betas_zero_snr"] else T
    x0, noise, xt = batch(schedule, ts)
    output = torch.randn(xt.shape, generator=torch.Generator().manual_seed(2))
    ours = predict_x0(schedule, output, xt, ts, kind)
    for i, t in enumerate(ts.tolist()):
        step = theirs.step(output[i:i + 1], t, xt[i:i + 1])
        assert relative_error(ours[i:i + 1], step.pred_original_sample) < 1e-6
    velocity = theirs.get_velocity(x0, noise, ts)
    assert relative_error(training_target(schedule, x0, noise, ts, "v_prediction"),
                          velocity) < 1e-6
    assert torch.equal(training_target(schedule, x0, noise, ts, "epsilon"), noise)
    assert torch.equal(training_target(schedule, x0, noise, ts, "sample"), x0)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_noise_equals_diffusers_ddim(kind):
    """DDIM's deterministic step to the previous time shows the noise that it inferred."""
    config = CONFIGS[2]
    schedule = NoiseSchedule.from_config(**config).to(torch.float64)
    theirs = DDIMScheduler(**config, clip_sample=False, prediction_type=kind)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.set_timesteps(1000)
    xt, output = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64,
                             generator=torch.Generator().manual_seed(3))
    for t in (1, 300, 999):
        step = theirs.step(output, t, xt)
        a, s = scales(schedule, t - 1, xt)
        inferred = (step.prev_sample - a * step.pred_original_sample) / s
        assert relative_error(predict_noise(schedule, output, xt, t, kind), inferred) < 1e-6


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_every_conversion_finds_the_truth(config, kind):
    schedule = NoiseSchedule.from_config(**config).to(torch.float64)
    ts = T[:-1] if kind == "epsilon" and config["rescale_betas_zero_snr"] else T
    x0, noise, xt = batch(schedule, ts, torch.float64)
    truth = training_target(schedule, x0, noise, ts, kind)
    assert relative_error(predict_x0(schedule, truth, xt, ts, kind), x0) < 1e-9
    assert relative_error(predict_noise(schedule, truth, xt, ts, kind), noise) < 1e-9
    v = training_target(schedule, x0, noise, ts, "v_prediction")
    assert relative_error(predict_v(schedule, truth, xt, ts, kind), v) < 1e-9


def test_noise_prediction_without_signal_is_not_finite():
    """Stated behaviour: x_T is pure noise, so no prediction of it determines x_0."""
    schedule = NoiseSchedule.emoji()
    x0, noise, xt = batch(schedule)
    bad = predict_x0(schedule, noise, xt, T, "epsilon")
    assert torch.isfinite(bad[:-1]).all() and not torch.isfinite(bad[-1]).any()
    v = training_target(schedule, x0, noise, T, "v_prediction")
    assert torch.equal(v[-1], -x0[-1])
    assert relative_error(predict_x0(schedule, v, xt, T, "v_prediction"), x0) < 1e-5


def test_half_precision_predictions_are_computed_in_float32():
    schedule = NoiseSchedule.sd15()
    x0, noise, xt = batch(schedule)
    mean, variance = posterior(schedule, x0.bfloat16(), xt.bfloat16(), T)
    assert mean.dtype == variance.dtype == torch.float32
    assert predict_x0(schedule, noise.bfloat16(), xt.bfloat16(), T,
                      "epsilon").dtype == torch.float32
    assert training_target(schedule, x0.bfloat16(), noise.bfloat16(), T,
                           "v_prediction").dtype == torch.bfloat16


def test_kl_equals_torch():
    generator = torch.Generator().manual_seed(4)
    mean1, mean2 = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    std1, std2 = torch.randn(2, 50, generator=generator, dtype=torch.float64).exp()
    reference = kl_divergence(Normal(mean1, std1), Normal(mean2, std2))
    assert relative_error(gaussian_kl(mean1, std1**2, mean2, std2**2), reference) < 1e-12
    same = gaussian_kl(mean1, std1**2, mean1, std1**2)
    assert float(same.abs().max()) < 1e-15


# Wrong formulas that look right: each must be noticed.
def wrong_posteriors():
    def with_(change):
        def wrong(schedule, x0, xt, t):
            now = schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
            then = schedule.alphas_cumprod[t - 1].reshape(-1, 1, 1, 1)
            beta = schedule.betas[t].reshape(-1, 1, 1, 1)
            return change(x0, xt, now, then, beta, 1 - beta)
        return wrong

    yield "x0 and xt swapped", with_(lambda x0, xt, now, then, b, al: (
        then**0.5 * b / (1 - now) * xt + al**0.5 * (1 - then) / (1 - now) * x0,
        (1 - then) / (1 - now) * b))
    yield "alpha-bar now for then", with_(lambda x0, xt, now, then, b, al: (
        now**0.5 * b / (1 - now) * x0 + al**0.5 * (1 - then) / (1 - now) * xt,
        (1 - then) / (1 - now) * b))
    yield "alpha not rooted", with_(lambda x0, xt, now, then, b, al: (
        then**0.5 * b / (1 - now) * x0 + al * (1 - then) / (1 - now) * xt,
        (1 - then) / (1 - now) * b))
    yield "forward variance", with_(lambda x0, xt, now, then, b, al: (
        then**0.5 * b / (1 - now) * x0 + al**0.5 * (1 - then) / (1 - now) * xt, b))
    yield "inverted ratio", with_(lambda x0, xt, now, then, b, al: (
        then**0.5 * b / (1 - now) * x0 + al**0.5 * (1 - then) / (1 - now) * xt,
        (1 - now) / (1 - then) * b))


@pytest.mark.parametrize("name, wrong", list(wrong_posteriors()))
def test_wrong_posteriors_are_noticed(name, wrong):
    schedule = NoiseSchedule.sd15()
    t = torch.tensor([3, 60, 400])
    x0, _, xt = batch(schedule, t)
    theirs = reference(CONFIGS[2], "sample")
    right = posterior(schedule, x0, xt, t)
    assert relative_error(right[1].flatten(),
                          torch.stack([theirs._get_variance(int(i)) for i in t])) < 1e-6
    errors = [relative_error(w, r) for w, r in zip(wrong(schedule, x0, xt, t), right)]
    assert max(errors) > 1e-5  # 10 x the tolerance


@pytest.mark.parametrize("name, wrong", [
    ("sign", lambda a, s, x0, noise: s * x0 - a * noise),
    ("plus", lambda a, s, x0, noise: a * noise + s * x0),
    ("swapped scales", lambda a, s, x0, noise: s * noise - a * x0),
])
def test_wrong_velocities_are_noticed(name, wrong):
    schedule, theirs = NoiseSchedule.sd15(), reference(CONFIGS[2], "v_prediction")
    x0, noise, xt = batch(schedule)
    a, s = scales(schedule, T, xt)
    assert relative_error(wrong(a, s, x0, noise), theirs.get_velocity(x0, noise, T)) > 1e-3


def test_bad_input_is_explained():
    schedule = NoiseSchedule.sd15()
    x0, noise, xt = batch(schedule)
    for function in (predict_x0, predict_noise, predict_v):
        with pytest.raises(ValueError, match="unknown prediction_type 'eps': choose one of"):
            function(schedule, noise, xt, T, "eps")
    with pytest.raises(ValueError, match="unknown prediction_type 'v'"):
        training_target(schedule, x0, noise, T, "v")
    with pytest.raises(ValueError, match=r"t must lie in 0\.\.999"):
        posterior(schedule, x0, xt, T + 1)
    with pytest.raises(ValueError, match=r"-1\.\.t-1; got 500 for t = 500"):
        posterior(schedule, x0, xt, 500, earlier=500)
    with pytest.raises(ValueError, match=r"one per example, 6 of them"):
        posterior(schedule, x0, xt, T[:2])


# -------------------------------------- properties: any schedule, step, data and precision
FEW = settings(max_examples=30, deadline=None, derandomize=True)
ROUNDING = {torch.float32: 2e-6, torch.float64: 4e-15}  # some units in the last place
KINDS = st.sampled_from(PREDICTION_TYPES)
CASES = st.builds(
    lambda betas, seed, dtype: case(betas, seed, dtype),
    st.lists(st.floats(1e-3, 0.5), min_size=3, max_size=10), st.integers(0, 10**6),
    st.sampled_from(list(ROUNDING)))
OUT = {"epsilon": predict_noise, "sample": predict_x0, "v_prediction": predict_v}


def case(betas, seed, dtype):
    """A schedule, data and noise in `dtype`, and for each example a step of its own."""
    schedule = NoiseSchedule.from_betas(torch.tensor(betas, dtype=dtype))
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(len(betas), (4,), generator=generator)
    x0, noise = torch.randn(2, 4, 3, 2, generator=generator, dtype=dtype)
    return schedule, x0, noise, t


def allowed(schedule, t, like):
    """Rounding, enlarged by the division that a conversion may need: by a or by s."""
    a, s = scales(schedule, t, like)
    return ROUNDING[like.dtype] * float(torch.maximum(1 / a, 1 / s).max()) ** 2


@FEW
@given(CASES, KINDS, KINDS)
def test_conversions_find_the_truth_from_any_target(drawn, kind, wanted):
    schedule, x0, noise, t = drawn
    xt = schedule.add_noise(x0, noise, t)
    given_, truth = (training_target(schedule, x0, noise, t, k) for k in (kind, wanted))
    answer = OUT[wanted](schedule, given_, xt, t, kind)
    assert answer.dtype == x0.dtype and answer.shape == x0.shape
    assert relative_error(answer, truth) < allowed(schedule, t, x0)


@FEW
@given(CASES, KINDS, KINDS, st.integers(0, 10**6))
def test_conversions_invert_each_other_on_any_prediction(drawn, kind, through, seed):
    """A network's answer is no truth: there and back must still change nothing."""
    schedule, x0, noise, t = drawn
    xt = schedule.add_noise(x0, noise, t)
    prediction = torch.randn(x0.shape, dtype=x0.dtype,
                             generator=torch.Generator().manual_seed(seed))
    there = OUT[through](schedule, prediction, xt, t, kind)
    back = OUT[kind](schedule, there, xt, t, through)
    assert relative_error(back, prediction) < allowed(schedule, t, x0)
    a, s = scales(schedule, t, xt)
    mixed = (a * predict_x0(schedule, prediction, xt, t, kind)
             + s * predict_noise(schedule, prediction, xt, t, kind))
    assert relative_error(mixed, xt) < allowed(schedule, t, x0)


@FEW
@given(CASES)
def test_velocity_is_a_rotation(drawn):
    """|x_t|^2 + |v|^2 = |x_0|^2 + |noise|^2, number by number."""
    schedule, x0, noise, t = drawn
    xt = schedule.add_noise(x0, noise, t)
    v = training_target(schedule, x0, noise, t, "v_prediction")
    assert relative_error(xt**2 + v**2, x0**2 + noise**2) < ROUNDING[x0.dtype]


@FEW
@given(CASES, KINDS)
def test_a_step_for_all_or_one_for_each_is_the_same(drawn, kind):
    schedule, x0, noise, t = drawn
    xt = schedule.add_noise(x0, noise, t)
    for i in range(len(t)):
        one = slice(i, i + 1)
        for function in OUT.values():
            assert torch.equal(function(schedule, noise, xt, t, kind)[one],
                               function(schedule, noise[one], xt[one], int(t[i]), kind))
        mean, variance = posterior(schedule, x0, xt, t)
        alone = posterior(schedule, x0[one], xt[one], int(t[i]))
        assert torch.equal(mean[one], alone[0])
        assert torch.equal(variance[one].flatten(), alone[1].flatten())


def bars(schedule, earlier, t, like):
    """alpha-bar of the earlier step (1 before the first) and of t, and their ratio."""
    now = schedule.alphas_cumprod[t].reshape(-1, 1, 1)
    then = schedule.alphas_cumprod[earlier.clamp(min=0)].reshape(-1, 1, 1)
    then = torch.where(earlier.reshape(-1, 1, 1) < 0, torch.ones_like(then), then)
    return then, now


def digits_left(schedule):
    """Rounding in 1 - alpha-bar, which loses digits where it is small: 3e-4 at worst."""
    return 2 * torch.finfo(schedule.betas.dtype).eps / float(schedule.betas[0])


def misfits(coefficients, then, now):
    """Errors of the three equations that fix the law of (x_earlier, x_t) given x_0.

    The mean over x_t must be sqrt(then) x_0, the variance 1 - then, and the covariance
    with x_t that of the chain.
    """
    k0, kt, variance = coefficients
    return [float(error.abs().max()) for error in (
        k0 + kt * now**0.5 - then**0.5,
        variance + kt**2 * (1 - now) - (1 - then),
        kt * (1 - now) - (now / then) ** 0.5 * (1 - then))]


@FEW
@given(CASES, st.integers(1, 4))
def test_posterior_has_the_moments_of_the_chain(drawn, back):
    schedule, x0, _, t = drawn
    earlier = (t - back).clamp(min=-1)
    then, now = bars(schedule, earlier, t, x0)
    k0, kt, variance = posterior_coefficients(schedule, t, x0, earlier)
    slack = digits_left(schedule)
    assert max(misfits((k0, kt, variance), then, now)) < slack
    assert (variance >= 0).all() and (variance <= 1 - then + slack).all()
    assert (variance <= 1 - now / then + slack).all()  # beta-tilde <= beta


@FEW
@given(CASES, st.integers(1, 3), st.integers(1, 3))
def test_two_posterior_steps_are_one(drawn, first, second):
    """Back from t to m and from m to r, with the same x_0, is back from t to r."""
    schedule, x0, _, t = drawn
    m = (t - first).clamp(min=0)
    t, m = t[t > m], m[t > m]  # where there is room for two steps
    if len(t) == 0:
        return
    r, like = (m - second).clamp(min=-1), x0[:len(t)]
    k0, kt, variance = posterior_coefficients(schedule, t, like, r)
    k0a, kta, variance_a = posterior_coefficients(schedule, t, like, m)
    k0b, ktb, variance_b = posterior_coefficients(schedule, m, like, r)
    tol = 2 * digits_left(schedule)
    for one, two in ((k0, k0b + ktb * k0a), (kt, ktb * kta),
                     (variance, variance_b + ktb**2 * variance_a)):
        assert float((one - two).abs().max()) < tol


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("name, wrong", [
    ("swapped", lambda k0, kt, v: (kt, k0, v)),
    ("2 % too far", lambda k0, kt, v: (1.02 * k0, kt, v)),
    ("2 % too much trust", lambda k0, kt, v: (k0, 1.02 * kt, v)),
    ("2 % too noisy", lambda k0, kt, v: (k0, kt, 1.02 * v)),
])
def test_wrong_coefficients_do_not_have_these_moments(dtype, name, wrong):
    schedule, x0, _, _ = case([0.1, 0.3, 0.2, 0.4], 0, dtype)
    t = torch.tensor([1, 2, 3, 3])
    then, now = bars(schedule, t - 1, t, x0)
    right = posterior_coefficients(schedule, t, x0)
    assert max(misfits(right, then, now)) < digits_left(schedule)
    assert max(misfits(wrong(*right), then, now)) > 1e-3


NUMBERS, POSITIVE = st.floats(-5, 5), st.floats(0.01, 10)


@FEW
@given(NUMBERS, POSITIVE, NUMBERS, POSITIVE, st.sampled_from(list(ROUNDING)))
def test_kl_is_a_distance_of_sorts(mean1, var1, mean2, var2, dtype):
    """Never negative, 0 for equal laws, unchanged if both are moved and stretched."""
    m1, v1, m2, v2 = (torch.tensor(x, dtype=dtype) for x in (mean1, var1, mean2, var2))
    kl = gaussian_kl(m1, v1, m2, v2)
    slack = ROUNDING[dtype] * (1 + float((v1 + (m1 - m2) ** 2) / v2))
    assert kl.dtype == dtype and kl > -slack
    assert abs(gaussian_kl(m1, v1, m1, v1)) < ROUNDING[dtype]
    moved = gaussian_kl(3 * m1 - 1, 9 * v1, 3 * m2 - 1, 9 * v2)
    assert abs(moved - kl) < 20 * slack
    squared = (m1 - m2) ** 2 / (2 * v2)  # equal variances: a squared error
    assert abs(gaussian_kl(m1, v2, m2, v2) - squared) < slack
