"""Runs: resumed bit for bit after a kill, never half written, clear about what is wrong."""

import dataclasses
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from sdlib import scenes, training
from sdlib.batches import LatentScenes, close_ups, keyed_generator, keyed_noise
from sdlib.noise import NoiseSchedule
from sdlib.runs import TrainingConfig, learning_rate, read_config, settle_config
from sdlib.scenes import PLACES, SPRITES
from sdlib.storage import read_weights
from sdlib.tasks import (
    CLIPOptions,
    CLIPTask,
    DiffusionOptions,
    DiffusionTask,
    draw_latents,
    snr_weight,
)
from sdlib.training import EMA, checkpoints, train

ROOT = Path(__file__).parents[1]
RUN = {"task": "vae", "steps": 8, "batch_size": 2, "warmup_steps": 2, "log_every": 1,
       "checkpoint_every": 2, "valid_every": 100, "precision": "float32"}


@pytest.fixture
def run(tmp_path) -> TrainingConfig:
    return TrainingConfig(output=str(tmp_path / "model"), **RUN)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The state folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    train(TrainingConfig(output=str(folder / "model"), **RUN), folder / "state", "cpu")
    return folder / "state"


def command(folder: Path, **changes) -> list[str]:
    """The shell command of the run, its YAML file written into `folder`."""
    values = RUN | {"output": str(folder / "model")} | changes
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return [sys.executable, "-m", "sdlib.training", str(folder / "run.yaml"),
            "--state", str(folder / "state"), "--device", "cpu"]


def assert_same_state(one: Path, other: Path) -> None:
    last, again = checkpoints(one)[-1], checkpoints(other)[-1]
    assert last.name == again.name
    for name in ("module", "average", "optimizer"):
        a = read_weights(last / f"{name}.safetensors")
        b = read_weights(again / f"{name}.safetensors")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), name


def test_killed_at_any_moment_it_resumes_to_equal_bits(tmp_path, whole):
    """Three kills, each a little after another checkpoint appeared, then to the end."""
    state = tmp_path / "state"
    for kill in range(3):
        process = subprocess.Popen(command(tmp_path), cwd=ROOT, stderr=subprocess.DEVNULL)
        before = checkpoints(state)
        while checkpoints(state) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.07 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for folder in checkpoints(state):  # whatever has its name is complete
            names = {p.name for p in folder.iterdir()}
            assert names == {"module.safetensors", "average.safetensors",
                             "optimizer.safetensors", "progress.json"}
    subprocess.run(command(tmp_path), cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    assert_same_state(state, whole)
    assert (tmp_path / "model/vae/config.json").is_file()


def test_a_forgotten_moment_would_be_noticed(tmp_path, run, whole, monkeypatch):
    """The comparison above is sharp: resume with fresh AdamW moments and it fails."""
    class Stop(Exception):
        pass

    def stop(trainer, figures):
        if trainer.step == 5:
            raise Stop

    state = tmp_path / "state"
    with pytest.raises(Stop):
        train(run, state, "cpu", [stop])
    for checkpoint in checkpoints(state):
        moments = read_weights(checkpoint / "optimizer.safetensors")
        training.write_weights(checkpoint / "optimizer.safetensors",
                               {k: torch.zeros_like(v) for k, v in moments.items()})
    train(run, state, "cpu")
    with pytest.raises(AssertionError):
        assert_same_state(state, whole)


def test_nothing_in_the_state_is_a_pickle(whole):
    for path in whole.rglob("*"):
        if path.is_file() and "tensorboard" not in path.parts:
            assert path.suffix in {".safetensors", ".json", ".jsonl", ""}, path
            if path.suffix in {".json", ".jsonl"}:
                path.read_text()
            assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04")
    assert list((whole / "tensorboard").iterdir())


def test_a_second_trainer_is_kept_out(tmp_path, run):
    from filelock import FileLock

    state = tmp_path / "state"
    state.mkdir()
    with FileLock(state / "lock"):
        result = subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "another process is training" in result.stderr
    assert "Traceback" not in result.stderr
    assert not checkpoints(state)


def test_changed_settings_on_resume_are_listed(tmp_path, whole):
    values = yaml.safe_load((whole / "config.json").read_text())
    run = TrainingConfig.from_dict(values)
    with pytest.raises(ValueError, match="learning_rate: 0.001 -> 0.1") as error:
        train(dataclasses.replace(run, learning_rate=0.1), whole, "cpu")
    assert "--state" in str(error.value)


@pytest.mark.parametrize("line, words", [
    ("lerning_rate: 1.0", "unknown setting 'lerning_rate'"),
    ("options: {kl_wight: 1.0}", "unknown setting 'kl_wight'"),
    ("precision: float16", "float16"),
    ("batch_size: 0", "batch_size must be at least 1"),
    ("task: dance", "'dance' is not one of"),
    ("[", "run.yaml"),
])
def test_bad_configurations_name_what_is_wrong(tmp_path, line, words):
    path = tmp_path / "run.yaml"
    path.write_text(f"task: vae\noutput: model\nsteps: 3\n{line}\n"
                    if not line.startswith("task") else f"output: m\nsteps: 3\n{line}\n")
    with pytest.raises(ValueError, match=words) as error:
        read_config(path)
    assert str(path) in str(error.value)


def test_a_missing_configuration_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        read_config(tmp_path / "nowhere.yaml")


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, whole):
    """The file size limit of the process makes the writes fail as a full disk does."""
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    result = subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True, text=True,
                            preexec_fn=limit)
    assert result.returncode == 1
    assert "could not be written" in result.stderr and "make room" in result.stderr
    assert "Traceback" not in result.stderr
    left = [p.name for p in (tmp_path / "state").iterdir() if "checkpoint" in p.name]
    assert left == [], "nothing half written may be left"
    subprocess.run(command(tmp_path), cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    assert_same_state(tmp_path / "state", whole)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, run):
    def poison(trainer, figures):
        if trainer.step == 3:
            with torch.no_grad():
                next(trainer.module.parameters()).fill_(float("nan"))

    with pytest.raises(FloatingPointError, match="step 3.*lower learning_rate"):
        train(run, tmp_path / "state", "cpu", [poison])
    kept = read_weights(checkpoints(tmp_path / "state")[-1] / "module.safetensors")
    assert all(torch.isfinite(v).all() for v in kept.values())


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path, run):
    """sqrt(w * w) is finite at 0 and its derivative is not."""
    trainer = training.Trainer(run, torch.device("cpu"))
    weight = next(trainer.module.parameters())
    with torch.no_grad():
        weight.zero_()
    before = {k: v.clone() for k, v in trainer.module.state_dict().items()}
    trainer.loss = lambda samples, split: ((weight * weight).sqrt().sum(), {})
    with pytest.raises(FloatingPointError, match="gradient became nan at step 0"):
        training.train_step(trainer)
    assert all(torch.equal(v, before[k]) for k, v in trainer.module.state_dict().items())


def test_the_noise_of_training_is_not_the_noise_in_the_latents(tmp_path, monkeypatch):
    """The latents hold a draw of the posterior; what is added must not repeat it."""
    class Encoder(torch.nn.Linear):
        weights_name, config = "w", type("C", (), {"scaling_factor": 1.0})

        def encode(self, x):
            shape = len(x), 4, 16, 16
            return type("P", (), {"mean": torch.zeros(shape), "std": torch.ones(shape)})

    (tmp_path / "w").write_bytes(b"weights")
    task = object.__new__(DiffusionTask)
    task.seed, task.options, task.device = 3, DiffusionOptions(), torch.device("cpu")
    task.vae, task.module, task.schedule = Encoder(1, 1), None, NoiseSchedule.emoji()
    task.data = LatentScenes(task.vae, tmp_path, 8, 3, tmp_path)
    task.tokenizer = lambda captions: torch.zeros(len(captions), 1)
    task.text_encoder = lambda ids: ids
    seen = {}
    monkeypatch.setattr("sdlib.tasks.diffusion_loss", lambda unet, schedule, z, noise, *rest:
                        seen.update(z=z, noise=noise) or (noise.sum(), noise.sum()))
    task.loss(torch.arange(8), "train")
    pair = torch.stack([seen["z"].flatten(), seen["noise"].flatten()])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.05  # 8192 numbers: +- 0.011


def test_warm_start_takes_the_committed_weights(tmp_path, run):
    trainer = train(run, tmp_path / "first", "cpu")
    weights = tmp_path / "model/vae/diffusion_pytorch_model.safetensors"
    again = dataclasses.replace(run, init_from=str(weights))
    warm = training.Trainer(again, torch.device("cpu"))
    for name, value in trainer.ema.weights.items():
        assert torch.equal(value.half().float(), warm.module.state_dict()[name]), name
    wrong = dataclasses.replace(run, task="vae", init_from=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="none"):
        training.Trainer(wrong, torch.device("cpu"))


def test_keyed_draws_depend_on_the_key_alone():
    batch = keyed_noise(3, torch.tensor([5, 6, 7]), (2, 4))
    torch.randn(100)
    assert torch.equal(batch[1], keyed_noise(3, torch.tensor([6]), (2, 4))[0])
    assert not torch.equal(batch[0], keyed_noise(4, torch.tensor([5]), (2, 4))[0])
    many = keyed_noise(0, torch.arange(4000), (8,))
    assert abs(float(many.mean())) < 4 / 32000**0.5
    assert abs(float(many.var()) - 1) < 4 * (2 / 32000) ** 0.5
    seeds = {keyed_generator(s, i, p).initial_seed()
             for s in range(3) for i in range(50) for p in range(3)}
    assert len(seeds) == 450


def test_learning_rate_warms_up_and_ends_near_zero(run):
    long = dataclasses.replace(run, steps=100, warmup_steps=10, learning_rate=2.0)
    rates = [learning_rate(long, k) for k in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0)
    assert max(rates) == rates[9] and rates[-1] < 0.01
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_ema_warm_up_and_limit():
    module = torch.nn.Linear(2, 2)
    ema = EMA(module, 0.9)
    first = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    ema.update(module)  # decay (1 + 1) / (10 + 1)
    expected = first * (2 / 11) + module.weight * (9 / 11)
    torch.testing.assert_close(ema.weights["weight"], expected)
    ema.updates = 10_000
    before = ema.weights["weight"].clone()
    ema.update(module)
    torch.testing.assert_close(ema.weights["weight"], 0.9 * before + 0.1 * module.weight)


def test_snr_weight_bounds_the_weight_of_x0():
    snr = torch.tensor([0.0, 1.0, 5.0, 50.0, 1000.0])
    weight = snr_weight(snr, 5.0)
    torch.testing.assert_close(weight[:3], torch.ones(3))
    torch.testing.assert_close((weight * (snr + 1))[3:], torch.full((2,), 6.0))


def test_lessons_come_first_and_teach_the_pictures_only(tmp_path):
    torch.manual_seed(0)
    task = CLIPTask(CLIPOptions(tokenizer_captions=200, negatives=2, lessons=8), 0, tmp_path,
                    torch.device("cpu"))
    lesson, figures = task.loss(torch.arange(8), "train")
    guess = math.log(len(PLACES)) + math.log(len(SPRITES))
    assert abs(lesson.item() - guess) < 4 and figures == {}
    lesson.backward()
    assert all(p.grad is None for p in task.module.text_model.parameters())
    table = task.module.vision_model.embeddings.position_embedding.weight
    assert table.grad.abs().sum() > 0
    for samples, split in ((torch.arange(8, 12), "train"), (torch.arange(4), "valid")):
        assert "beats_near_misses" in task.loss(samples, split)[1]


def test_precision_is_measured_once_and_then_recorded(tmp_path, run, monkeypatch):
    from sdlib import runs

    auto = dataclasses.replace(run, precision="auto")
    monkeypatch.setattr(runs, "fastest_precision", lambda device: "bfloat16")
    first = settle_config(auto, tmp_path, torch.device("cpu"))
    assert first.precision == "bfloat16"
    training.write_json(tmp_path / "config.json", first.to_dict())  # as `train` does
    monkeypatch.setattr(runs, "fastest_precision", lambda device: "float32")
    assert settle_config(auto, tmp_path, torch.device("cpu")).precision == "bfloat16"


def test_help_names_the_arguments():
    result = subprocess.run([sys.executable, "-m", "sdlib.training", "--help"], cwd=ROOT,
                            capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0
    assert "--state" in result.stdout and "configs/vae.yaml" in result.stdout


def test_close_ups_hold_the_whole_object_and_say_so():
    """Latents that hold their own scene, row and column number show what was cut out."""
    count = 60
    grid = torch.stack(torch.meshgrid(*(torch.arange(16.0),) * 2, indexing="ij"))
    latents = torch.stack([torch.cat([torch.full((1, 16, 16), float(n)), grid,
                                      grid[:1]]) for n in range(count)])
    samples = torch.arange(150, 250)
    windows, captions = close_ups(latents, samples, seed=3)
    again, same = close_ups(latents, samples, seed=3)
    assert torch.equal(windows, again) and captions == same
    corners = set()
    for window, caption, sample in zip(windows, captions, samples.tolist(), strict=True):
        number, top, left = (int(c) for c in window[:3, 0, 0])
        scene = scenes.scene(number, 3)
        facts, item = scenes.parse_caption(caption), scene.items[0]
        assert len(scene.items) == 1 and item.size != "large"
        assert (facts.sprites, facts.sizes) == ((item.sprite,), (item.size,))
        assert facts.background == scene.background and facts.place is None
        skipped = [scenes.scene(k % count, 3) for k in range(sample, sample + count)]
        first = next(k for k, s in enumerate(skipped)
                     if len(s.items) == 1 and s.items[0].size != "large")
        assert number == (sample + first) % count
        for start, center in ((top, item.y), (left, item.x)):
            assert 4 * start <= center - item.scale / 2 + 1e-9
            assert center + item.scale / 2 <= 4 * start + 32 + 1e-9
            corners.add(start)
    assert len(corners) > 4  # not always in the same corner
    assert torch.equal(windows[:, 1, 1, 0], windows[:, 1, 0, 0] + 1)


def test_a_share_of_the_steps_shows_close_ups():
    """The same steps every time; a whole batch is of one kind."""
    for share in (0.0, 0.25, 1.0):
        data = object.__new__(LatentScenes)
        data.latents, data.count, data.seed = torch.zeros(60, 4, 16, 16), 60, 3
        small, again = ([draw_latents(data, torch.arange(2 * k, 2 * k + 2), share)[0].shape[-1] == 8
                         for k in range(200)] for _ in range(2))
        assert small == again
        assert abs(sum(small) / 200 - share) < 0.1 * (share == 0.25) + 1e-9
    for share in (-0.1, 1.5):
        with pytest.raises(ValueError, match="close_ups must lie in 0 to 1"):
            DiffusionOptions(close_ups=share)


def test_close_ups_without_a_lone_object_say_so():
    seed = next(s for s in range(50) if len(scenes.scene(0, s).items) == 2)
    with pytest.raises(ValueError, match="set `scenes` higher"):
        close_ups(torch.zeros(1, 4, 16, 16), torch.tensor([0]), seed)
