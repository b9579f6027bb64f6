"""Chapter 13: weights, long prompts and clip-skip, alone and against diffusers."""

import pytest
import torch
from helpers import relative_error
from test_pipeline import FOX, TOLERANCE, ask, load_theirs, make_pipe

from sdlib import prompts as prompts_module
from sdlib.img2img import ImageToImage
from sdlib.inpainting import Inpainting
from sdlib.prompts import chunk_rows, encode_prompts, encode_weighted, weighted_rows
from sdlib.weights import parse_weights, weigh

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
LONG = "a large owl above a small bus, two red hearts on a green background, a pizza, " * 2
ROOM = 14                                          # of 16 tokens: begin and end


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


@pytest.fixture(scope="module")
def theirs(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "miniature"
    pipe.save_pretrained(path)
    return load_theirs(path)


def encode(pipe, *prompts, plain=False, **options):
    function = encode_prompts if plain else encode_weighted
    return function(pipe.tokenizer, pipe.text_encoder, prompts, **options)


# The notation -------------------------------------------------------------------------

@pytest.mark.parametrize("prompt, pieces", [
    ("a fox", [("a fox", 1)]), ("", []), ("()", []),
    ("a (red) fox", [("a ", 1), ("red", 1.1), (" fox", 1)]),
    ("((red))", [("red", 1.21)]), ("[red]", [("red", 1 / 1.1)]), ("([red])", [("red", 1)]),
    ("(red:1.3)", [("red", 1.3)]), ("(red: .5 )", [("red", 0.5)]), ("(red:0)", [("red", 0)]),
    ("(red:2.)fox", [("red", 2), ("fox", 1)]),
    ("(a (red:1.5) fox:2)", [("a ", 2), ("red", 3), (" fox", 2)]),
    ("((red:1.5) fox)", [("red", 1.65), (" fox", 1.1)]),
    ("(a:1.2)(b:1.2)c", [("ab", 1.2), ("c", 1)]),
    (r"\(red\) \[x\] (\(b\):2)", [("(red) [x] ", 1), ("(b)", 2)]),
    (r"(12\:30:1.2)", [("12:30", 1.2)]), (r"\\(red)", [("\\", 1), ("red", 1.1)]),
    (r"a \ b \n", [(r"a \ b \n", 1)]), ("at 12:30", [("at 12:30", 1)]),
    ("(one: (two) three)", [("one: ", 1.1), ("two", 1.21), (" three", 1.1)]),
    ("(two\nlines:1.5)", [("two\nlines", 1.5)]),
])
def test_the_notation(prompt, pieces):
    got = parse_weights(prompt)
    assert [text for text, _ in got] == [text for text, _ in pieces]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in pieces])


@pytest.mark.parametrize("prompt, message", [
    ("a (red fox", r"this '\(' is never closed, at character 3 of the prompt, near 'a \(red"),
    ("a [red fox", r"this '\[' is never closed, at character 3"),
    ("((a)", r"this '\(' is never closed, at character 1 "),
    ("a red) fox", r"this '\)' closes nothing, at character 6"),
    ("red:1.3)", r"this '\)' closes nothing, at character 8"),
    ("red]", r"this '\]' closes nothing, at character 4"),
    ("(red]", r"this '\]' stands where the '\(' of character 1 should be closed, at char.* 5"),
    ("[(a]:1)", r"this '\]' stands where the '\(' of character 2"),
    ("[red:1.3)", r"this '\)' stands where the '\[' of character 1"),
    ("(red:)", "a weight is a number from 0 up, .* not '', at character 5"),
    ("(red:much)", "not 'much', at character 5"), ("(red:1,3)", "not '1,3'"),
    ("(red:-1)", "from 0 up, .* not '-1'"), ("(red:nan)", "not 'nan'"),
    ("(red:1e9)", "not '1e9'"), ("(red:1.2.3)", "not '1.2.3'"),
    ("[red:0.5]", r"square brackets take no number: \(words:0.8\) lowers, at character 5"),
    ("(a red fox", "a backslash before a sign makes it plain text"),
])
def test_what_cannot_be_read_is_named_with_its_place(prompt, message):
    with pytest.raises(ValueError, match=message):
        parse_weights(prompt)


def test_an_escaped_text_comes_back():
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        signs = torch.randint(0, 9, (12,), generator=g)
        text = "".join("()[]:\\ ab"[k] for k in signs)
        escaped = "".join("\\" + c if c in "()[]:\\" else c for c in text)
        assert parse_weights(escaped) == [(text, 1.0)]


# Chunks -------------------------------------------------------------------------------

@pytest.mark.parametrize("count, chunks", [(0, 1), (1, 1), (14, 1), (15, 2), (28, 2), (43, 4)])
def test_rows_hold_all_ids(count, chunks, pipe):
    ids, weights = list(range(count)), [0.1 * k for k in range(count)]
    rows, scales = chunk_rows(pipe.tokenizer, ids, weights)
    assert rows.shape == scales.shape == (chunks, 16)
    assert (rows[:, 0] == pipe.tokenizer.bos_token_id).all() and (scales[:, 0] == 1).all()
    assert rows[:, 1:-1].flatten()[:count].tolist() == ids
    assert scales[:, 1:-1].flatten()[:count].tolist() == pytest.approx(weights)
    last = count - (chunks - 1) * ROOM
    assert (rows[:-1, -1] == pipe.tokenizer.eos_token_id).all()
    assert (rows[-1, 1 + last:] == pipe.tokenizer.eos_token_id).all()  # also the padding
    assert (scales[-1, 1 + last:] == 1).all() and (scales[:, -1] == 1).all()


def test_a_short_row_is_the_tokenizers(pipe):
    for text in ("", FOX, "a pizza"):
        rows, weights = weighted_rows(pipe.tokenizer, text)
        assert torch.equal(rows, pipe.tokenizer([text])) and (weights == 1).all()


def test_each_piece_of_text_has_its_weight(pipe):
    rows, weights = weighted_rows(pipe.tokenizer, "a (fox:1.5) and [a pizza]")
    plain, _ = weighted_rows(pipe.tokenizer, "a fox and a pizza")
    assert torch.equal(rows, plain)
    pieces = [("a", 1), ("fox", 1.5), ("and", 1), ("a pizza", 1 / 1.1)]
    expected = [w for text, w in pieces for _ in pipe.tokenizer.encode(text)]
    assert weights[0, 1:1 + len(expected)].tolist() == pytest.approx(expected)
    assert (weights[0, 1 + len(expected):] == 1).all() and weights[0, 0] == 1


# States -------------------------------------------------------------------------------

def test_weights_of_one_are_the_plain_states_to_the_bit(pipe):
    plain = encode(pipe, FOX, "", plain=True)
    assert torch.equal(encode(pipe, FOX, ""), plain)
    assert torch.equal(encode(pipe, FOX.replace("fox", "(fox:1)"), "(:1.0)"), plain)
    assert torch.equal(encode(pipe, FOX, clip_skip=1), encode(pipe, FOX, plain=True, clip_skip=1))


def test_a_weight_moves_its_own_states_along_a_line(pipe):
    plain, empty = encode(pipe, "a fox", "", plain=True)
    n = len(pipe.tokenizer.encode("a"))
    fox = slice(1 + n, 1 + n + len(pipe.tokenizer.encode("fox")))
    for w in (0.0, 0.5, 1.7):
        got, = encode(pipe, f"a (fox:{w})")
        assert relative_error(got[fox], w * plain[fox] + (1 - w) * empty[fox]) <= 1e-5
        rest = torch.ones(16, dtype=torch.bool)
        rest[fox] = False
        assert torch.equal(got[rest], plain[rest])


def test_a_chunk_has_the_states_of_the_same_words_alone(pipe):
    states, = encode(pipe, LONG)
    ids = pipe.tokenizer.encode(LONG)
    count = -(-len(ids) // ROOM)
    assert count >= 3 and states.shape == (count * 16, 32)
    begin, end = pipe.tokenizer.bos_token_id, pipe.tokenizer.eos_token_id
    for k in range(count):
        row = [begin, *ids[k * ROOM:(k + 1) * ROOM]]
        row += [end] * (16 - len(row))
        with torch.no_grad():
            alone = pipe.text_encoder(torch.tensor([row]))[0]
        assert relative_error(states[16 * k:16 * (k + 1)], alone) <= 1e-5


def test_shorter_prompts_are_repeated_to_one_length(pipe):
    two = " ".join(LONG.split()[:15])
    counts = [len(weighted_rows(pipe.tokenizer, text)[0]) for text in ("", two, LONG)]
    assert counts[:2] == [1, 2] and counts[2] >= 3
    both = encode(pipe, two, LONG, "")
    length = both.shape[1]
    for states, text in zip(both, (two, LONG, "")):
        alone, = encode(pipe, text)
        assert torch.equal(states, alone.repeat(length // len(alone), 1))


def test_the_unet_does_not_notice_repetition(pipe):
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    context = encode(pipe, FOX, LONG[:20], plain=True)
    with torch.no_grad():
        once = pipe.unet(z, 500, context)
        assert relative_error(pipe.unet(z, 500, context.repeat(1, 3, 1)), once) <= 1e-5
        padded = torch.cat([context, encode(pipe, "", "", plain=True)], dim=1)
        assert relative_error(pipe.unet(z, 500, padded), once) > 1e-3  # empty chunks: noticed


def test_without_weighted_a_prompt_is_literal_and_the_warning_says_so(pipe):
    assert not torch.equal(ask(pipe, "a (fox:1.5)"), ask(pipe, "a (fox:1.5)", weighted=True))
    with pytest.warns(UserWarning, match="this part is cut: .*weighted=True reads all of it"):
        ask(pipe, LONG)


# The pipeline against diffusers -------------------------------------------------------

def their_states(theirs, words):
    """Their tokenizer and encoder on [(text, weight), ...], chunks and weights by hand."""
    tokenizer, joined = theirs.tokenizer, []
    tokens = [(k, weight) for text, weight in words
              for k in tokenizer(text, add_special_tokens=False).input_ids]
    begin, end = (tokenizer.bos_token_id, 1.0), (tokenizer.eos_token_id, 1.0)
    with torch.no_grad():
        empty = theirs.text_encoder(torch.tensor([[begin[0]] + [end[0]] * 15]))[0]
        for k in range(0, len(tokens), ROOM):
            row = [begin, *tokens[k:k + ROOM]]
            row += [end] * (16 - len(row))
            states = theirs.text_encoder(torch.tensor([[k for k, _ in row]]))[0]
            weights = torch.tensor([weight for _, weight in row])[:, None]
            joined.append(weights * states + (1 - weights) * empty)
    return torch.cat(joined, dim=1)


def weighted_case(theirs):
    """A weighted prompt of two chunks, its negative of one, and their embeddings."""
    words = [("a", 1.0), ("fox to the left", 1.4), ("of a pizza, ", 1.0), ("two hearts", 0.6)]
    prompt = "a (fox to the left:1.4) of a pizza, (two hearts:0.6)"
    embeddings = their_states(theirs, words)
    assert embeddings.shape == (1, 32, 32)
    negative = their_states(theirs, [("a pizza", 1.3)]).repeat(1, 2, 1)
    return prompt, "(a pizza:1.3)", dict(prompt_embeds=embeddings,
                                         negative_prompt_embeds=negative)


def paint_weighted(pipe, prompt, negative, **options):
    return ask(pipe, prompt, negative_prompt=negative, seed=5, num_inference_steps=4,
               guidance_scale=4.0, weighted=True, **options)


def test_weighted_and_long_prompts_paint_what_diffusers_paints(pipe, theirs):
    prompt, negative, embeddings = weighted_case(theirs)
    expected = theirs(generator=[torch.Generator().manual_seed(5)], output_type="latent",
                      num_inference_steps=4, guidance_scale=4.0, **embeddings).images
    assert relative_error(paint_weighted(pipe, prompt, negative), expected) <= TOLERANCE


def test_long_and_short_prompts_paint_the_same_alone_and_in_a_batch(pipe):
    prompts, options = [LONG, FOX, "a (pizza:1.5)"], dict(weighted=True, negative_prompt="left of")
    together = ask(pipe, prompts, seed=4, **options)
    for k, prompt in enumerate(prompts):
        assert relative_error(together[k:k + 1], ask(pipe, prompt, seed=4 + k, **options)) <= 1e-5


def their_clip_skip(theirs, prompts, seeds, **options):
    """Their pipeline, with a negative prompt that is skipped like the prompt."""
    negative = theirs.encode_prompt([""] * len(prompts), "cpu", 1, False, clip_skip=1)[0]
    return theirs(prompts, negative_prompt_embeds=negative, clip_skip=1, output_type="latent",
                  generator=[torch.Generator().manual_seed(s) for s in seeds], **options).images


@pytest.mark.parametrize("w", [1.0, 4.0])
def test_clip_skip(w, pipe, theirs):
    options = dict(num_inference_steps=5, guidance_scale=w)
    expected = their_clip_skip(theirs, [FOX, "a pizza"], [5, 6], **options)
    got = ask(pipe, [FOX, "a pizza"], seed=5, clip_skip=1, **options)
    assert relative_error(got, expected) <= TOLERANCE
    assert relative_error(ask(pipe, [FOX, "a pizza"], seed=5, **options), expected) > 0.01
    theirs_only = theirs([FOX, "a pizza"], clip_skip=1, output_type="latent",
                         generator=[torch.Generator().manual_seed(s) for s in (5, 6)],
                         **options).images         # skips nothing in the negative prompt
    assert (relative_error(theirs_only, expected) > 0.01) is (w > 1)


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_clip_skip_of_edits(kind, pipe, theirs):
    x = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32).contiguous()
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:20, 10:] = 1
    negative = theirs.encode_prompt([""], "cpu", 1, False, clip_skip=1)[0]
    name, more = {"image": ("Img2Img", {}), "mask": ("Inpaint", dict(
        mask_image=mask, height=32, width=32))}[kind]
    reference = getattr(diffusers, f"StableDiffusion{name}Pipeline")(
        **theirs.components, requires_safety_checker=False)
    reference.set_progress_bar_config(disable=True)
    options = dict(strength=0.7, guidance_scale=3.0, num_inference_steps=6)
    expected = reference(FOX, image=(x + 1) / 2, negative_prompt_embeds=negative, clip_skip=1,
                         generator=[torch.Generator().manual_seed(5)], output_type="latent",
                         **more, **options).images
    ours = ImageToImage if kind == "image" else Inpainting
    pictures = (x,) if kind == "image" else (x, mask)
    got = ours.from_pipe(pipe)(FOX, *pictures, seed=5, output_type="latent", progress=False,
                               clip_skip=1, **options)
    assert relative_error(got, expected) <= TOLERANCE


@pytest.mark.parametrize("options, message", [
    (dict(clip_skip=2), "clip_skip must be 0 to 1"), (dict(clip_skip=-1), "must be 0 to 1"),
    (dict(clip_skip=1.0), "clip_skip is a number of layers"), (dict(clip_skip=True), "layers"),
    (dict(prompt="(a", weighted=True), "never closed"),
    (dict(negative_prompt="a)", weighted=True), "closes nothing"),
])
def test_bad_requests_stop_before_any_work(options, message, pipe):
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        ask(pipe, **options)
    hook.remove()
    assert not calls


# Planted traps ------------------------------------------------------------------------

def multiplied(patch):
    patch.setattr(prompts_module, "weigh", lambda states, weights, empty:
                  states * weights[..., None])


def weights_one_place_late(patch):
    patch.setattr(prompts_module, "weigh", lambda states, weights, empty: weigh(
        states, weights.roll(1, 1), empty))


def from_the_first_state(patch):
    patch.setattr(prompts_module, "weigh", lambda states, weights, empty: weigh(
        states, weights, empty[:, :1]))


def one_begin_and_end(patch):
    right = prompts_module.chunk_rows

    def rows(tokenizer, ids, weights=()):
        made, scales = right(tokenizer, ids, weights)
        made[1:, 0] = tokenizer.eos_token_id
        return made, scales
    patch.setattr(prompts_module, "chunk_rows", rows)


def lost_end(patch):
    right = prompts_module.weighted_rows
    patch.setattr(prompts_module, "weighted_rows", lambda *a: tuple(
        x[:1].expand(2, -1) for x in right(*a)))


def factor_of_one_bracket(patch):
    right = prompts_module.parse_weights
    patch.setattr(prompts_module, "parse_weights", lambda text: [
        (piece, 1.1 if weight > 1 else weight) for piece, weight in right(text)])


@pytest.mark.parametrize("trap", [multiplied, weights_one_place_late, from_the_first_state,
                                  one_begin_and_end, lost_end, factor_of_one_bracket],
                         ids=lambda trap: trap.__name__)
def test_planted_trap_is_noticed(trap, pipe, theirs, monkeypatch):
    prompt, negative, embeddings = weighted_case(theirs)
    expected = theirs(generator=[torch.Generator().manual_seed(5)], output_type="latent",
                      num_inference_steps=4, guidance_scale=4.0, **embeddings).images
    trap(monkeypatch)
    assert relative_error(paint_weighted(pipe, prompt, negative), expected) > 10 * TOLERANCE


@pytest.mark.parametrize("trap", ["no norm", "one too many", "prompt only"])
def test_a_wrong_clip_skip_is_noticed(trap, theirs, monkeypatch):
    pipe = make_pipe()
    encoder = pipe.text_encoder
    options = dict(num_inference_steps=4, guidance_scale=3.0)
    expected = their_clip_skip(theirs, [FOX], [5], **options)
    assert relative_error(ask(pipe, seed=5, clip_skip=1, **options), expected) <= TOLERANCE
    right = encoder.forward
    if trap == "no norm":
        monkeypatch.setattr(encoder.final_layer_norm, "forward", lambda x: x)
    elif trap == "one too many":
        monkeypatch.setattr(encoder, "forward", lambda ids, clip_skip=0: right(ids))
    else:
        def forward(ids, clip_skip=0):
            return torch.cat([right(ids[:1], clip_skip), right(ids[1:])])
        monkeypatch.setattr(encoder, "forward", forward)
    assert relative_error(ask(pipe, seed=5, clip_skip=1, **options), expected) > 10 * TOLERANCE
