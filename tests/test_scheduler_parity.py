"""Each scheduler against diffusers' own, step by step from diffusers' state."""

import copy
import inspect
import itertools
import json
from functools import cache

import pytest
import torch
from helpers import relative_error

from sdlib import (
    chain_schedulers,
    multistep_schedulers,
    pndm_scheduler,
    schedulers,
    sigma_base,
    sigma_schedulers,
)
from sdlib.schedulers import SchedulerFiles, load_scheduler

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")

TOL = 1e-5
STEPS = [1, 2, 3, 10, 50, 999]
SPACINGS = ["leading", "linspace", "trailing"]
TYPES = ["epsilon", "sample", "v_prediction"]
SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
ZERO = SD | dict(rescale_betas_zero_snr=True)
SIGMAS = {"chain": {}, "karras": dict(use_karras_sigmas=True),
          "exponential": dict(use_exponential_sigmas=True)}
SDE = dict(algorithm_type="sde-dpmsolver++")
# scheduler -> whether it has Karras and exponential sigmas, and zero terminal SNR
ABLE = {"EulerDiscreteScheduler": (True, True), "HeunDiscreteScheduler": (True, False),
        "LMSDiscreteScheduler": (True, False),
        "EulerAncestralDiscreteScheduler": (False, True),
        "PNDMScheduler": (False, False), "DPMSolverMultistepScheduler": (True, True),
        "UniPCMultistepScheduler": (True, True), "LCMScheduler": (False, True)}
NO_X0 = {"PNDMScheduler", "EulerAncestralDiscreteScheduler"}
NOISY = {"EulerAncestralDiscreteScheduler", "LCMScheduler"}


@cache
def draws(n: int, seed: int = 0) -> torch.Tensor:
    """Pretended answers of a network, (n, 2, 3, 4)."""
    return torch.randn(n, 2, 3, 4, generator=torch.Generator().manual_seed(seed))


def both(name, **settings):
    return getattr(schedulers, name)(**settings), getattr(diffusers, name)(**settings)


def set_both(ours, theirs, n):
    ours.set_timesteps(n)
    theirs.set_timesteps(n)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    if hasattr(ours, "sigmas"):
        assert torch.equal(ours.sigmas, theirs.sigmas)
        assert float(ours.init_noise_sigma) == pytest.approx(float(theirs.init_noise_sigma))


def walk(ours, theirs, start=0, stop=None, noisy=False):
    """Largest relative error of our steps, each from diffusers' sample and answer."""
    times, worst = theirs.timesteps[start:stop], 0.0
    answers, (x, clean) = draws(len(theirs.timesteps)), draws(2, seed=1)
    x = x * float(theirs.init_noise_sigma)
    alone = theirs.order == 2 or theirs.timesteps.tolist().count(times[0]) == 1
    if start and alone:                  # as image to image starts: found by its time
        mine = ours.add_noise(clean, x, ours.timesteps[start:start + 1])
        x = theirs.add_noise(clean, x, times[:1])
        worst = relative_error(mine, x)
    elif hasattr(theirs, "set_begin_index"):     # equal times cannot be told apart
        theirs.set_begin_index(start)
        ours.index = start or None
    for k, t in enumerate(times, start):
        own_t, extra = ours.timesteps[k], [{}, {}]
        mine = ours.scale_model_input(x, own_t)
        worst = max(worst, relative_error(mine, theirs.scale_model_input(x, t)))
        if noisy:
            extra = [{"generator": torch.Generator().manual_seed(k)} for _ in range(2)]
        got = ours.step(answers[k], own_t, x, **extra[0])
        x = theirs.step(answers[k], t, x, **extra[1]).prev_sample
        worst = max(worst, relative_error(got, x))
    if noisy:
        mine, his = (each["generator"].get_state() for each in extra)
        assert torch.equal(mine, his), "drew another amount of noise"
    return worst


def windows(times: list, order: int = 1, whole: bool = True):
    """(start, stop) of the stretches to walk: all steps, and some begun in the middle.

    Not `whole`: of the steps only both ends and the middle.
    """
    n, middle = len(times), len(times) // 2 // order * order
    begun = [(middle, middle + 5)] * (n > 5)
    return [(0, None), *begun] if whole else [
        (0, 5), *begun, ((n - 2) // order * order, None)]


def compare(pair, n, noisy=False, whole=True):
    """Largest error over stretches of a run of n steps."""
    set_both(*pair, n)
    stretches = windows(pair[1].timesteps.tolist(), pair[1].order, whole)
    return max(walk(*copy.deepcopy(pair), *stretch, noisy) for stretch in stretches)


def all_settings(name, **more):
    free, zero = ABLE[name]
    kinds = [kind for kind in TYPES if kind != "sample" or name not in NO_X0]
    for kind, spacing, sigmas, chain in itertools.product(
            kinds, SPACINGS, SIGMAS if free else ["chain"], [SD, ZERO] if zero else [SD]):
        yield dict(prediction_type=kind, timestep_spacing=spacing) | SIGMAS[sigmas] | (
            chain | more)


# ------------------------------------------------------------ every accepted combination
def refused(name, settings, n) -> str | None:
    """What our ValueError says where diffusers refuses or returns infinity, else None."""
    if name == "PNDMScheduler" and n < 4 and not settings.get("skip_prk_steps"):
        return "warm-up needs at least 4 steps"
    if name == "LCMScheduler":
        if n > settings.get("original_inference_steps", 50):
            return "from 1 to 50"
        if settings.get("rescale_betas_zero_snr") and settings["prediction_type"] == "epsilon":
            return "pure noise"
    return None


VARIANTS = [(name, {}) for name in ABLE] + [
    ("PNDMScheduler", dict(skip_prk_steps=True)),
    ("PNDMScheduler", dict(skip_prk_steps=True, set_alpha_to_one=True, steps_offset=1)),
    ("DPMSolverMultistepScheduler", SDE)]


def plain(settings) -> bool:
    """One of the settings whose 999 steps are all walked, not only ends and middle."""
    return settings["prediction_type"] == "epsilon" and ZERO.items() - settings.items()


every_variant = pytest.mark.parametrize(
    "name,more", VARIANTS,
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())))


@every_variant
def test_steps_equal_diffusers(name, more):
    noisy = name in NOISY or more == SDE
    for settings in all_settings(name, **more):
        pair = both(name, **settings)
        for n in STEPS:
            message = refused(name, settings, n)
            if message:
                with pytest.raises(ValueError, match=message):
                    compare(pair, n, noisy)
                continue
            error = compare(pair, n, noisy, whole=n <= 50 or plain(settings))
            assert error <= TOL, (settings, n, error)


@pytest.mark.full
@every_variant
def test_all_999_steps_equal_diffusers(name, more):
    """Every step of the longest run, for the settings that are not `plain`."""
    for settings in all_settings(name, **more):
        if not plain(settings) and not refused(name, settings, 999):
            error = compare(both(name, **settings), 999, name in NOISY or more == SDE)
            assert error <= TOL, (settings, error)


OTHERS = [
    ("EulerDiscreteScheduler", dict(beta_schedule="squaredcos_cap_v2")),
    ("EulerDiscreteScheduler", dict(final_sigmas_type="sigma_min")),
    ("EulerDiscreteScheduler", SD | dict(timestep_spacing="leading", steps_offset=1)),
    ("HeunDiscreteScheduler", SD | dict(clip_sample=True, clip_sample_range=0.5)),
    ("LMSDiscreteScheduler", dict(beta_schedule="squaredcos_cap_v2")),
    ("LCMScheduler", dict(original_inference_steps=1000)),
    ("LCMScheduler", dict(original_inference_steps=100, clip_sample=True)),
    ("DPMSolverMultistepScheduler", dict(solver_order=1)),
    ("DPMSolverMultistepScheduler", dict(euler_at_final=True, final_sigmas_type="sigma_min")),
    ("DPMSolverMultistepScheduler", dict(lower_order_final=False, final_sigmas_type="sigma_min")),
    ("DPMSolverMultistepScheduler", dict(lower_order_final=False)),
    ("DPMSolverMultistepScheduler", dict(use_karras_sigmas=True,
                                         beta_schedule="squaredcos_cap_v2")),
    ("DPMSolverMultistepScheduler", dict(use_karras_sigmas=True, final_sigmas_type="sigma_min")),
    ("DPMSolverMultistepScheduler", SD | dict(timestep_spacing="leading", steps_offset=1)),
    ("UniPCMultistepScheduler", dict(solver_order=1)),
    ("UniPCMultistepScheduler", dict(solver_order=3)),
    ("UniPCMultistepScheduler", dict(final_sigmas_type="sigma_min")),
    ("UniPCMultistepScheduler", SD | dict(use_karras_sigmas=True, final_sigmas_type="sigma_min")),
    ("UniPCMultistepScheduler", SD | dict(timestep_spacing="leading", steps_offset=1)),
]


@pytest.mark.parametrize("name,settings", OTHERS)
def test_other_settings_equal_diffusers(name, settings):
    pair = both(name, **settings)
    for n in (1, 2, 3, 10, 20, 999 if settings.get("original_inference_steps") == 1000 else 25):
        assert compare(pair, n, name in NOISY) <= TOL, n


def test_whole_runs_drift_apart_by_rounding_only():
    """20 steps with a made-up network, each library on its own samples."""
    weight = draws(1, seed=3)[0]
    for name, settings in [*((name, {}) for name in ABLE), ("PNDMScheduler",
                                                            dict(skip_prk_steps=True))]:
        ours, theirs = both(name, **SD, **settings)
        set_both(ours, theirs, 20)
        mine = his = draws(1)[0] * float(theirs.init_noise_sigma)
        g = [torch.Generator().manual_seed(1) for _ in range(2)]
        extra = dict(generator=g[1]) if name in NOISY else {}
        for t in theirs.timesteps:
            seen = ours.scale_model_input(mine, t)
            mine = ours.step(torch.tanh(seen * weight + t / 1000), t, mine, generator=g[0])
            seen = theirs.scale_model_input(his, t)
            his = theirs.step(torch.tanh(seen * weight + t / 1000), t, his, **extra).prev_sample
        assert relative_error(mine, his) < 1e-4, name


def test_half_precision_answers():
    """Samples stay in float32 inside; the result has the answer's precision."""
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        ours, theirs = both(name, **SD)
        set_both(ours, theirs, 10)
        x, answer = draws(2)[0].bfloat16(), draws(2)[1].bfloat16()
        t = theirs.timesteps[0]
        ours.scale_model_input(x, t), theirs.scale_model_input(x, t)
        got, want = ours.step(answer, t, x), theirs.step(answer, t, x).prev_sample
        assert got.dtype == want.dtype == torch.bfloat16
        assert relative_error(got, want) < 1e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ABLE)
def test_same_noise_same_way_on_a_gpu(name):
    """A seed on the CPU means the same samples wherever the network runs."""
    ends = []
    for device in ("cpu", "cuda"):
        scheduler = getattr(schedulers, name)(**SD)
        scheduler.set_timesteps(10, device=device)
        g = torch.Generator().manual_seed(1)
        x = (draws(1)[0] * float(scheduler.init_noise_sigma)).to(device)
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t)
            x = scheduler.step(torch.tanh(seen + t / 1000), t, x, generator=g)
        ends.append(x.cpu())
    assert relative_error(ends[1], ends[0]) < 1e-4


# ------------------------------------------------------------------ strength, previews
@pytest.mark.parametrize("name", ABLE)
def test_strength_as_in_image_to_image(name):
    """`steps_for` is what diffusers' pipelines run, and its first step can be found."""
    settings = dict(skip_prk_steps=True) if name == "PNDMScheduler" else {}
    ours, theirs = both(name, **SD, **settings)
    set_both(ours, theirs, 10)
    for strength in (0.0, 0.05, 0.3, 0.75, 1.0):
        skipped = max(10 - min(int(10 * strength), 10), 0)
        want = theirs.timesteps[skipped * theirs.order:]
        assert ours.steps_for(strength).tolist() == want.tolist()
    with pytest.raises(ValueError, match="between 0 and 1"):
        ours.steps_for(1.2)
    with pytest.raises(ValueError, match="set_timesteps"):
        type(ours)(**SD).steps_for(0.5)


@pytest.mark.parametrize("name", ABLE)
def test_preview_after_a_step(name):
    """As the pipeline's callback asks: the clean estimate of the step just made."""
    ours, theirs = both(name, **SD)
    set_both(ours, theirs, 10)
    x, answer = draws(2)
    x = x * float(ours.init_noise_sigma)
    t = ours.timesteps[0]
    for scheduler in (ours, theirs):
        scheduler.scale_model_input(x, t)
    ours.step(answer, t, x)
    result = theirs.step(answer, t, x)
    preview = ours.estimate(answer, t, x).x0
    if "pred_original_sample" in result:
        assert relative_error(preview, result.pred_original_sample) <= TOL
    else:
        a, s = ours.level(t).a, ours.level(t).s
        assert relative_error(preview, (x - s * answer) / a) <= TOL


def test_lcm_with_strength():
    ours, theirs = both("LCMScheduler")
    for strength in (0.3, 0.5, 1.0):
        ours.set_timesteps(4, strength=strength)
        theirs.set_timesteps(4, strength=strength)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()


# ------------------------------------------------------------------------------- files
@pytest.mark.parametrize("name", ABLE)
def test_saved_and_loaded_both_ways(name, tmp_path):
    settings = dict(**SD, prediction_type="v_prediction", steps_offset=1)
    ours, theirs = both(name, **settings)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again, unused = getattr(diffusers, name).from_pretrained(
        tmp_path / "ours", return_unused_kwargs=True)
    assert set(unused) == {"_class_name"}
    mine = load_scheduler(tmp_path / "theirs")
    assert type(mine).__name__ == name and mine.config == ours.config
    written = json.loads((tmp_path / "ours" / "scheduler_config.json").read_text())
    assert written.pop("_class_name") == name
    for key, value in written.items():
        assert key in theirs.config, f"diffusers has no setting {key}"
        assert again.config[key] == theirs.config[key] == value, key
    pair = mine, again
    assert compare(pair, 10, name in NOISY) <= TOL


def test_every_scheduler_is_known_by_name():
    assert set(schedulers.SCHEDULERS) == {*ABLE, "DDIMScheduler", "DDPMScheduler"}
    assert set(schedulers.SCHEDULERS) <= set(SchedulerFiles.classes)
    for name, cls in schedulers.SCHEDULERS.items():
        assert getattr(schedulers, name) is cls


def test_sd15s_published_file_as_published(tmp_path):
    """PNDM without warm-up, an offset, and no step to clean data."""
    (tmp_path / "scheduler_config.json").write_text(json.dumps({
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
        "steps_offset": 1, "trained_betas": None, "clip_sample": False}))
    ours = load_scheduler(tmp_path)
    assert ours.config == schedulers.PNDMConfig.sd15()
    theirs = diffusers.PNDMScheduler.from_pretrained(tmp_path)
    assert compare((ours, theirs), 50) <= TOL
    assert ours.timesteps[:3].tolist() == [981, 961, 961] and len(ours.timesteps) == 51


def test_from_config_of_another_scheduler():
    """The way users change samplers: the noise schedule stays, the rest is dropped."""
    for target in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler",
                   "UniPCMultistepScheduler", "LCMScheduler"):
        ours = getattr(schedulers, target).from_config(
            schedulers.DDIMConfig.emoji(), timestep_spacing="trailing")
        theirs = getattr(diffusers, target).from_config(
            diffusers.DDIMScheduler(**ZERO, prediction_type="v_prediction").config,
            timestep_spacing="trailing")
        assert compare((ours, theirs), 10, target in NOISY) <= TOL
    solver = schedulers.DPMSolverMultistepScheduler().config
    assert schedulers.UniPCMultistepScheduler.from_config(solver).config.solver_order == 2


# ------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "LMSDiscreteScheduler",
                                  "PNDMScheduler"])
def test_no_zero_terminal_snr_where_diffusers_drops_it(name):
    cls = getattr(schedulers, name)
    with pytest.raises(ValueError, match="no zero terminal SNR.*Use DDIM"):
        cls.from_config(schedulers.DDIMConfig.emoji())
    with pytest.raises(ValueError, match="no zero terminal SNR"):
        cls.config_class.emoji()
    cls.from_config(schedulers.DDIMConfig.sd15())


@pytest.mark.parametrize("name", sorted(NO_X0))  # processes order a set anew
def test_no_x0_prediction(name):
    with pytest.raises(ValueError, match="'sample' is not supported, as in diffusers"):
        getattr(schedulers, name)(prediction_type="sample")


@pytest.mark.parametrize("name,settings,message", [
    ("EulerDiscreteScheduler", dict(use_karras_sigmas=True, use_exponential_sigmas=True),
     "exclude each other"),
    ("EulerDiscreteScheduler", dict(final_sigmas_type="one"), "final_sigmas_type 'one'"),
    ("DPMSolverMultistepScheduler", dict(algorithm_type="dpmsolver"), "algorithm_type"),
    ("DPMSolverMultistepScheduler", dict(solver_order=3), "solver_order must be from 1 to 2"),
    ("UniPCMultistepScheduler", dict(solver_order=4), "solver_order must be from 1 to 3"),
    ("UniPCMultistepScheduler", dict(prediction_type="flow"), "unknown prediction_type"),
])
def test_bad_settings(name, settings, message):
    with pytest.raises(ValueError, match=message):
        getattr(schedulers, name)(**settings)


@pytest.mark.parametrize("name,key,value", [
    ("EulerDiscreteScheduler", "use_beta_sigmas", True),
    ("EulerDiscreteScheduler", "timestep_type", "continuous"),
    ("DPMSolverMultistepScheduler", "solver_type", "heun"),
    ("DPMSolverMultistepScheduler", "use_flow_sigmas", True),
    ("UniPCMultistepScheduler", "solver_type", "bh1"),
    ("UniPCMultistepScheduler", "disable_corrector", [0]),
])
def test_settings_we_implement_in_one_way_only(name, key, value):
    with pytest.raises(ValueError, match=f"{key}=.*not supported"):
        getattr(schedulers, name).from_config({"_class_name": name, key: value})


@pytest.mark.parametrize("name", ABLE)
def test_bad_steps(name):
    scheduler, x = getattr(schedulers, name)(), draws(1)[0]
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 500, x)
    for n in (0, -1, 2.5, True, 1001):
        with pytest.raises(ValueError, match="whole number from 1 to"):
            scheduler.set_timesteps(n)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="belongs to DDIM"):
        scheduler.step(x, scheduler.timesteps[0], x, eta=0.5)
    if hasattr(scheduler, "sigmas"):
        with pytest.raises(ValueError, match="not one of `timesteps`"):
            scheduler.step(x, 12345, x)
        for t in scheduler.timesteps:
            scheduler.step(x, t, x)
        with pytest.raises(ValueError, match="all steps are made"):
            scheduler.step(x, t, x)


def test_leading_steps_of_a_solver_need_room_for_the_end():
    solver = schedulers.UniPCMultistepScheduler(timestep_spacing="leading")
    with pytest.raises(ValueError, match="from 1 to 999"):
        solver.set_timesteps(1000)      # diffusers visits step 0 a thousand times


# ----------------------------------------------------------------------- traps, planted
def planted(module, name, old, new):
    """A function or class of a module with a mistake in it."""
    source = inspect.getsource(getattr(module, name))
    assert source.count(old) == 1, (old, source.count(old))
    space = dict(vars(module))
    exec(source.replace(old, new), space)
    return space[name]


TRAPS = [
    ("EulerDiscreteScheduler", sigma_base, "follow", "then.s / then.a - now.s / now.a",
     "0.999 * then.s / then.a - now.s / now.a"),
    ("HeunDiscreteScheduler", sigma_schedulers, "follow", "x / now.a", "0.999 * x / now.a"),
    ("LMSDiscreteScheduler", sigma_schedulers, "lms_weights", "3**0.5, middle + half / 3",
     "3**0.5, middle + half / 3.05"),
    ("PNDMScheduler", pndm_scheduler, "adams_bashforth", "len(slopes) - 1", "0"),
    ("EulerAncestralDiscreteScheduler", sigma_schedulers, "ancestral_step",
     "there**2 - up**2", "there**2 - 0.999 * up**2"),
    ("DPMSolverMultistepScheduler", multistep_schedulers, "extrapolate", "/ 2", "/ 2.01"),
    ("DPMSolverMultistepScheduler", multistep_schedulers, "exponential_step",
     "fresh = 1 - torch.exp(-2 * h)", "fresh = 1 - torch.exp(-2.01 * h)"),
    ("UniPCMultistepScheduler", multistep_schedulers, "unipc_update", "ahead - x0",
     "0.999 * (ahead - x0)"),
]


@pytest.mark.parametrize("name,module,function,old,new", TRAPS)
def test_a_wrong_coefficient_is_noticed(monkeypatch, name, module, function, old, new):
    home = inspect.getmodule(getattr(module, function))
    monkeypatch.setattr(module, function, planted(home, function, old, new))
    settings = SDE if "fresh" in old else {}
    pair = both(name, **SD, **settings)
    assert compare(pair, 10, name in NOISY or settings == SDE) > 10 * TOL


LCM_TRAPS = [("0.25 / (time**2 + 0.25)", "0.5 / (time**2 + 0.25)"),
             ("then.a * x0 + then.s * noise", "then.a * x0 + then.s2 * noise")]


@pytest.mark.parametrize("old,new", LCM_TRAPS)
def test_a_wrong_lcm_is_noticed(old, new):
    wrong = planted(chain_schedulers, "LCMScheduler", old, new)
    pair = wrong(timestep_scaling=0.01), diffusers.LCMScheduler(timestep_scaling=0.01)
    assert compare(pair, 4, noisy=True) > 10 * TOL


@pytest.mark.parametrize("name", sorted(set(SchedulerFiles.classes) - {"PNDMScheduler"}))
def test_files_of_a_scheduler_that_was_made_from_another_one(name, tmp_path):
    """diffusers leaves the settings of Stable Diffusion's PNDM in them; so did we find them."""
    old = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, steps_offset=1,
                                  beta_schedule="scaled_linear", skip_prk_steps=True)
    theirs = getattr(diffusers, name).from_config(old.config)
    theirs.save_pretrained(tmp_path)
    ours = load_scheduler(tmp_path)
    assert type(ours).__name__ == name
    for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset"):
        assert getattr(ours.config, key, theirs.config[key]) == theirs.config[key]
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_strat": 0.1}))
    with pytest.raises(ValueError, match="unknown setting 'beta_strat'"):
        load_scheduler(tmp_path)
