"""sdlib.images and sdlib.plots: nothing is lost, and bad input is named."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from sdlib.images import grid, load_folder, prepare, read_folder, to_pil, to_tensor
from sdlib.plots import road_map, show_images, use_style


def noise(size=(7, 5), seed=0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(values.astype(np.uint8))


def test_round_trip_keeps_every_byte():
    pictures = [noise(seed=k) for k in range(3)]
    x = to_tensor(pictures)
    assert x.shape == (3, 3, 5, 7) and x.dtype == torch.float32
    assert x.min() >= -1 and x.max() <= 1
    assert [p.tobytes() for p in to_pil(x)] == [p.tobytes() for p in pictures]
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_tensor(to_pil(to_tensor(every))), to_tensor(every))


def test_channels_and_axes():
    picture = Image.new("RGB", (4, 2))
    picture.putpixel((3, 1), (255, 0, 51))
    x = to_tensor(picture)
    assert torch.allclose(x[0, :, 1, 3], torch.tensor([1.0, -1.0, -0.6]))


def test_to_pil_takes_single_pictures_uint8_and_overshoot():
    assert len(to_pil(torch.zeros(3, 4, 4))) == 1
    assert to_pil(torch.full((1, 3, 2, 2), 7, dtype=torch.uint8))[0].getpixel((0, 0)) == (7,) * 3
    assert to_pil(torch.full((1, 3, 2, 2), 1.4))[0].getpixel((0, 0)) == (255,) * 3
    assert to_pil(torch.full((3, 2, 2), -3.0, dtype=torch.bfloat16))[0].getpixel((0, 0)) == (0,) * 3


@pytest.mark.parametrize("bad, message", [
    ([], "no pictures"),
    (noise().convert("RGBA"), "prepare"),
    (noise().convert("L"), "'L'"),
    ([noise(), noise((5, 7))], "different sizes"),
    (torch.zeros(1, 3, 4, 4), "uint8"),
    (torch.zeros(3, 4, 4, dtype=torch.uint8), "uint8 of shape"),
])
def test_to_tensor_names_what_is_wrong(bad, message):
    with pytest.raises(ValueError, match=message):
        to_tensor(bad)


@pytest.mark.parametrize("bad, message", [
    (torch.zeros(2, 4, 4), r"\(B, 3, H, W\)"),
    (torch.zeros(1, 4, 4, 3), "channels come before"),
    (torch.full((3, 2, 2), float("nan")), "NaN"),
    (torch.full((3, 2, 2), 200.0), r"0\.\.255"),
])
def test_to_pil_names_what_is_wrong(bad, message):
    with pytest.raises(ValueError, match=message):
        to_pil(bad)


def test_prepare_crops_the_middle():
    wide = Image.new("RGB", (120, 40), "red")
    wide.paste("blue", (40, 0, 80, 40))
    assert prepare(wide, 20).size == (20, 20)
    assert prepare(wide, 20).getpixel((10, 10)) == (0, 0, 255)
    # the filter looks a little beyond the crop, as if all had been resized first
    assert prepare(wide, 20).crop((1, 0, 19, 20)).getcolors() == [(360, (0, 0, 255))]
    assert prepare(noise((3, 9)), 64).size == (64, 64)


def test_prepare_turns_upright(tmp_path):
    picture = Image.new("RGB", (40, 40), "white")
    picture.paste("red", (0, 0, 40, 20))  # the top is red
    lying = picture.rotate(90, expand=True)
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / "a.png", exif=exif)
    assert prepare(tmp_path / "a.png", 40).getpixel((20, 5)) == (255, 0, 0)
    assert prepare(str(tmp_path / "a.png"), 40).getpixel((20, 35)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_prepare_lays_transparency_over_white(mode):
    picture = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 20, 10))
    picture = picture.convert(mode) if mode != "P" else picture.quantize(4)
    ready = prepare(picture, 20)
    assert ready.mode == "RGB"
    assert ready.getpixel((10, 2)) == (0, 0, 0) and ready.getpixel((10, 18)) == (255,) * 3


def test_prepare_understands_16_bits_and_gray():
    deep = Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16))
    assert prepare(deep, 4).getpixel((0, 0)) == (155,) * 3
    dark = Image.fromarray(np.full((8, 8), 200, dtype=np.uint16))  # nearly black, not 200
    assert prepare(dark, 4).getpixel((0, 0)) == (0,) * 3
    assert prepare(Image.new("L", (8, 8), 77), 4).getpixel((0, 0)) == (77,) * 3


def test_prepare_errors(tmp_path):
    with pytest.raises(ValueError, match="1 or more"):
        prepare(noise(), 0)
    (tmp_path / "no.png").write_text("hello")
    with pytest.raises(UnidentifiedImageError):
        prepare(tmp_path / "no.png", 8)


def test_grid():
    sheet = grid([noise() for _ in range(5)], ncols=3, gap=2)
    assert sheet.size == (3 * 9 - 2, 2 * 7 - 2)
    assert sheet.getpixel((24, 11)) == (255,) * 3  # the empty place is white
    for bad in ([], [noise(), noise((5, 7))]):
        with pytest.raises(ValueError):
            grid(bad)


def folder(tmp_path, lines):
    for k in range(2):
        noise(seed=k).save(tmp_path / f"{k}.png")
    text = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def test_folder_keeps_order_and_text(tmp_path):
    lines = [{"file_name": "1.png", "text": "Ünïcode 🦊"}, "",
             {"file_name": "0.png", "text": "b", "other": 3}]
    assert read_folder(folder(tmp_path, lines)) == [
        (tmp_path / "1.png", "Ünïcode 🦊"), (tmp_path / "0.png", "b")]
    pictures, captions = load_folder(tmp_path, 4)
    assert pictures.shape == (2, 3, 4, 4) and pictures.dtype == torch.uint8
    assert captions == ["Ünïcode 🦊", "b"]


GOOD = {"file_name": "0.png", "text": "a"}


@pytest.mark.parametrize("lines, error, message", [
    ([], ValueError, "lists no pictures"),
    ([GOOD, "{"], ValueError, "line 2"),
    ([GOOD, "[1]"], ValueError, "line 2"),
    ([GOOD, {"file_name": "1.png"}], ValueError, "line 2"),
    ([GOOD, GOOD], ValueError, "twice"),
    ([{"file_name": "0.png", "text": " "}], ValueError, "no text"),
    ([{"file_name": "../0.png", "text": "a"}], ValueError, "outside"),
    ([{"file_name": "7.png", "text": "a"}], FileNotFoundError, "line 1"),
])
def test_folder_errors_name_the_line(tmp_path, lines, error, message):
    with pytest.raises(error, match=message):
        read_folder(folder(tmp_path, lines))


def test_folder_without_metadata(tmp_path):
    with pytest.raises(FileNotFoundError, match="metadata.jsonl"):
        read_folder(tmp_path)


def test_road_map_is_small_and_lights_its_part(tmp_path):
    seen = set()
    for chapter in [f"{k:02d}" for k in range(23)]:
        picture = road_map(chapter)
        picture.save(tmp_path / "a.png", optimize=True)
        assert (tmp_path / "a.png").stat().st_size < 40_000
        seen.add(picture.tobytes())
    assert len(seen) == 23  # every chapter lights something else
    with pytest.raises(ValueError, match="two digits"):
        road_map("6")


def test_show_images_draws_all_and_checks_titles():
    use_style()
    figure = show_images(torch.zeros(5, 3, 8, 8), titles=["a long title here"] * 5, ncols=3)
    assert len(figure.axes) == 6 and sum(len(a.images) for a in figure.axes) == 5
    plt.close(figure)
    with pytest.raises(ValueError, match="2 titles"):
        show_images([noise()], titles=["a", "b"])
