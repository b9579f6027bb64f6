"""sdlib.samplers and sdlib.schedulers: step by step against diffusers, and exact laws."""

import copy
import dataclasses
import itertools
import json
import math

import pytest
import torch
from helpers import relative_error

from sdlib import chain_schedulers, samplers, scheduler_base, schedulers
from sdlib.ddpm import posterior
from sdlib.noise import NoiseSchedule
from sdlib.samplers import (
    Estimate,
    Level,
    NetworkDenoiser,
    ddim_step,
    ddpm_step,
    draw_noise,
    fresh_variance,
    make_estimate,
    make_level,
    make_levels,
    posterior_variance,
    sample_ddim,
    sample_ddpm,
)
from sdlib.schedulers import (
    DDIMConfig,
    DDIMScheduler,
    DDPMConfig,
    DDPMScheduler,
    load_scheduler,
    spaced_timesteps,
)

diffusers = pytest.importorskip("diffusers")

STEPS = [1, 2, 3, 10, 50, 999]
SPACINGS = ["leading", "linspace", "trailing"]
TYPES = ["epsilon", "sample", "v_prediction"]
SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
SCHEDULES = {"linear": {}, "sd": SD, "cosine": dict(beta_schedule="squaredcos_cap_v2"),
             "zero-snr": SD | dict(rescale_betas_zero_snr=True)}
TOL = 1e-5


def tensors(*shape, n=3, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=dtype) for _ in range(n)]


def both(name, **settings):
    return getattr(schedulers, name)(**settings), getattr(diffusers, name)(**settings)


def visited(timesteps, whole):
    """All steps of a run; not `whole`: about 20, with both ends."""
    t = [int(t) for t in timesteps]
    return t if whole else t[:3] + t[3:-4:max(1, len(t) // 12)] + t[-4:]


# ------------------------------------------------------------ step by step, as diffusers
every_setting = pytest.mark.parametrize("schedule,kind,spacing",
                                        [*itertools.product(SCHEDULES, TYPES, SPACINGS)])


def compare_ddim(schedule, kind, spacing, steps, all_of_999):
    x, prediction, noise = tensors(2, 3, 4, 5)
    for n, clip, (to_one, offset) in itertools.product(
            steps, (True, False), ((True, 0), (False, 1))):
        ours, theirs = both("DDIMScheduler", **SCHEDULES[schedule], timestep_spacing=spacing,
                            prediction_type=kind, clip_sample=clip,
                            set_alpha_to_one=to_one, steps_offset=offset)
        ours.set_timesteps(n)
        theirs.set_timesteps(n)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert ours.timesteps.dtype == theirs.timesteps.dtype
        visits = [(t, eta, clipped)
                  for eta, clipped in ((0.0, False), (0.5, False), (1.0, True))
                  for t in visited(theirs.timesteps, n <= 50 or all_of_999 or (
                      eta == 0.5 and to_one and not clip))]
        for t, eta, clipped in visits:
            settings = dict(eta=eta, variance_noise=noise, use_clipped_model_output=clipped)
            if float(ours.level(t).a2) == 0 and kind == "epsilon" and not clip:
                with pytest.raises(ValueError, match="pure noise"):   # diffusers: inf, NaN
                    ours.step(prediction, t, x, **settings)
                continue
            got = ours.step(prediction, t, x, **settings)
            want = theirs.step(prediction, t, x, **settings)
            assert got.isfinite().all()
            if not want.prev_sample.isfinite().all():
                # diffusers takes the root of a rounding error below zero
                assert eta == 1 and ours.level(t).a2 < 1e-6
                continue
            assert relative_error(got, want.prev_sample) <= TOL, (n, clip, to_one, t, eta)
            assert relative_error(ours.estimate(prediction, t, x).x0,
                                  want.pred_original_sample) <= TOL


def compare_ddpm(schedule, kind, spacing, steps, all_of_999):
    x, prediction, _ = tensors(2, 3, 4, 5)
    variances = ["fixed_small", "fixed_small_log", "fixed_large"]
    for n, clip, variance, offset in itertools.product(steps, (True, False), variances, (0, 1)):
        ours, theirs = both("DDPMScheduler", **SCHEDULES[schedule], timestep_spacing=spacing,
                            prediction_type=kind, clip_sample=clip, variance_type=variance,
                            steps_offset=offset)
        ours.set_timesteps(n)
        theirs.set_timesteps(n)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        plain = variance == "fixed_small" and not clip and not offset
        for t in visited(theirs.timesteps, n <= 50 or all_of_999 or plain):
            if float(ours.level(t).a2) == 0 and kind == "epsilon" and not clip:
                with pytest.raises(ValueError, match="pure noise"):
                    ours.step(prediction, t, x)
                continue
            g1, g2 = torch.Generator().manual_seed(t), torch.Generator().manual_seed(t)
            got = ours.step(prediction, t, x, generator=g1)
            want = theirs.step(prediction, t, x, generator=g2).prev_sample
            assert relative_error(got, want) <= TOL, (n, clip, variance, t)
            assert torch.equal(g1.get_state(), g2.get_state()), "drew another amount of noise"


@every_setting
def test_ddim_equals_diffusers(schedule, kind, spacing):
    compare_ddim(schedule, kind, spacing, STEPS, all_of_999=False)


@every_setting
def test_ddpm_equals_diffusers(schedule, kind, spacing):
    compare_ddpm(schedule, kind, spacing, STEPS, all_of_999=False)


@pytest.mark.full
@every_setting
def test_all_999_steps_equal_diffusers(schedule, kind, spacing):
    """Every step of the longest run, in every setting of both schedulers."""
    compare_ddim(schedule, kind, spacing, [999], all_of_999=True)
    compare_ddpm(schedule, kind, spacing, [999], all_of_999=True)


def test_ddpm_without_set_timesteps_walks_all_steps():
    x, prediction, _ = tensors(2, 3, 4, 5)
    ours, theirs = both("DDPMScheduler")
    assert torch.equal(ours.timesteps, theirs.timesteps)
    for t in (999, 500, 1, 0):
        got = ours.step(prediction, t, x, generator=torch.Generator().manual_seed(0))
        want = theirs.step(prediction, t, x, generator=torch.Generator().manual_seed(0))
        assert relative_error(got, want.prev_sample) <= TOL


@pytest.mark.parametrize("total", [10, 100, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_for_every_number_of_steps(total, spacing):
    for n in range(1, total + 1):
        ours, theirs = both("DDIMScheduler", num_train_timesteps=total, timestep_spacing=spacing)
        theirs.set_timesteps(n)
        ours.set_timesteps(n)
        # For some n, "trailing" in diffusers appends the step -1, by a rounding error.
        assert len(ours.timesteps) == n and int(ours.timesteps[-1]) >= 0
        assert torch.equal(ours.timesteps, theirs.timesteps[:n])
        assert all(int(t) == -1 for t in theirs.timesteps[n:])


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_add_noise_and_velocity(name, schedule, dtype):
    x, noise, _ = tensors(4, 3, 5, 2, dtype=dtype)
    ours, theirs = both(name, **SCHEDULES[schedule])
    for n in (3, 50):
        ours.set_timesteps(n)
        middle = ours.timesteps[n // 2]
        for t in (torch.tensor([0, 1, 500, 999]), middle.expand(4), middle[None]):
            assert relative_error(ours.add_noise(x, noise, t),
                                  theirs.add_noise(x, noise, t)) <= TOL
            if len(t) == 1:
                continue
            assert relative_error(ours.get_velocity(x, noise, t),
                                  theirs.get_velocity(x, noise, t)) <= TOL


@pytest.mark.parametrize("kind,spacing,schedule", [("epsilon", "leading", "sd"),
                                                   ("v_prediction", "trailing", "zero-snr")])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_whole_trajectory(kind, spacing, schedule, eta):
    """20 steps with a made-up network that depends on its input and on the time."""
    (x, weight, _) = tensors(2, 3, 4, 4)

    def model(x, t):
        return torch.tanh(x * weight + float(t) / 1000)

    ours, theirs = both("DDIMScheduler", **SCHEDULES[schedule], timestep_spacing=spacing,
                        prediction_type=kind, clip_sample=False)
    ours.set_timesteps(20)
    theirs.set_timesteps(20)
    mine = his = x
    g1, g2 = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for t in theirs.timesteps:
        mine = ours.step(model(ours.scale_model_input(mine, t), t), t, mine, eta=eta, generator=g1)
        his = theirs.step(model(theirs.scale_model_input(his, t), t), t, his, eta=eta,
                          generator=g2).prev_sample
    assert relative_error(mine, his) <= TOL
    # The pure function over pairs of scales is the same walk.
    denoise = NetworkDenoiser(model, kind)
    levels = [ours.level(t) for t in ours.timesteps] + [make_level(ours.schedule, -1)]
    *_, pure = sample_ddim(denoise, x, levels, eta, torch.Generator().manual_seed(1))
    assert relative_error(pure, his) <= TOL


def test_half_precision_and_tensor_timesteps_as_diffusers():
    x, prediction, noise = tensors(2, 3, 4, 5, dtype=torch.float32)
    ours, theirs = both("DDIMScheduler", **SD, clip_sample=False)
    ours.set_timesteps(10)
    theirs.set_timesteps(10)
    for dtype in (torch.bfloat16, torch.float64):
        a, b = x.to(dtype), prediction.to(dtype)
        got, want = ours.step(b, ours.timesteps[3], a), theirs.step(b, theirs.timesteps[3], a)
        assert got.dtype == dtype == want.prev_sample.dtype
        assert relative_error(got, want.prev_sample) <= (1e-2 if dtype == torch.bfloat16 else 1e-6)


# ------------------------------------------------------------------ traps, planted
def planted(function, old, new):
    """A copy of a function of sdlib.samplers with a mistake in it."""
    import inspect

    source = inspect.getsource(function)
    assert source.count(old) == 1, (old, source.count(old))
    space = dict(vars(samplers))
    exec(source.replace(old, new), space)
    return space[function.__name__]


TRAPS = [
    ("ddim_step", "then.a * estimate.x0", "now.a * estimate.x0"),
    ("ddim_step", "then.s2 - std**2", "then.s2"),
    ("ddim_step", "std * noise", "std**2 * noise"),
    ("ddim_step", "posterior_variance(now, then) ** 0.5", "posterior_variance(now, then)"),
    ("make_estimate", "a * x - s * prediction, a * prediction + s * x",
     "a * x + s * prediction, a * prediction + s * x"),
    ("make_estimate", "(x - s * prediction) / a", "(x - s * prediction)"),
    ("make_estimate", "(x - a * prediction) / s", "(x - s * prediction) / a"),
]


@pytest.mark.parametrize("name,old,new", TRAPS)
def test_ddim_notices(monkeypatch, name, old, new):
    wrong = planted(getattr(samplers, name), old, new)
    home = scheduler_base if name == "make_estimate" else chain_schedulers
    monkeypatch.setattr(home, name, wrong)
    x, prediction, noise = tensors(2, 3, 4, 5)
    worst = 0.0
    for kind in TYPES:
        ours, theirs = both("DDIMScheduler", **SD, prediction_type=kind, clip_sample=False)
        ours.set_timesteps(10)
        theirs.set_timesteps(10)
        for t in theirs.timesteps:
            got = ours.step(prediction, t, x, eta=0.7, variance_noise=noise)
            want = theirs.step(prediction, t, x, eta=0.7, variance_noise=noise).prev_sample
            worst = max(worst, relative_error(got, want))
    assert worst > 10 * TOL


DDPM_TRAPS = [
    ("ddpm_step", "then.a * fresh_variance", "now.a * fresh_variance"),
    ("ddpm_step", "(now.a2 / then.a2) ** 0.5", "now.a2 / then.a2"),
    ("posterior_variance", "then.s2 / now.s2", "1"),
]


@pytest.mark.parametrize("name,old,new", DDPM_TRAPS)
def test_ddpm_notices(monkeypatch, name, old, new):
    wrong = planted(getattr(samplers, name), old, new)
    monkeypatch.setattr(chain_schedulers, name, wrong)
    x, prediction, _ = tensors(2, 3, 4, 5)
    ours, theirs = both("DDPMScheduler", **SD)
    ours.set_timesteps(10)
    theirs.set_timesteps(10)
    worst = 0.0
    for t in theirs.timesteps:
        got = ours.step(prediction, t, x, generator=torch.Generator().manual_seed(0))
        want = theirs.step(prediction, t, x, generator=torch.Generator().manual_seed(0))
        worst = max(worst, relative_error(got, want.prev_sample))
    assert worst > 10 * TOL


@pytest.mark.parametrize("change", [dict(steps_offset=0), dict(set_alpha_to_one=True),
                                    dict(timestep_spacing="trailing"),
                                    dict(beta_schedule="linear")])
def test_sd15_conventions_matter(change):
    """Each setting of SD 1.5's preset changes the picture by far more than the tolerance."""
    x, weight, _ = tensors(1, 4, 8, 8)

    def run(config):
        scheduler = DDIMScheduler.from_config(config)
        scheduler.set_timesteps(50)
        y = x
        for t in scheduler.timesteps:
            y = scheduler.step(torch.tanh(y * weight), t, y)
        return y

    assert relative_error(run(dataclasses.replace(DDIMConfig.sd15(), **change)),
                          run(DDIMConfig.sd15())) > 10 * TOL


# --------------------------------------------------------------------- files and configs
def test_saved_folders_load_in_diffusers_and_back(tmp_path):
    settings = dict(**SD, prediction_type="v_prediction", timestep_spacing="trailing",
                    rescale_betas_zero_snr=True, clip_sample=False, steps_offset=1)
    for name, extra in (("DDIMScheduler", dict(set_alpha_to_one=False)),
                        ("DDPMScheduler", dict(variance_type="fixed_large"))):
        ours, theirs = both(name, **settings, **extra)
        ours.save_pretrained(tmp_path / "ours" / name)
        theirs.save_pretrained(tmp_path / "theirs" / name)
        again = getattr(diffusers, name).from_pretrained(tmp_path / "ours" / name)
        mine = getattr(schedulers, name).from_pretrained(tmp_path / "theirs", subfolder=name)
        assert mine.config == ours.config
        assert type(load_scheduler(tmp_path / "theirs", name)) is type(ours)
        for key, value in ours.config.to_dict().items():
            assert again.config[key] == theirs.config[key] == value, key
        assert torch.equal(again.alphas_cumprod, ours.schedule.alphas_cumprod)
        text = json.loads((tmp_path / "ours" / name / "scheduler_config.json").read_text())
        assert text["_class_name"] == name


SD15_FILE = {  # scheduler/scheduler_config.json of Stable Diffusion 1.5
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None, "clip_sample": False}


def test_a_file_of_another_class_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(SD15_FILE))
    with pytest.raises(ValueError, match=r"PNDMScheduler \(use PNDMScheduler.*"
                                         r"DDIMScheduler\.from_config"):
        DDIMScheduler.from_pretrained(tmp_path)
    unknown = SD15_FILE | {"_class_name": "TomorrowScheduler"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(unknown))
    with pytest.raises(ValueError, match=r"TomorrowScheduler \(not in sdlib\)"):
        load_scheduler(tmp_path)
    ours = DDIMScheduler.from_config(SD15_FILE)
    theirs = diffusers.DDIMScheduler.from_config(SD15_FILE)
    assert ours.config == DDIMConfig.sd15()
    ours.set_timesteps(50)
    theirs.set_timesteps(50)
    x, prediction, _ = tensors(1, 4, 8, 8)
    for t in theirs.timesteps:
        assert relative_error(ours.step(prediction, t, x),
                              theirs.step(prediction, t, x).prev_sample) <= TOL


def test_from_config_of_another_class_and_with_changes():
    ddpm = DDPMScheduler.from_config(DDPMConfig.emoji(), variance_type="fixed_large")
    assert ddpm.config.variance_type == "fixed_large"
    ddim = DDIMScheduler.from_config(ddpm.config, timestep_spacing="linspace")
    assert ddim.config == dataclasses.replace(DDIMConfig.emoji(), timestep_spacing="linspace")
    theirs = diffusers.DDIMScheduler.from_config(
        diffusers.DDPMScheduler(**SD).config, timestep_spacing="linspace")
    assert DDIMScheduler.from_config(theirs.config).config.beta_start == 0.00085


def test_wrong_class_in_folder(tmp_path):
    DDPMScheduler().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use DDPMScheduler.from_pretrained"):
        DDIMScheduler.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="scheduler_config.json"):
        DDIMScheduler.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_bad_settings(name):
    cls = getattr(schedulers, name)
    for settings, message in [
        (dict(prediction_type="noise"), "unknown prediction_type 'noise'"),
        (dict(timestep_spacing="even"), "unknown timestep_spacing 'even'"),
        (dict(beta_schedule="sigmoid"), "beta_schedule"),
        (dict(num_train_timesteps=0), "num_train_timesteps"),
    ]:
        with pytest.raises(ValueError, match=message):
            cls(**settings)
    with pytest.raises(ValueError, match="thresholding"):
        cls.from_config({"_class_name": name, "thresholding": True})
    with pytest.raises(ValueError, match="trained_betas"):
        cls.from_config({"_class_name": name, "trained_betas": [0.1]})
    with pytest.raises(ValueError, match="unknown setting 'beta_strat'"):
        cls.from_config({"_class_name": name, "beta_strat": 0.1})
    with pytest.raises(TypeError, match="beta_strat"):
        cls(beta_strat=0.1)


def test_bad_variance_types():
    for variance in ("learned", "learned_range", "fixed_large_log", "small"):
        with pytest.raises(ValueError, match="variance_type"):
            DDPMScheduler(variance_type=variance)


@pytest.mark.parametrize("steps", [0, -3, 1001, 2.5, True])
def test_bad_numbers_of_steps(steps):
    with pytest.raises(ValueError, match="whole number from 1 to 1000"):
        DDIMScheduler().set_timesteps(steps)


def test_offset_beyond_the_end():
    scheduler = DDIMScheduler(steps_offset=1)
    scheduler.set_timesteps(999)
    with pytest.raises(ValueError, match="beyond the last, 999"):
        scheduler.set_timesteps(1000)            # diffusers fails later, in step


def test_bad_steps():
    x, prediction, noise = tensors(1, 2)
    scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(prediction, 10, x)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="0..999"):
        scheduler.step(prediction, 1000, x)
    for eta in (-0.1, 1.5):
        with pytest.raises(ValueError, match="eta must lie between 0"):
            scheduler.step(prediction, 900, x, eta=eta)
    with pytest.raises(ValueError, match="not both"):
        scheduler.step(prediction, 900, x, eta=1.0, variance_noise=noise,
                       generator=torch.Generator())
    with pytest.raises(ValueError, match="belongs to DDIM"):
        DDPMScheduler().step(prediction, 900, x, eta=0.5)
    with pytest.raises(ValueError, match="unknown prediction_type"):
        make_estimate(prediction, x, make_level(scheduler.schedule, 3), "noise")


def test_presets():
    emoji = DDIMScheduler.from_config(DDIMConfig.emoji())
    emoji.set_timesteps(20)
    assert emoji.timesteps[0] == 999 and emoji.level(999).a2 == 0
    assert emoji.init_noise_sigma == 1.0 and emoji.order == 1 and len(emoji) == 1000
    sd = DDIMScheduler.from_config(DDIMConfig.sd15())
    sd.set_timesteps(50)
    assert sd.timesteps[:2].tolist() == [981, 961] and sd.timesteps[-1] == 1
    sigma = sd.schedule.sigma(torch.tensor([0, 999]))
    assert relative_error(sigma, torch.tensor([0.029167, 14.614641])) < 1e-5


# ------------------------------------------------------------------------ the pure core
def double_levels(n, low=0.02, high=0.98, first_zero=False):
    """Variance-preserving levels in float64, from much noise to clean data."""
    a2 = torch.linspace(0.0 if first_zero else low**2, high, n, dtype=torch.float64)
    a2 = torch.cat([a2, a2.new_ones(1)])
    return [Level(a, 1 - a, k) for k, a in enumerate(a2)]


def test_step_equals_chapter_3s_posterior():
    schedule = NoiseSchedule.sd15().to(torch.float64)
    x0, xt, noise = tensors(3, 2, 4, dtype=torch.float64)
    for t, earlier in ((999, 998), (500, 250), (1, 0), (7, -1)):
        mean, variance = posterior(schedule, x0, xt, torch.full((3,), t),
                                   torch.full((3,), earlier))
        now, then = make_level(schedule, t), make_level(schedule, earlier)
        assert relative_error(ddpm_step(xt, x0, now, then), mean) < 1e-9
        if earlier >= 0:
            assert relative_error(posterior_variance(now, then), variance.flatten()[0]) < 1e-9


def test_ddim_with_eta_1_is_ddpm():
    schedule = NoiseSchedule.sd15().to(torch.float64)
    x, x0, z = tensors(3, 2, 4, dtype=torch.float64)
    for t, earlier in ((999, 998), (999, 499), (500, 3), (1, 0)):
        now, then = make_level(schedule, t), make_level(schedule, earlier)
        estimate = make_estimate(x0, x, now, "sample")
        std = posterior_variance(now, then) ** 0.5
        assert relative_error(ddim_step(estimate, now, then, 1.0, z),
                              ddpm_step(x, x0, now, then, std, z)) < 1e-7


def test_ddim_keeps_the_marginals_for_every_eta():
    """If x has the law of its level, so has the result: mean a m, variance a^2 v + s^2."""
    m, v = 0.7, 0.3
    for eta in (0.0, 0.3, 1.0):
        now, then = double_levels(6)[1], double_levels(6)[4]
        # With the true x0 and noise of a pair, moments follow from the coefficients.
        std = eta * posterior_variance(now, then) ** 0.5
        k0 = ddim_step(Estimate(torch.ones(1), torch.zeros(1)), now, then, eta, 0.0)
        k1 = ddim_step(Estimate(torch.zeros(1), torch.ones(1)), now, then, eta, 0.0)
        k2 = ddim_step(Estimate(torch.zeros(1), torch.zeros(1)), now, then, eta, torch.ones(1))
        assert relative_error(k0 * m, then.a.reshape(1) * m) < 1e-6
        assert relative_error(k0**2 * v + k1**2 + k2**2, (then.a2 * v + then.s2).reshape(1)) < 1e-6
        assert relative_error(k2 + 1, (std + 1).reshape(1)) < 1e-6


def gaussian_denoiser(mean, variance):
    """The exact denoiser of data N(mean, variance), for any pair of scales."""
    def denoise(x, level):
        gain = level.a * variance / (level.a2 * variance + level.s2)
        x0 = mean + gain * (x - level.a * mean)
        return Estimate(x0, (x - level.a * x0) / level.s)
    return denoise


def ode_error(n, coordinates):
    """Error of n DDIM steps from sigma 10 to 0.1 against the ODE's exact solution."""
    mean, variance = 0.5, 0.25
    sigma = torch.logspace(1, -1, n + 1, dtype=torch.float64)
    if coordinates == "preserving":
        levels = [Level(1 / (1 + s**2), s**2 / (1 + s**2)) for s in sigma]
    else:
        levels = [Level(torch.ones_like(s), s**2) for s in sigma]
    first, last = levels[0], levels[-1]
    x = first.a * torch.linspace(-1, 2, 5, dtype=torch.float64) * 7
    *_, got = sample_ddim(gaussian_denoiser(mean, variance), x, levels)
    stretch = ((last.a2 * variance + last.s2) / (first.a2 * variance + first.s2)) ** 0.5
    want = last.a * mean + stretch * (x - first.a * mean)
    return relative_error(got, want)


@pytest.mark.parametrize("coordinates", ["preserving", "exploding"])
def test_order_of_convergence_is_one(coordinates):
    errors = [ode_error(n, coordinates) for n in (40, 80, 160, 320)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(order - 1) < 0.15 for order in orders), orders


def test_coordinates_do_not_matter():
    assert abs(ode_error(17, "preserving") - ode_error(17, "exploding")) < 1e-12


MEAN, VARIANCE = 0.5, 0.25


def exact_law(n, eta, wrong=1.0):
    """Mean and variance after n steps on Gaussian data, by the recursion on paper.

    The denoiser is affine, so each step maps a normal law to a normal law:
    x' = (a' - c a / s) x0(x) + (c / s) x + std z with c = sqrt(s'^2 - std^2) and
    x0(x) = g x + (1 - g a) m. Plain Python numbers, nothing of sdlib's samplers.
    """
    bar = NoiseSchedule.emoji().alphas_cumprod.double().tolist() + [1.0]  # bar[-1]: clean
    steps = spaced_timesteps(1000, n, "trailing").tolist() + [-1]
    mean, var = 0.0, 1.0
    for t, u in itertools.pairwise(steps):
        a, s, a1, s1 = bar[t]**0.5, (1 - bar[t])**0.5, bar[u]**0.5, (1 - bar[u])**0.5
        std = wrong * eta * s1 / s * (1 - bar[t] / bar[u]) ** 0.5
        c = max(s1**2 - (std / wrong)**2, 0.0) ** 0.5
        gain = a * VARIANCE / (a * a * VARIANCE + s * s)
        slope = (a1 - c * a / s) * gain + c / s
        mean = slope * mean + (a1 - c * a / s) * (1 - gain * a) * MEAN
        var = slope**2 * var + std**2
    return mean, var


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_law_of_the_samples(eta):
    """Samples follow the exact law of the discrete sampler, within 4 standard errors."""
    n = 20_000
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=g, dtype=torch.float64)
    x = (x - x.mean()) / x.std()
    levels = make_levels(NoiseSchedule.emoji().to(torch.float64),
                         spaced_timesteps(1000, 25, "trailing"))
    denoise = gaussian_denoiser(MEAN, VARIANCE)
    *_, ddim = sample_ddim(denoise, x, levels, eta, g)
    runs = [ddim] + [list(sample_ddpm(denoise, x, levels, g))[-1]] * (eta == 1)
    mean, var = exact_law(25, eta)
    for run in runs:
        assert abs(run.mean() - mean) < 4 * (var / n) ** 0.5
        assert abs(run.var() - var) < 4 * var * (2 / n) ** 0.5
    if eta:        # noise that is 10 % too strong would not pass
        assert abs(exact_law(25, eta, wrong=1.1)[1] - var) > 8 * var * (2 / n) ** 0.5


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_law_tends_to_the_data(eta):
    """Mean and variance approach those of the data like 1 / n, for every eta."""
    laws = [exact_law(n, eta) for n in (50, 100, 200)]
    assert all(abs(mean - MEAN) < 1e-3 for mean, _ in laws)
    errors = [abs(var - VARIANCE) for _, var in laws]
    assert errors[0] > 1.6 * errors[1] > 1.6**2 * errors[2], errors


def test_noise_does_not_depend_on_the_batch():
    x = torch.zeros(3, 4, 2)
    generators = [torch.Generator().manual_seed(k) for k in (5, 6, 7)]
    noise = draw_noise(x, generators)
    alone = draw_noise(x[:1], torch.Generator().manual_seed(6))
    assert torch.equal(noise[1:2], alone)
    with pytest.raises(ValueError, match="2 generators for 3 examples"):
        draw_noise(x, generators[:2])
    want = diffusers.utils.torch_utils.randn_tensor(
        x.shape, generator=[torch.Generator().manual_seed(k) for k in (5, 6, 7)])
    assert torch.equal(noise, want)


def test_levels_and_fresh_variance():
    schedule = NoiseSchedule.sd15()
    levels = make_levels(schedule, [999, 500, 0])
    assert [level.t for level in levels] == [999, 500, 0, -1]
    assert float(levels[-1].a) == 1 and float(levels[-1].s) == 0
    for now, then in itertools.pairwise(levels):
        assert float(fresh_variance(now, then)) == float(1 - now.a2 / then.a2)
        assert float(now.scale) == 1
    with pytest.raises(ValueError, match="0..999"):
        make_level(schedule, 1000)


@pytest.mark.parametrize("kind", TYPES)
def test_denoiser_hides_the_parametrization(kind):
    """One truth, three kinds of network, two kinds of coordinates: one estimate."""
    x0, noise, _ = tensors(2, 3, dtype=torch.float64)
    a2 = torch.tensor(0.3, dtype=torch.float64)
    a, s = a2**0.5, (1 - a2) ** 0.5
    answers = {"epsilon": noise, "sample": x0, "v_prediction": a * noise - s * x0}
    seen = []

    def model(x, t):
        seen.append((x, t))
        return answers[kind]

    for level in (Level(a2, 1 - a2, 7), Level(torch.ones_like(a2), (1 - a2) / a2, 7)):
        estimate = NetworkDenoiser(model, kind)(level.a * x0 + level.s * noise, level)
        assert relative_error(estimate.x0, x0) < 1e-12
        assert relative_error(estimate.noise, noise) < 1e-12
    assert relative_error(seen[0][0], seen[1][0]) < 1e-12 and seen[0][1] == 7
    clipped = NetworkDenoiser(model, kind, clip=0.1)(a * x0 + s * noise, Level(a2, 1 - a2, 7))
    assert clipped.x0.abs().max() <= 0.1


def test_ancestral_loop_is_reproducible():
    levels = double_levels(10)
    x = torch.ones(4, dtype=torch.float64)
    runs = [list(sample_ddpm(gaussian_denoiser(0.5, 0.25), x, levels,
                             torch.Generator().manual_seed(3))) for _ in range(2)]
    assert len(runs[0]) == 10 and all(map(torch.equal, *runs))


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DDIMScheduler().config.beta_start = 1
    assert copy.deepcopy(DDIMConfig.sd15()) == DDIMConfig.sd15()
