"""sdlib.ddpm against diffusers, against linear algebra without a library, and bad input."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from helpers import relative_error
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
