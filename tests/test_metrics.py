"""Evaluation: intervals, distances between sets, copies, and the command that judges."""

import inspect
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import relative_error
from scipy import linalg, stats
from torch import nn

from sdlib import accuracy, distances, metrics, own_pictures
from sdlib.accuracy import (
    Paired,
    choose,
    compare_paired,
    counts,
    judged,
    unmixed,
    wilson,
)
from sdlib.clip import clip_pixels, load_clip
from sdlib.distances import (
    Gaussian,
    coarse_pixels,
    distances_between,
    fit_gaussian,
    frechet_bias,
    frechet_distance,
    image_features,
    inside,
    kernel_distance,
    nearer_to_training,
    picture_features,
    precision_recall,
)
from sdlib.images import to_tensor
from sdlib.own_pictures import embed_pairs, judge_folder, load_judge, match, read_exam
from sdlib.reader import judge_all
from sdlib.scenes import batch, draw, held_out, scene
from sdlib.tokenizer import Tokenizer

MODEL = Path(__file__).parents[1] / "models/emoji-sd"
SHIPPED = json.loads((MODEL / "evaluation.json").read_text())


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def spoiled(function, old: str, new: str):
    """A copy of a function with one mistake in it."""
    source = inspect.getsource(function)
    assert source.count(old) >= 1, f"{function.__name__} no longer holds {old!r}"
    namespace = dict(vars(inspect.getmodule(function)))
    exec(source.replace(old, new), namespace)
    return namespace[function.__name__]


@pytest.fixture(scope="module")
def clip():
    return load_clip(MODEL)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(MODEL / "tokenizer")


# --------------------------------------------------------------------------- intervals
@pytest.mark.parametrize("k, n", [(0, 1), (0, 100), (3, 7), (250, 500), (500, 500)])
def test_wilson_equals_scipy(k, n):
    theirs = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert np.allclose(wilson(k, n, stats.norm.ppf(0.975)), theirs, atol=1e-12)


def test_wilson_covers_where_the_textbook_interval_does_not():
    n, share = 100, 0.02
    chance = stats.binom.pmf(np.arange(n + 1), n, share)

    def covered(interval):
        return sum(c for k, c in enumerate(chance) if interval(k)[0] <= share <= interval(k)[1])

    def textbook(k):
        half = 1.96 * math.sqrt(k / n * (1 - k / n) / n)
        return k / n - half, k / n + half

    assert covered(lambda k: wilson(k, n)) > 0.94 > 0.88 > covered(textbook)


@pytest.mark.parametrize("old, new", [("z * z / 2", "z * z"), ("z * z / 4", "z * z"),
                                      ("(k + z", "(k - z")])
def test_a_wrong_wilson_is_noticed(old, new):
    theirs = stats.binomtest(3, 20).proportion_ci(0.95, method="wilson")
    assert not np.allclose(spoiled(wilson, old, new)(3, 20), theirs, atol=1e-3)


@pytest.mark.parametrize("k, n", [(1, 0), (-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_what_is_no_count(k, n):
    with pytest.raises(ValueError, match="is no count"):
        wilson(k, n)


@pytest.mark.parametrize("b, c", [(3, 12), (0, 0), (5, 5), (0, 6)])
def test_the_sign_test_is_exact(b, c):
    wanted = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert Paired(b, c, 40).p_value == pytest.approx(wanted)


def test_paired_interval_covers_and_is_narrower_than_an_unpaired_one():
    random, n, hit, width = np.random.default_rng(0), 60, 0, []
    for _ in range(2000):  # hard and easy prompts: the two models fail on the same ones
        chance = random.choice([0.05, 0.9], n)
        first, second = (random.random(n) < np.clip(chance + s, 0, 1) for s in (0, 0.08))
        low, high = compare_paired(first, second).interval()
        hit += low <= 0.08 <= high
        width.append(high - low)
    assert hit / 2000 > 0.93
    share = 0.475
    assert np.mean(width) < 0.75 * 2 * 1.96 * math.sqrt(2 * share * (1 - share) / n)


def test_pairs_are_counted_in_order():
    pairs = compare_paired([True, True, False, False, True], [1, 0, 1, 0, 0])
    assert (pairs.only_first, pairs.only_second, pairs.n) == (2, 1, 5)
    assert pairs.difference == pytest.approx(-0.2)
    for a, b in (([True], [True, False]), ([], [])):
        with pytest.raises(ValueError, match="make no pairs"):
            compare_paired(a, b)


def test_unmixed_undoes_the_judges_errors():
    for true in (0.0, 0.3, 1.0):
        assert unmixed(true * 0.9 + (1 - true) * 0.05, 0.9, 0.05) == pytest.approx(true)
    assert unmixed(0.01, 0.9, 0.05) == 0.0 and unmixed(0.99, 0.9, 0.05) == 1.0
    with pytest.raises(ValueError, match="tells nothing"):
        unmixed(0.5, 0.3, 0.3)


# ---------------------------------------------------------------------- prompt accuracy
def test_choose_halves_and_keeps_the_splits_apart():
    for split, hidden in (("valid", False), ("heldout", True)):
        chosen = choose(split, 21)
        assert [len(s.items) for s in chosen].count(1) == 11
        assert all(held_out(s.facts.sprites, s.background) == hidden for s in chosen)
        assert choose(split, 21) == chosen
    assert choose("valid", 10, seed=2) != choose("valid", 10)


def test_counts_notice_planted_faults():
    """Six scenes each; the reader is almost never wrong on drawn pictures."""
    chosen = [s for s in choose("valid", 60) if len(s.items) == 2 and s.relation][:6]
    captions = [s.caption for s in chosen]

    def found(scenes):
        return counts(judge_all([draw(s) for s in scenes], captions))

    right = found(chosen)
    assert right["everything"] == right["binding"] == right["both of two objects"] == (6, 6)
    assert right["single object"] == (0, 0)
    # change places: exchange the sprites, not the places and sizes
    swapped = found([replace(s, items=tuple(replace(i, sprite=o.sprite) for i, o in
                                            zip(s.items, s.items[::-1]))) for s in chosen])
    assert swapped["binding"][0] <= 1 and swapped["both of two objects"][0] >= 4
    assert swapped["background"] == (6, 6)
    alone = found([replace(s, items=s.items[:1]) for s in chosen])
    assert alone["both of two objects"] == (0, 6) and alone["binding"] == (0, 0)
    assert alone["at least one of two"][0] >= 5
    report = judged(to_tensor([draw(s) for s in chosen]), captions)
    assert report["prompts"] == 6 and report["everything"] == 100.0
    assert set(report) < set(SHIPPED["pictures"])  # no single objects here


# -------------------------------------------------------------------- Fréchet distance
def textbook_frechet(a: Gaussian, b: Gaussian) -> float:
    """As everybody else computes it: the trace of a complex root."""
    s, t = a.covariance.numpy(), b.covariance.numpy()
    root = linalg.sqrtm(s @ t)
    return float(np.sum((a.mean - b.mean).numpy() ** 2) + np.trace(s + t - 2 * root.real))


@pytest.fixture(scope="module")
def two_clouds():
    mix = normal(12, 12, seed=1) / 3
    return normal(300, 12, seed=2) @ mix, normal(200, 12, seed=3) @ mix.T + 0.5


def test_frechet_equals_scipys_matrix_root(two_clouds):
    a, b = map(fit_gaussian, two_clouds)
    assert frechet_distance(a, b) == pytest.approx(textbook_frechet(a, b), rel=1e-8)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert abs(frechet_distance(a, a)) < 1e-9


def test_fit_equals_numpys(two_clouds):
    a = fit_gaussian(two_clouds[0])
    assert relative_error(a.covariance, np.cov(two_clouds[0].numpy().T)) < 1e-12
    assert relative_error(a.mean, two_clouds[0].numpy().mean(0)) < 1e-12 and a.n == 300


def test_frechet_in_one_dimension_and_under_rotation(two_clouds):
    a, b = (Gaussian(torch.tensor([m], dtype=torch.float64),
                     torch.tensor([[s * s]], dtype=torch.float64), 9)
            for m, s in ((0.5, 2.0), (-1.0, 0.5)))
    assert frechet_distance(a, b) == pytest.approx(1.5 ** 2 + 1.5 ** 2)
    turn = torch.linalg.qr(normal(12, 12, seed=4)).Q
    straight, turned = (frechet_distance(*(fit_gaussian(x @ q) for x in two_clouds))
                        for q in (torch.eye(12, dtype=torch.float64), turn))
    assert straight == pytest.approx(turned, rel=1e-9)


def test_frechet_survives_fewer_samples_than_numbers():
    a, b = fit_gaussian(normal(5, 40)), fit_gaussian(normal(7, 40, seed=1))
    assert 0 < frechet_distance(a, b) < math.inf
    assert abs(frechet_distance(a, a)) < 1e-6


@pytest.mark.parametrize("old, new", [
    ("trace - 2 *", "trace -"), ("shift + spread", "spread"),
    ("(first.mean - second.mean).square().sum()", "(first.mean - second.mean).norm()"),
    ("matrix_root(first.covariance) @ matrix_root(second.covariance)",
     "first.covariance @ second.covariance"),
    ("svdvals(cross).sum()", "svdvals(cross).sqrt().sum()")])
def test_a_wrong_frechet_is_noticed(two_clouds, old, new):
    a, b = map(fit_gaussian, two_clouds)
    wrong = spoiled(frechet_distance, old, new)(a, b)
    assert wrong != pytest.approx(textbook_frechet(a, b), rel=0.01)


def test_frechet_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="features of 3 and 4 numbers"):
        frechet_distance(fit_gaussian(normal(9, 3)), fit_gaussian(normal(9, 4)))
    for bad in (normal(1, 3), normal(9)):
        with pytest.raises(ValueError, match="N >= 2"):
            fit_gaussian(bad)


@pytest.mark.parametrize("d", [1, 4, 16])
def test_the_bias_is_foreseen(d):
    """Mean of 200 runs; its own standard error is about 2 % or less."""
    spread = torch.logspace(-1, 1, d, dtype=torch.float64)
    truth = Gaussian(torch.zeros(d, dtype=torch.float64), spread.square().diag(), 0)
    n = 1000
    runs = [frechet_distance(truth, fit_gaussian(normal(n, d, seed=k) * spread))
            for k in range(200 if d > 1 else 2000)]
    assert np.mean(runs) == pytest.approx(frechet_bias(truth, n), rel=0.08)


# --------------------------------------------------------------------- kernel distance
def test_kernel_distance_equals_loops():
    x, y = normal(5, 3), normal(4, 3, seed=1) + 0.5

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    xx = np.mean([k(a, b) for a, b in itertools.permutations(x, 2)])
    yy = np.mean([k(a, b) for a, b in itertools.permutations(y, 2)])
    xy = np.mean([k(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-10)


def every_sample(function) -> float:
    """Mean over all equally likely samples of 3 and 2 from two little populations."""
    x = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    y = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    return float(np.mean([function(x[list(i)], y[list(j)])
                          for i in itertools.product(range(3), repeat=3)
                          for j in itertools.product(range(2), repeat=2)]))


def true_kernel_distance() -> float:
    """Squared distance of the mean features (1, x, x^2, x^3 with binomial weights)."""
    def mean(values):
        x = np.array(values)
        return np.mean([np.ones_like(x), 3 ** 0.5 * x, 3 ** 0.5 * x ** 2, x ** 3], axis=1)
    return float(np.sum((mean([0.0, 1.0, 3.0]) - mean([0.0, 2.0])) ** 2))


def test_kernel_distance_is_unbiased():
    assert every_sample(kernel_distance) == pytest.approx(true_kernel_distance(), rel=1e-9)


@pytest.mark.parametrize("old, new", [
    ("(xx.sum() - xx.trace()) / (n * (n - 1))", "xx.mean()"),
    ("(yy.sum() - yy.trace()) / (m * (m - 1))", "(yy.sum() - yy.trace()) / (m * m)"),
    ("- 2 * between", "- between"), ("+ 1) ** degree", ") ** degree")])
def test_a_biased_or_wrong_kernel_distance_is_noticed(old, new):
    wrong = every_sample(spoiled(kernel_distance, old, new))
    assert wrong != pytest.approx(true_kernel_distance(), rel=0.01)


def test_kernel_distance_refuses_what_does_not_fit():
    for x, y in ((normal(1, 3), normal(4, 3)), (normal(4, 3), normal(4, 2))):
        with pytest.raises(ValueError, match="two or more each"):
            kernel_distance(x, y)


# ---------------------------------------------------------- neighbors: recall and copies
def test_inside_equals_a_loop():
    cloud, points = normal(20, 2), 1.5 * normal(30, 2, seed=1)
    for k in (1, 3):
        wanted = []
        for p in points:
            reached = False
            for i, c in enumerate(cloud):
                others = sorted(float((c - o).norm()) for j, o in enumerate(cloud) if j != i)
                reached |= float((p - c).norm()) <= others[k - 1]
            wanted.append(reached)
        assert inside(points, cloud, k).tolist() == wanted
    with pytest.raises(ValueError, match="no 3-th neighbor"):
        inside(points, cloud[:3])


def test_precision_and_recall_on_known_clouds():
    real = normal(400, 2)
    assert precision_recall(real, real) == (1.0, 1.0)
    same = precision_recall(real, normal(400, 2, seed=1))
    assert min(same) > 0.85
    narrow = precision_recall(real, 0.2 * normal(400, 2, seed=1))
    assert narrow[0] > 0.95 and narrow[1] < 0.4  # good ones only, little variety
    wide = precision_recall(real, 5 * normal(400, 2, seed=1))
    assert wide[0] < 0.4 and wide[1] > 0.85
    assert precision_recall(real, real + 100) == (0.0, 0.0)


def test_a_point_that_counts_as_its_own_neighbor_is_noticed():
    wrong = spoiled(inside, "among.fill_diagonal_(torch.inf)", "pass")
    cloud, points = normal(50, 2), normal(50, 2, seed=1)
    assert not torch.equal(wrong(points, cloud, 1), inside(points, cloud, 1))


def test_copies_are_found_and_chance_is_a_half():
    train, fresh, made = (normal(300, 8, seed=s) for s in (0, 1, 2))
    low, high = wilson(nearer_to_training(made, train, fresh), 300, z=3.3)
    assert low < 0.5 < high
    copies = train[:40] + 0.01 * normal(40, 8, seed=3)
    assert nearer_to_training(copies, train, fresh) == 40
    assert nearer_to_training(fresh[:40], train, fresh) == 0
    with pytest.raises(ValueError, match="the larger set wins by chance"):
        nearer_to_training(made, train, fresh[:100])


def test_equal_rows_are_exactly_zero_apart():
    x = 1000 + normal(5, 64)
    assert torch.equal(distances_between(x, x).diagonal(), torch.zeros(5).double())


# ---------------------------------------------------------------------------- features
def test_features_do_not_depend_on_batches_or_on_dropout(clip):
    pictures = to_tensor(batch(range(5))[0])
    whole = picture_features(pictures, image_features(clip))
    parts = picture_features(pictures, image_features(clip), batch_size=2)
    assert whole.shape == (5, 128) and relative_error(parts, whole) < 1e-5
    direct = clip.encode_image(clip_pixels(pictures, clip.vision_config))
    assert relative_error(whole, direct) < 1e-5
    net = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(3 * 64 * 64, 4)).train()
    assert torch.equal(picture_features(pictures, net), picture_features(pictures, net))
    assert net.training, "the caller's mode comes back"


def test_features_refuse_pictures_in_another_range():
    pictures = batch(range(2))[0]
    for bad in (pictures, pictures.float()):
        with pytest.raises(ValueError, match="in \\[-1, 1\\]"):
            picture_features(bad, coarse_pixels)
    with pytest.raises(ValueError, match="NaN"):
        picture_features(to_tensor(pictures), lambda x: x / 0)


def test_coarse_pixels_are_means():
    x = to_tensor(batch(range(2))[0])
    got = coarse_pixels(x).view(2, 3, 16, 16)
    assert relative_error(got[1, 2, 3, 4], x[1, 2, 12:16, 16:20].mean()) < 1e-5


# -------------------------------------------------------------------------- CLIP's score
def test_clip_score_is_the_cosine_that_clip_was_trained_on(clip, tokenizer):
    pictures, captions = batch(range(3), split="valid")
    x = to_tensor(pictures)
    with torch.no_grad():
        logits = clip(tokenizer(captions), clip_pixels(x, clip.vision_config))
    wanted = logits.diagonal() / clip.logit_scale.exp()
    assert relative_error(metrics.clip_score(clip, tokenizer, x, captions), wanted) < 1e-4
    with pytest.raises(ValueError, match="3 pictures but 2 captions"):
        metrics.clip_score(clip, tokenizer, x, captions[:2])


def test_ranking_compares_with_near_misses_and_others(clip, tokenizer):
    chosen = choose("valid", 4)
    report = metrics.judge_clip(clip, tokenizer, chosen)
    assert set(report) == set(SHIPPED["clip"]) and report["pictures"] == 4
    picture = to_tensor(draw(chosen[0]))[0]
    wrong = metrics.rank_captions(clip, tokenizer, picture, chosen[1],
                                  [chosen[0].caption], 0, misses=2)
    assert wrong == (False, False)  # another scene's picture


# --------------------------------------------------------------------------- the command
def test_the_command_writes_the_shipped_reports_keys(tmp_path, capsys):
    out, sheet = tmp_path / "report.json", tmp_path / "new" / "sheet.png"
    metrics.main([str(MODEL), "--prompts", "4", "--steps", "1", "--guidance", "1", "--sets",
                  "--device", "cpu", "--out", str(out), "--sheet", str(sheet)])
    report = json.loads(out.read_text())
    sets = report.pop("sets")
    assert {k: list(v) if isinstance(v, dict) else None for k, v in report.items()} == {
        k: list(v) if isinstance(v, dict) else None for k, v in SHIPPED.items()}
    assert sets["pictures"] == 4 and sets["frechet"] > 0
    assert report["pictures"]["prompts"] == 4 and report["held out"]["prompts"] == 2
    assert sheet.stat().st_size > 1000
    assert json.loads(capsys.readouterr().out.rpartition("}")[0] + "}")["steps"] == 1
    assert json.loads((MODEL / "evaluation.json").read_text()) == SHIPPED


def test_pairs_are_left_out_of_the_kernel_distance():
    """E = MMD^2 for pairs that depend on each other, where the plain one is biased."""
    x = normal(6, 5)
    assert abs(kernel_distance(x, x, paired=True)) < 1e-9 and kernel_distance(x, x) < -0.1
    y = normal(6, 5, seed=1)
    a, b = ((p @ q.T / 5 + 1) ** 3 for p, q in ((x, x), (y, y)))
    cross = (x @ y.T / 5 + 1) ** 3
    off = ~torch.eye(6, dtype=torch.bool)
    wanted = a[off].mean() + b[off].mean() - 2 * cross[off].mean()
    assert kernel_distance(x, y, paired=True) == pytest.approx(float(wanted))
    with pytest.raises(ValueError, match="as many if they are paired"):
        kernel_distance(x, y[:5], paired=True)
    found = {True: [], False: []}
    for seed in range(300):  # y is x with some noise: the same distribution, up to its width
        x = normal(8, 3, seed=seed)
        y = (x + normal(8, 3, seed=1000 + seed)) / math.sqrt(2)
        for paired, values in found.items():
            values.append(kernel_distance(x, y, paired=paired))
    error = {p: np.std(v) / math.sqrt(len(v)) for p, v in found.items()}
    assert abs(np.mean(found[True])) < 3 * error[True]
    assert np.mean(found[False]) < -5 * error[False]


# ----------------------------------------------------------- pictures without known truth
@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Eight drawn scenes as a folder of captioned pictures, twice the model's size."""
    folder = tmp_path_factory.mktemp("data") / "own"
    folder.mkdir()
    for k, one in enumerate(choose("valid", 8)):
        draw(one).resize((128, 128), 0).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(one.caption)
    return folder


def test_an_exam_is_spread_over_the_folder_and_cut_to_size(own):
    captions = [s.caption for s in choose("valid", 8)]
    x, texts = read_exam(own, 64, 100)
    assert x.shape == (8, 3, 64, 64) and texts == captions
    drawn = to_tensor([draw(s) for s in choose("valid", 8)])
    assert (x - drawn).abs().mean() < 0.02  # enlarged and made smaller again
    x, texts = read_exam(own, 32, 5)
    assert x.shape == (5, 3, 32, 32) and texts == [captions[k] for k in (0, 2, 4, 5, 7)]


def test_real_pictures_are_at_no_distance_from_themselves(clip, tokenizer):
    chosen, vae = choose("valid", 8), load_vae()
    x, captions = to_tensor([draw(s) for s in chosen]), [s.caption for s in chosen]
    report = judge_folder(vae, clip, tokenizer, x, x, captions)
    assert report["real"] == report["painted"] and report["pictures"] == 8
    assert abs(report["sets"]["frechet"]) < 0.01 and report["sets"]["precision"] == 1
    assert report["real"]["own caption nearest"] == 100
    score = metrics.clip_score(clip, tokenizer, x, captions).mean()
    assert abs(report["real"]["clip score"] - float(score)) < 1e-3
    assert report["vae"]["psnr"] == metrics.judge_vae(vae, chosen)["psnr"]
    mixed = judge_folder(vae, clip, tokenizer, x, x.flip(0), captions)
    assert mixed["painted"]["own caption nearest"] < 50 and mixed["sets"]["precision"] == 1
    worse = judge_folder(vae, clip, tokenizer, x, -x, captions)
    assert worse["sets"]["frechet"] > 1 and worse["vae"] == report["vae"]


def load_vae():
    from sdlib.vae import AutoencoderKL
    return AutoencoderKL.from_pretrained(MODEL / "vae")


def test_matches_count_equal_captions_as_right():
    images = torch.eye(3, dtype=torch.float64)
    assert match(images, images) == {"clip score": 1.0, "own caption nearest": 100.0}
    texts = images[[0, 2, 1]]  # two captions exchanged
    assert match(images, texts)["own caption nearest"] == pytest.approx(33.3)
    same = images[[0, 0, 2]]
    assert match(same, same)["own caption nearest"] == 100.0


def test_the_judge_may_be_transformers_clip(own, tmp_path, clip, tokenizer):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=clip.text_config.to_dict() | {"vocab_size": len(tokenizer)},
        vision_config=clip.vision_config.to_dict(), projection_dim=32)
    theirs = transformers.CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    judge, words = load_judge(tmp_path / "clip", "cpu")
    x, captions = read_exam(own, 64, 8)
    images, texts = embed_pairs(judge, words, x, captions)
    with torch.no_grad():
        wanted = theirs(input_ids=words(captions), attention_mask=None,
                        pixel_values=clip_pixels(x, judge.vision_config))
    for got, theirs_are in ((images, wanted.image_embeds), (texts, wanted.text_embeds)):
        got = torch.nn.functional.normalize(got, dim=1)
        assert relative_error(got, theirs_are.double()) < 1e-5


def test_the_command_judges_by_a_folder(own, tmp_path, capsys):
    out, sheet = tmp_path / "report.json", tmp_path / "sheet.png"
    arguments = [str(MODEL), "--data", str(own), "--prompts", "6", "--steps", "1",
                 "--guidance", "1", "--device", "cpu", "--sheet", str(sheet)]
    metrics.main([*arguments, "--out", str(out)])
    report = json.loads(out.read_text())
    assert list(report) == ["steps", "guidance_scale", "data", "vae", "real", "painted",
                            "sets", "pictures"]
    assert report["data"] == "own" and report["pictures"] == 6 and sheet.stat().st_size > 1000
    assert report["painted"]["clip score"] < report["real"]["clip score"]
    assert json.loads((MODEL / "evaluation.json").read_text()) == SHIPPED
    options = metrics.make_parser().parse_args([*arguments, "--clip", str(MODEL)])
    options.model = str(tmp_path / "copy")
    (tmp_path / "copy").mkdir()
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"):
        (tmp_path / "copy" / part).symlink_to(MODEL / part)
    assert metrics.evaluate(options)["sets"] == report["sets"]
    assert (tmp_path / "copy" / "evaluation-own.json").is_file()
    options.clip = None
    with pytest.raises(FileNotFoundError, match="holds no image encoder.*--clip"):
        metrics.evaluate(options)


def test_broken_pictures_are_named(own, tmp_path):
    (tmp_path / "own").mkdir()
    for path in own.iterdir():
        (tmp_path / "own" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "own" / "3.png").write_bytes((own / "3.png").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"3\.png cannot be read"):
        read_exam(tmp_path / "own", 64, 8)


@pytest.mark.parametrize("arguments, message", [
    (["--data", "OWN", "--prompts", "4"], "error: 4 captioned pictures of "),
    (["--data", "nowhere"], "error: there is no folder of pictures 'nowhere'"),
    (["--data", "OWN", "--sets"], "error: --sets is for emoji scenes"),
    (["--clip", "somewhere"], "error: --sets is for emoji scenes")])
def test_errors_of_the_data_folder_are_one_line(arguments, message, own):
    words = [str(own) if word == "OWN" else word for word in arguments]
    with pytest.raises(SystemExit) as stop:
        metrics.main([str(MODEL), "--device", "cpu", *words])
    assert str(stop.value).startswith(message) and "\n" not in str(stop.value)


@pytest.mark.parametrize("arguments, message", [
    (["nowhere"], "error: there is no model folder 'nowhere'"),
    ([str(MODEL), "--prompts", "1"], "error: two prompts at least")])
def test_errors_are_one_line(arguments, message):
    with pytest.raises(SystemExit) as stop:
        metrics.main(arguments)
    assert str(stop.value).startswith(message) and "\n" not in str(stop.value)


def test_picture_k_has_seed_k(tmp_path):
    from sdlib import StableDiffusion

    pipe = StableDiffusion.from_pretrained(MODEL, device="cpu")
    captions = [scene(k, 1, "valid").caption for k in range(3)]
    whole = metrics.paint(pipe, captions, 1, 1.0, seed=5)
    parts = metrics.paint(pipe, captions, 1, 1.0, seed=5, batch_size=2)
    assert whole.shape == (3, 3, 64, 64) and float(whole.abs().max()) <= 1
    assert relative_error(parts, whole) < 1e-4
    last = metrics.paint(pipe, captions[2:], 1, 1.0, seed=7)
    assert relative_error(last[0], whole[2]) < 1e-4


@pytest.mark.full
def test_the_shipped_numbers_of_vae_and_clip_come_out_again(clip, tokenizer):
    from sdlib import AutoencoderKL

    chosen = accuracy.choose("valid", SHIPPED["vae"]["pictures"])
    vae = AutoencoderKL.from_pretrained(MODEL / "vae")
    for name, found in (("vae", metrics.judge_vae(vae, chosen)),
                        ("clip", metrics.judge_clip(clip, tokenizer, chosen))):
        for key, value in SHIPPED[name].items():
            assert found[key] == pytest.approx(value, abs=2.01 if "psnr" not in key else 0.02)


def test_the_module_names_no_inception():
    """Numbers from our encoder are not called FID or KID."""
    for name in distances.__all__ + metrics.__all__ + own_pictures.__all__:
        assert "fid" not in name.lower() and "kid" not in name.lower()
