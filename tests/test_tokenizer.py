"""sdlib.tokenizer against transformers' CLIPTokenizer, properties, files and bad input."""

import json
import random
import time
import unicodedata
import warnings

import pytest
import torch

from sdlib import tokenizer as module
from sdlib.tokenizer import (
    BOS,
    EOS,
    Tokenizer,
    bpe,
    bytes_to_unicode,
    make_vocab,
    merge_pair,
    normalize,
    pretokenize,
    to_symbols,
    train_bpe,
)

transformers = pytest.importorskip("transformers")

EXAMPLE = "a fox to the left of a pizza, blue background"


@pytest.fixture(scope="module")
def clip():
    return Tokenizer.clip()


@pytest.fixture(scope="module")
def folder(clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    clip.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(folder):
    """transformers' own class, from the folder that ours has written."""
    return transformers.CLIPTokenizer.from_pretrained(folder)


# ------------------------------------------------------------------------- the strings
PIECES = {
    "words": "a fox to the left of pizza background Painting unbelievably café naïve "
             "Ångström DON'T we'll I'd they've 3D 1999 0.5 C++ e-mail x² don’t".split(),
    "emoji": "🦊 🍕 👩‍🚀 🏳️‍🌈 👍🏽 ☃️ 🇫🇷 ❤️ 😀😃 1️⃣".split(),
    "scripts": "日本語 狐とピザ 你好，世界 한국어 мир Ελλάδα ΣΟΦΟΣ שלום مرحبا हिन्दी ไทย "
               "ẞ ǅ İstanbul ﬁne Ⅷ ½ ① ㍿".split(),
    "accents": ["cafe\u0301", "A\u030angstro\u0308m", "ñ", "n\u0303", "o\u0308\u0323",
                "\u1e9b\u0323", "\uac00", "\u1100\u1161", "ı\u0307"],
    "html": ["&amp;", "&lt;b&gt;", "&#39;", "&nbsp;", "&quot;x&quot;", "<br/>", "&amp;amp;"],
    "odd": ["“smart”", "‘quotes’", "ＦＵＬＬ ｗｉｄｔｈ", "â€œmojibakeâ€\x9d", "schÃ¶n", "…", "—",
            "\u200b", "\u200d", "\ufeff", "\ufffd", "\x00", "\x1c", "\x7f", "\u00ad", "\\n",
            "''s", "'S", "!'s", "'t's'd", "___", "<|", "|>", "</w>", "a</w>b", "#version: 0.2"],
    "special": [BOS, EOS, "<|STARTOFTEXT|>", "<|EndOfText|>", "!!<|endoftext|>??",
                "<|startoftext", "endoftext|>"],
}
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2028", "\u0085", "", ", "]


def assigned(rng):
    """A random character that all Unicode versions since 14 know."""
    while True:
        character = chr(rng.choice([rng.randrange(0x250), rng.randrange(0x3000),
                                    rng.randrange(0x110000)]))
        if unicodedata.category(character) not in ("Cn", "Cs"):
            return character


def strings():
    """A thousand varied strings and more, the same on every machine."""
    rng = random.Random(8)
    every = [piece for pieces in PIECES.values() for piece in pieces]
    found = ["", " ", "\n\t ", EXAMPLE, EXAMPLE.upper(), "a" * 5000, "fox " * 2000, "🦊" * 700,
             "".join(map(chr, range(256))), " ".join(every), "".join(every)] + every
    for group in PIECES.values():
        for _ in range(80):
            found.append(rng.choice(SPACES).join(rng.choices(group, k=rng.randint(1, 8))))
    for _ in range(400):
        found.append("".join(rng.choice(every) + rng.choice(SPACES)
                             for _ in range(rng.randint(1, 15))))
    for _ in range(300):
        found.append("".join(assigned(rng) for _ in range(rng.randint(1, 40))))
    for _ in range(20):
        found.append("".join(rng.choice("abcdefghij lmnop") for _ in range(3000)))
    return found


TEXTS = strings()


def test_the_strings_are_varied():
    assert len(set(TEXTS)) > 1000
    assert {len(text) > 1000 for text in TEXTS} == {True, False}


# ------------------------------------------------------------------ equal to transformers
def test_encode_equals_transformers(clip, reference):
    for text in TEXTS:
        want = reference(text, add_special_tokens=False).input_ids
        assert clip.encode(text) == want, repr(text)


def test_rows_equal_transformers(clip, reference):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for length in (77, 32, 5, 2):
            ours = clip(TEXTS, max_length=length)
            theirs = reference(TEXTS, padding="max_length", truncation=True,
                               max_length=length, return_tensors="pt").input_ids
            assert ours.shape == (len(TEXTS), length) and ours.dtype == torch.int64
            assert torch.equal(ours, theirs)


def test_decode_equals_transformers(clip, reference):
    for text in TEXTS:
        ids = clip.encode(text)
        for skip in (True, False):
            ours = clip.decode([clip.bos_token_id, *ids, clip.eos_token_id], skip)
            theirs = reference.decode([clip.bos_token_id, *ids, clip.eos_token_id],
                                      skip_special_tokens=skip)
            assert ours == theirs, repr(text)
    rng = random.Random(0)
    for _ in range(300):                    # bytes that are no UTF-8 included
        ids = [rng.randrange(len(clip)) for _ in range(rng.randint(1, 12))]
        assert clip.decode(ids, False) == reference.decode(ids), ids
        assert clip.decode(torch.tensor(ids)) == reference.decode(ids, skip_special_tokens=True)


def test_every_character_of_the_first_plane(clip, reference):
    """Each assigned character between two letters: classes, case and normal form agree."""
    characters = [c for c in map(chr, range(0x10000))
                  if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    characters = [c for c in characters if not "\u4e00" <= c <= "\u9fff" or ord(c) % 16 == 0]
    characters = [c for c in characters if not "\uac00" <= c <= "\ud7a3" or ord(c) % 16 == 0]
    texts = [f"a{c}b" for c in characters]
    for text, want in zip(texts, reference(texts, add_special_tokens=False).input_ids):
        assert clip.encode(text) == want, ascii(text)


def test_the_convention_is_transformers_not_openais(clip):
    """openai/CLIP repairs mojibake and HTML entities before it encodes; we do not."""
    assert clip.decode(clip.encode("fish &amp; chips")) == "fish & amp ; chips"
    assert clip.decode(clip.encode("“smart”")) == "“ smart ”"
    assert clip.decode(clip.encode("schÃ¶n")) == "schã ¶ n"
    assert clip.decode(clip.encode("ＦＯＸ")) == "ｆｏｘ"
    assert clip.decode(clip.encode("ΣΟΦΟΣ")) == "σοφοσ"          # str.lower gives σοφος
    assert clip.encode("cafe\u0301") == clip.encode("café")       # NFC


def test_known_ids(clip):
    row = clip(EXAMPLE)[0].tolist()
    assert row[:13] == [49406, 320, 3240, 531, 518, 1823, 539, 320, 4474, 267, 1746, 5994, 49407]
    assert set(row[13:]) == {49407}, "Stable Diffusion 1.x pads with the end token"
    assert len(clip) == 49_408 and len(clip.merges) == 48_894
    assert (clip.bos_token_id, clip.eos_token_id, clip.pad_token_id) == (49406, 49407, 49407)
    assert clip("")[0].tolist() == [49406] + [49407] * 76


# --------------------------------------------------------------------- planted mistakes
MISTAKES = {
    "no end of word": lambda m: m.setattr(module, "END_OF_WORD", ""),
    "no lower case": lambda m: m.setattr(
        module, "normalize", lambda text: unicodedata.normalize("NFC", text)),
    "no NFC": lambda m: m.setattr(module, "normalize", lambda text: text.lower()),
    "NFKC": lambda m: m.setattr(
        module, "normalize", lambda text: unicodedata.normalize("NFKC", text).lower()),
    "lower case of whole words": lambda m: m.setattr(
        module, "normalize", lambda text: unicodedata.normalize("NFC", text).lower()),
    "numbers in one piece": lambda m: m.setattr(module, "_PARTS", module.regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+")) or m.setattr(
        module, "_WORDS", module._PARTS),
    "ASCII letters only": lambda m: m.setattr(module, "_WORDS", module.regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")),
    "split at spaces": lambda m: m.setattr(
        module, "pretokenize", lambda text: normalize(text).split()),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_noticed(clip, reference, monkeypatch, name):
    MISTAKES[name](monkeypatch)
    broken = Tokenizer(clip.vocab, clip.merges)
    wrong = sum(broken.encode(text) != reference(text, add_special_tokens=False).input_ids
                for text in TEXTS)
    assert wrong >= 1


@pytest.mark.parametrize("pad", [0, 49406])
def test_other_padding_is_noticed(clip, reference, pad):
    """SD 2 pads with "!", id 0; with SD 1.x that is a different prompt."""
    row = clip(EXAMPLE)[0]
    row[13:] = pad
    want = reference(EXAMPLE, padding="max_length", max_length=77, return_tensors="pt")
    assert not torch.equal(row, want.input_ids[0])


# ----------------------------------------------------------------------------- training
CORPUS = [f"a {size} {what} {where} a {other}, {color} background"
          for size in ("small", "large") for what in ("fox", "pizza", "hedgehog", "rocket")
          for other in ("star", "strawberry", "octopus")
          for where in ("to the left of", "above", "below") for color in ("blue", "green")]


def train_slowly(texts, count):
    """The definition, with no bookkeeping: count all pairs anew for each merge."""
    words = {}
    for text in texts:
        for word in pretokenize(text):
            words[word] = words.get(word, 0) + 1
    split = {word: to_symbols(word) for word in words}
    merges = []
    for _ in range(count):
        pairs = {}
        for word, symbols in split.items():
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] = pairs.get(pair, 0) + words[word]
        best = sorted(pairs, key=lambda pair: (-pairs[pair], pair))[0]
        merges.append(best)
        split = {word: merge_pair(symbols, best) for word, symbols in split.items()}
    return merges


def test_training_equals_the_definition():
    vocab, merges = train_bpe(CORPUS, 514 + 60)
    assert merges == train_slowly(CORPUS, 60)
    assert len(vocab) == 514 + 60 and sorted(vocab.values()) == list(range(len(vocab)))
    assert vocab[BOS] == len(vocab) - 2 and vocab[EOS] == len(vocab) - 1


def test_training_ends_when_nothing_repeats():
    vocab, merges = train_bpe(["ab ab cd"], 1000)
    assert merges == [("a", "b</w>")] and len(vocab) == 515
    vocab, merges = train_bpe(["ab ab cd"], 1000, min_count=1)
    assert merges == [("a", "b</w>"), ("c", "d</w>")]
    assert train_bpe([], 1000)[1] == []


def test_training_with_overlaps_and_ties():
    assert train_bpe(["aaaa aaaa"], 515)[1] == [("a", "a")]
    assert train_bpe(["zz zz bb bb"], 515)[1] == [("b", "b</w>")]     # a tie: sorts first


def test_training_is_quick_and_does_not_depend_on_order():
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(3000)]
    texts = [" ".join(rng.choices(words, k=8)) for _ in range(5000)]
    start = time.process_time()
    first = train_bpe(texts, 1000)
    assert time.process_time() - start < 10
    rng.shuffle(texts)
    assert train_bpe(iter(texts), 1000) == first


def test_trained_folder_works_in_transformers(tmp_path):
    ours = Tokenizer(*train_bpe(CORPUS, 600), model_max_length=32)
    ours.save_pretrained(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == 32 and len(theirs) == len(ours)
    assert theirs.pad_token_id == ours.pad_token_id == ours.eos_token_id
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine = ours(TEXTS)
    assert mine.shape == (len(TEXTS), 32)
    want = theirs(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(mine, want)


# ------------------------------------------------------------------------------ merging
def merge_in_loops(symbols, ranks):
    """The usual loop: find the best pair, merge it everywhere, start again."""
    while len(symbols) > 1:
        best = min(zip(symbols, symbols[1:]), key=lambda pair: ranks.get(pair, 10**9))
        if best not in ranks:
            break
        symbols = merge_pair(symbols, best)
    return list(symbols)


def test_heap_equals_loop(clip):
    rng = random.Random(1)
    for _ in range(300):
        word = "".join(rng.choices("abcdeilnorstäé漢🦊", k=rng.randint(1, 30)))
        assert bpe(to_symbols(word), clip.ranks) == merge_in_loops(to_symbols(word), clip.ranks)


def test_a_huge_word_takes_no_time(clip):
    rng = random.Random(2)
    word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=50_000))
    start = time.process_time()
    assert len(clip.encode(word)) > 10_000
    assert time.process_time() - start < 3


def test_round_trip(clip):
    for tokenizer in (clip, Tokenizer(*train_bpe(CORPUS, 600))):
        for text in TEXTS:
            if any(special in text.lower() for special in (BOS, EOS, "</w>")):
                continue
            words = pretokenize(text)
            assert tokenizer.decode(tokenizer.encode(text)) == " ".join(words).strip()


def test_bytes_table():
    table = bytes_to_unicode()
    assert sorted(table) == list(range(256)) and len(set(table.values())) == 256
    assert table[ord("a")] == "a" and table[0x20] == "Ġ" and table[0] == "Ā"
    assert not any(character.isspace() for character in table.values())


# -------------------------------------------------------------------------------- files
def test_folders(clip, folder, reference, tmp_path):
    again = Tokenizer.from_pretrained(folder)
    assert again.vocab == clip.vocab and again.merges == clip.merges
    assert again.model_max_length == 77 and again.pad_token == EOS
    reference.save_pretrained(tmp_path)                   # transformers 5: tokenizer.json
    assert not (tmp_path / "vocab.json").exists()
    third = Tokenizer.from_pretrained(tmp_path)
    assert third.vocab == clip.vocab and third.merges == clip.merges
    assert third.model_max_length == 77 and third.pad_token == EOS
    assert json.loads((folder / "vocab.json").read_text())["<|endoftext|>"] == 49407


def test_sd15_folder_with_described_tokens(clip, folder, tmp_path):
    """SD 1.5's own tokenizer_config.json writes the special tokens as objects."""
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    token = {"__type": "AddedToken", "content": EOS, "lstrip": False, "normalized": True,
             "rstrip": False, "single_word": False}
    config = {"add_prefix_space": False, "bos_token": {**token, "content": BOS},
              "do_lower_case": True, "eos_token": token, "errors": "replace",
              "model_max_length": 77, "pad_token": token, "tokenizer_class": "CLIPTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_pretrained(tmp_path).encode(EXAMPLE) == clip.encode(EXAMPLE)
    (tmp_path / "tokenizer_config.json").unlink()         # a folder may lack it
    assert Tokenizer.from_pretrained(tmp_path).model_max_length == 77


def test_sd2_pads_with_an_exclamation_mark(clip, tmp_path):
    ours = Tokenizer(clip.vocab, clip.merges, pad_token="!")
    ours.save_pretrained(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    texts = [EXAMPLE, "wow! such fox!!", "", "! a"]
    want = theirs(texts, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ours(texts), want)
    assert ours.pad_token_id == 0 and Tokenizer.from_pretrained(tmp_path).pad_token == "!"


# ---------------------------------------------------------------------------- bad input
def test_too_long_is_said(clip):
    with pytest.warns(UserWarning, match=r"2 tokens too long for 6 tokens.*'a pizza'"):
        row = clip("a fox left of a pizza", max_length=6)
    assert row[0].tolist() == [49406, *clip.encode("a fox left of"), 49407]
    with pytest.warns(UserWarning, match="tokens too long for 77"):
        clip("fox " * 76)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clip("fox " * 75).shape == (1, 77)


def test_the_warning_is_short(clip):
    with pytest.warns(UserWarning) as caught:
        clip("fox " * 10_000)
    assert len(str(caught[0].message)) < 400 and caught[0].filename == __file__


def test_shapes(clip):
    assert clip([]).shape == (0, 77)
    assert clip(["a", "b"], max_length=9).shape == (2, 9)
    assert clip(("a", "b")).shape == (2, 77)


def test_errors(clip, tmp_path):
    for bad in (3, None, b"fox"):
        with pytest.raises(TypeError, match="reads strings"):
            clip.encode(bad)
    with pytest.raises(TypeError, match="reads strings, got int"):
        clip(["a fox", 7])
    with pytest.raises(TypeError, match="a string or a list of strings, got NoneType"):
        clip(None)
    with pytest.raises(ValueError, match="at least 2"):
        clip("a fox", max_length=1)
    with pytest.raises(ValueError, match="no token has the id 49408"):
        clip.decode([320, 49408])
    with pytest.raises(ValueError, match="lacks"):
        Tokenizer({"a": 0}, [])
    with pytest.raises(ValueError, match="at least 515"):
        train_bpe(CORPUS, 514)
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="list of texts"):
        train_bpe("one string", 600)


def test_foreign_vocabularies_fall_back_to_the_end_token():
    """A vocabulary without all bytes: an unknown symbol counts as the end token."""
    vocab = {"a": 0, "a</w>": 1, BOS: 2, EOS: 3}
    assert Tokenizer(vocab, []).encode("aab") == [0, 0, 3]


def test_lone_surrogates_do_not_crash(clip):
    assert clip.decode(clip.encode("fox \ud83e")) == "fox ?"


def test_vocab_with_two_ways_to_one_token():
    assert make_vocab([("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")])[EOS] == 514 - 1 + 3
