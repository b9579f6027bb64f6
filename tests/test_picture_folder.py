"""Training on a folder of pictures: what is read, in which order, and what is learned."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import randomize, relative_error
from PIL import Image

from sdlib.batches import keyed_noise
from sdlib.clip import CLIPTextConfig, CLIPTextModel
from sdlib.images import prepare
from sdlib.noise import NoiseSchedule
from sdlib.picture_folder import PictureFolder, captioned_pictures
from sdlib.runs import TrainingConfig, read_config
from sdlib.schedulers import PNDMConfig, PNDMScheduler
from sdlib.storage import read_json, read_weights
from sdlib.training import EMA, Trainer, checkpoints, main, make_parser, train, train_step
from sdlib.unet import UNet2DConditionModel, UNetConfig
from sdlib.vae import AutoencoderKL, VAEConfig

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def picture(path: Path, seed: int, size=(48, 40)) -> None:
    """Smooth colors, so that neighbors and crops can be told apart."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 255, (4, 4, 3)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)


def fill(folder: Path, count: int, listed: bool = True) -> Path:
    """A folder with `count` pictures, captions in metadata.jsonl or beside them."""
    lines = []
    for k in range(count):
        picture(folder / f"{k:02}.png", k)
        if listed:
            lines.append(json.dumps({"file_name": f"{k:02}.png", "text": f"number {k}"}))
        else:
            (folder / f"{k:02}.txt").write_text(f"number {k}\n")
    if listed:
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder of Stable Diffusion 1.5's layout and settings, a thousandth of its size."""
    folder = tmp_path_factory.mktemp("sd")
    unet = UNetConfig(sample_size=8, cross_attention_dim=24, attention_head_dim=4,
                      block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
                      down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                      up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    vae = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                    sample_size=16)
    text = CLIPTextConfig(vocab_size=1000, hidden_size=24, intermediate_size=48,
                          num_hidden_layers=2, num_attention_heads=4, pad_token_id=999,
                          max_position_embeddings=32, bos_token_id=998, eos_token_id=999)
    for seed, (name, part) in enumerate([("unet", UNet2DConditionModel(unet)),
                                         ("vae", AutoencoderKL(vae)),
                                         ("text_encoder", CLIPTextModel(text))]):
        randomize(part, seed).save_pretrained(folder / name)
    PNDMScheduler.from_config(PNDMConfig.sd15()).save_pretrained(folder / "scheduler")
    shutil.copytree(ROOT / "models/emoji-sd/tokenizer", folder / "tokenizer")
    shutil.copy(ROOT / "models/emoji-sd/model_index.json", folder)
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"another format")
    (folder / "vae/diffusion_pytorch_model.bin").write_bytes(b"another format")
    return folder


@pytest.fixture
def run(tmp_path, model) -> TrainingConfig:
    fill(tmp_path / "pictures", 6)
    return TrainingConfig(
        "pictures", str(tmp_path / "trained"), steps=6, batch_size=2, warmup_steps=1,
        learning_rate=1e-3, precision="float32", checkpoint_every=2, log_every=1,
        valid_every=3, options={"pictures": str(tmp_path / "pictures"), "size": 16,
                                "model": str(model), "held_out": 2})


# What is read -------------------------------------------------------------------------

@pytest.mark.parametrize("listed", [True, False])
def test_both_layouts_give_the_same_pictures(tmp_path, listed):
    folder = fill(tmp_path / "p", 3, listed)
    expected = [(folder / f"{k:02}.png", f"number {k}") for k in range(3)]
    assert captioned_pictures(folder) == expected
    data = PictureFolder(folder, 16, seed=0)
    x, captions = data.batch(torch.arange(3), "train")
    assert x.shape == (3, 3, 16, 16) and x.dtype == torch.float32
    for row, caption in zip(x, captions, strict=True):
        pixels = np.asarray(prepare(folder / f"{int(caption.split()[1]):02}.png", 16))
        want = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1
        assert torch.equal(row, want)


@pytest.mark.parametrize("spoil, error, words", [
    (lambda f: shutil.rmtree(f), FileNotFoundError, "there is no folder of pictures"),
    (lambda f: [p.unlink() for p in f.iterdir()], FileNotFoundError,
     "neither metadata.jsonl nor pictures"),
    (lambda f: (f / "01.txt").unlink(), ValueError,
     r"1 of 3 pictures have no caption, first .*01\.png: write 01\.txt"),
    (lambda f: (f / "01.txt").write_text(" \n"), ValueError, "have no caption"),
    (lambda f: (f / "01.txt").write_bytes(b"\xff\xfe\x00"), ValueError,
     r"01\.txt is not text in UTF-8"),
    (lambda f: (f / "02.png").write_text("no picture"), ValueError,
     r"1 of 3 files cannot be opened as pictures, first .*02\.png"),
    (lambda f: (f / "metadata.jsonl").write_text('{"file_name": "00.png"}'), ValueError,
     "metadata.jsonl, line 1"),
])
def test_what_is_wrong_with_a_folder_is_said_before_training(tmp_path, spoil, error, words):
    folder = fill(tmp_path / "p", 3, listed=False)
    spoil(folder)
    with pytest.raises(error, match=words):
        PictureFolder(folder, 16, seed=0)


def test_a_picture_that_breaks_off_is_named_when_it_is_read(tmp_path):
    folder = fill(tmp_path / "p", 3)
    whole = (folder / "01.png").read_bytes()
    (folder / "01.png").write_bytes(whole[: len(whole) // 2])  # its header is right
    data = PictureFolder(folder, 16, seed=0)
    with pytest.raises(ValueError, match=r"01\.png cannot be read"):
        data.batch(torch.arange(3), "train")


def test_held_out_pictures_are_never_trained_on(tmp_path):
    folder = fill(tmp_path / "p", 10)
    data = PictureFolder(folder, 16, seed=3, held_out=3)
    train_set = {data.number(i, "train") for i in range(100)}
    valid_set = {data.number(i, "valid") for i in range(100)}
    assert len(train_set) == 7 and len(valid_set) == 3 and not train_set & valid_set
    with pytest.raises(ValueError, match="held_out = 10, but .* has 10 pictures"):
        PictureFolder(folder, 16, seed=3, held_out=10)


def test_each_round_shows_every_picture_once_in_another_order(tmp_path):
    data = PictureFolder(fill(tmp_path / "p", 10), 16, seed=3)
    rounds = [[data.number(i, "train") for i in range(10 * r, 10 * r + 10)]
              for r in range(4)]
    assert all(sorted(r) == list(range(10)) for r in rounds)
    assert len({tuple(r) for r in rounds}) == 4
    again = PictureFolder(tmp_path / "p", 16, seed=3)
    assert rounds[2] == [again.number(i, "train") for i in range(20, 30)]
    other = PictureFolder(tmp_path / "p", 16, seed=4)
    assert rounds[2] != [other.number(i, "train") for i in range(20, 30)]


def test_a_batch_depends_on_its_numbers_alone_and_little_is_held(tmp_path):
    data = PictureFolder(fill(tmp_path / "p", 10), 16, seed=3)
    one, words = data.batch(torch.tensor([7, 8]), "train")
    for first in (0, 2, 4, 31):
        data.batch(torch.arange(first, first + 4), "valid" if first == 4 else "train")
    assert len(data._coming) <= 8  # a batch and the next one, never the folder
    again, same = data.batch(torch.tensor([7, 8]), "train")
    assert torch.equal(one, again) and words == same


# What is learned ----------------------------------------------------------------------

def test_the_target_is_the_models_own(run):
    """The loss is the plain error of the noise, under the folder's schedule."""
    task = Trainer(run, CPU).task
    assert task.prediction_type == "epsilon"
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    torch.testing.assert_close(task.schedule.betas, betas)
    seen = {}
    forward = task.module.forward
    task.module.forward = lambda noisy, t, context: seen.update(
        noisy=noisy, t=t, context=context, out=forward(noisy, t, context)) or seen["out"]
    samples = torch.arange(40, 44)
    loss, _ = task.loss(samples, "train")
    noise = keyed_noise(0, samples, seen["out"].shape[1:], 3)
    torch.testing.assert_close(loss, (seen["out"] - noise).square().mean())
    x, captions = task.data.batch(samples, "train")
    z, _ = task.encode(x, captions, samples)
    torch.testing.assert_close(seen["noisy"],
                               NoiseSchedule.sd15().add_noise(z, noise, seen["t"]))
    with torch.no_grad():
        posterior = task.vae.encode(x)
        first = keyed_noise(0, samples, posterior.mean.shape[1:])
        want = 0.18215 * (posterior.mean + posterior.std * first)
    torch.testing.assert_close(z, want)


def test_captions_are_dropped_in_training_only(run):
    options = run.options | {"caption_dropout": 1.0}
    task = Trainer(dataclasses.replace(run, options=options), CPU).task
    heard = []
    encode = task.encode
    task.encode = lambda x, captions, samples: heard.append(captions) or encode(
        x, captions, samples)
    task.loss(torch.arange(4), "train")
    task.loss(torch.arange(4), "valid")
    assert heard[0] == [""] * 4 and all(heard[1])


def test_frozen_parts_stay_and_have_the_wanted_precision(run):
    options = run.options | {"frozen_precision": "bfloat16"}
    trainer = Trainer(dataclasses.replace(run, options=options, precision="bfloat16"), CPU)
    task = trainer.task
    for part in (task.vae, task.text_encoder):
        assert all(p.dtype == torch.bfloat16 and not p.requires_grad
                   for p in part.parameters())
    assert all(p.dtype == torch.float32 for p in task.module.parameters())
    train_step(trainer)
    exact = Trainer(run, CPU).task  # under autocast, too, float32 means float32
    x, words = task.data.batch(torch.arange(4), "train")
    plain = exact.encode(x, words, torch.arange(4))
    with torch.autocast("cpu", torch.bfloat16):
        cast = exact.encode(x, words, torch.arange(4))
    rough = task.encode(x, words, torch.arange(4))
    for a, b, c in zip(plain, cast, rough, strict=True):
        assert torch.equal(a, b) and c.dtype == torch.float32
        assert 0 < relative_error(c, a) < 0.1


def test_one_picture_is_learned(tmp_path, run):
    """The loss on a single picture, over the same noise and times, falls."""
    fill(tmp_path / "one", 1)
    options = run.options | {"pictures": str(tmp_path / "one"), "held_out": 0}
    trainer = Trainer(dataclasses.replace(run, options=options, steps=40, batch_size=4,
                                          learning_rate=3e-3), CPU)
    with torch.no_grad():
        before = float(trainer.loss(torch.arange(32), "valid")[0])
    for _ in range(40):
        train_step(trainer)
    with torch.no_grad():
        after = float(trainer.loss(torch.arange(32), "valid")[0])
    assert after < 0.7 * before


def test_a_run_ends_with_a_folder_that_paints_and_resumes_exactly(tmp_path, run, model):
    from sdlib.pipeline import StableDiffusion

    class Stop(Exception):
        pass

    def stop(trainer, figures):
        if trainer.step == 5:
            raise Stop

    whole = train(run, tmp_path / "whole", "cpu")
    with pytest.raises(Stop):
        train(run, tmp_path / "cut", "cpu", [stop])
    shutil.rmtree(run.output)
    train(run, tmp_path / "cut", "cpu")
    for name in ("module", "average", "optimizer"):
        a, b = (read_weights(checkpoints(tmp_path / s)[-1] / f"{name}.safetensors")
                for s in ("whole", "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a), name
    pipe = StableDiffusion.from_pretrained(run.output, device="cpu")
    for name, value in whole.ema.weights.items():
        assert torch.equal(pipe.unet.state_dict()[name], value)
    assert pipe("number 3", seed=0, num_inference_steps=2, progress=False)[0].size == (16, 16)
    assert not list(Path(run.output).rglob("*.bin"))
    first = read_weights(model / "unet/diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(first[k], v) for k, v in whole.ema.weights.items())


def test_from_scratch_takes_the_shape_and_no_weight(run, model):
    options = run.options | {"from_scratch": True, "gradient_checkpointing": True}
    module = Trainer(dataclasses.replace(run, options=options), CPU).module
    own = read_weights(model / "unet/diffusion_pytorch_model.safetensors")
    assert module.state_dict().keys() == own.keys()
    assert not torch.equal(module.conv_in.weight, own["conv_in.weight"])
    assert "forward" in vars(module.mid_block.resnets[0])


# Accumulation -------------------------------------------------------------------------

def doubled(run: TrainingConfig, **changes) -> Trainer:
    """A trainer in float64. The frozen parts, in float32, encode one picture at a time:
    else what they give would differ in the last bits from batch size to batch size."""
    trainer = Trainer(dataclasses.replace(run, **changes), CPU)
    encode = trainer.task.encode

    def one_by_one(x, captions, samples):
        rows = [encode(x[k:k + 1], captions[k:k + 1], samples[k:k + 1])
                for k in range(len(x))]
        return [torch.cat(part).double() for part in zip(*rows)]

    trainer.task.encode = one_by_one
    trainer.module.double()
    trainer.ema = EMA(trainer.module, run.ema_decay)
    return trainer


def test_accumulated_steps_equal_steps_of_large_batches(run):
    trainers = [doubled(run, batch_size=8 // k, gradient_accumulation_steps=k)
                for k in (1, 2, 8)]
    figures = [[train_step(trainer) for trainer in trainers] for _ in range(3)]
    for rows in figures:
        for row in rows[1:]:
            assert row == pytest.approx(rows[0], rel=1e-9)
    one = trainers[0].module.state_dict()
    for other in trainers[1:]:
        for name, value in other.module.state_dict().items():
            torch.testing.assert_close(value, one[name], rtol=0, atol=1e-11)
        for name, value in other.ema.weights.items():
            torch.testing.assert_close(value, trainers[0].ema.weights[name], rtol=0,
                                       atol=1e-11)


def test_a_forgotten_share_would_be_noticed(run):
    """Summed instead of averaged, AdamW hardly notices; the clipped gradient does."""
    one = doubled(run, batch_size=8)
    many = doubled(run, batch_size=2, gradient_accumulation_steps=4)
    loss = many.loss
    many.loss = lambda samples, split: (4 * loss(samples, split)[0], {})
    figures = [train_step(trainer) for trainer in (one, many)]
    assert figures[1]["gradient_norm"] == pytest.approx(4 * figures[0]["gradient_norm"])


def test_gradient_checkpointing_trains_to_the_same_bits(run):
    options = run.options | {"gradient_checkpointing": True}
    plain, spared = (Trainer(r, CPU) for r in (
        run, dataclasses.replace(run, options=options)))
    for _ in range(2):
        assert train_step(plain) == train_step(spared)
    for name, value in spared.module.state_dict().items():
        assert torch.equal(value, plain.module.state_dict()[name]), name


def test_a_loss_that_compares_samples_is_not_split(tmp_path):
    with pytest.raises(ValueError, match="gradient_accumulation_steps: .* cannot be split"):
        TrainingConfig("clip", str(tmp_path), steps=1, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="gradient_accumulation_steps must be at least 1"):
        TrainingConfig("vae", str(tmp_path), steps=1, gradient_accumulation_steps=0)


# Runs ---------------------------------------------------------------------------------

def test_records_from_before_a_setting_existed_go_on(tmp_path, run):
    train(run, tmp_path / "state", "cpu")
    path = tmp_path / "state/config.json"
    values = read_json(path)
    del values["gradient_accumulation_steps"]
    path.write_text(json.dumps(values))
    train(run, tmp_path / "state", "cpu")
    with pytest.raises(ValueError, match="gradient_accumulation_steps: 1 -> 2"):
        train(dataclasses.replace(run, gradient_accumulation_steps=2),
              tmp_path / "state", "cpu")


def test_the_shipped_models_records_are_read():
    for path in (ROOT / "models/emoji-sd/training").rglob("config.json"):
        assert TrainingConfig.from_dict(read_json(path)).gradient_accumulation_steps == 1


def test_a_start_that_fails_leaves_no_record(tmp_path, run):
    """Else the corrected configuration would be refused as a changed one."""
    wrong = dataclasses.replace(run, options=run.options | {"pictures": "nowhere"})
    with pytest.raises(FileNotFoundError, match="no folder of pictures 'nowhere'"):
        train(wrong, tmp_path / "state", "cpu")
    train(run, tmp_path / "state", "cpu")


@pytest.mark.parametrize("options, words", [
    ({"size": 15}, "size 15 is no multiple of the 2 pixels"),
    ({"model": "nowhere"}, "there is no model folder 'nowhere'"),
    ({"frozen_precision": "int8"}, "frozen_precision 'int8'"),
    ({"caption_dropout": 2.0}, "caption_dropout: 0 to 1"),
])
def test_wrong_options_are_explained(run, options, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        Trainer(dataclasses.replace(run, options=run.options | options), CPU)


def test_the_large_configuration_says_what_is_missing(tmp_path, monkeypatch, capsys):
    """configs/sd15.yaml as it is: no pictures; with pictures: no model."""
    config = read_config(ROOT / "configs/sd15.yaml")
    assert config.task == "pictures" and config.options["gradient_checkpointing"]
    monkeypatch.setattr("sdlib.runs.fastest_precision", lambda device: "float32")
    monkeypatch.chdir(tmp_path)
    arguments = [str(ROOT / "configs/sd15.yaml"), "--state", "state", "--device", "cpu"]
    assert main(arguments) == 1
    assert "error: there is no folder of pictures 'data/pictures'" in capsys.readouterr().err
    fill(tmp_path / config.options["pictures"], config.options["held_out"] + 1)
    assert main(arguments) == 1
    assert "error: there is no model folder 'models/stable-diff" in capsys.readouterr().err


def test_parser_and_main(tmp_path, run, capsys):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(
        dataclasses.replace(run, steps=1).to_dict()))
    arguments = [str(tmp_path / "run.yaml"), "--state", str(tmp_path / "s"),
                 "--device", "cpu"]
    assert make_parser().parse_args(arguments).device == "cpu"
    assert main(arguments) == 0
    assert (tmp_path / "trained/unet").is_dir()
    assert main([str(tmp_path / "none.yaml")]) == 1
    assert "error: there is no configuration" in capsys.readouterr().err
