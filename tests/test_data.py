"""Data: sample k is f(seed, k), stored pictures become the right pixels, hostile files only raise errors.

Run: python -m pytest tests/test_data.py   (CPU, 10 s)
"""
import gzip
import io
import json
import os
import random
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import scenes
from data import GeneratedScenes, ImageText, TextFiles, Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")         # pytest resets the filter that data.py sets

CAPTION = "a large red circle above a small blue square on a gray background"


def picture(size=(8, 8), color=(200, 10, 60)) -> Image.Image:
    return Image.new("RGB", size, color)


def stored(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def imagefolder(folder: Path, n: int = 6, table: str = "metadata.jsonl", key: str = "file_name") -> Path:
    """Picture i is of the gray level 10 i and has the caption "picture i"."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        picture(color=(10 * i,) * 3).save(folder / f"{i}.png")
    rows = [json.dumps({key: f"{i}.png", "text": f"picture {i}"}) for i in range(n)]
    (folder / table).write_text("\n".join(rows) + "\n")
    return folder


def shard(path: Path, members: list[tuple], format=tarfile.PAX_FORMAT) -> Path:
    """A tar of (name, bytes) or (name, None, type, link target)."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, raw, *link in members:
            info = tarfile.TarInfo(name)
            if link:
                info.type, info.linkname = link
            info.size = len(raw or b"")
            tar.addfile(info, io.BytesIO(raw or b""))
    return path


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) > 30
    return message


# ----------------------------------------------------------------------------------------------- randomness
def test_rng_is_a_function_of_seed_number_and_purpose():
    draw = lambda *key: data.rng(*key).integers(1 << 62)
    assert draw(3, 5, data.NOISE) == draw(3, 5, data.NOISE)
    keys = [(seed, k, purpose) for seed in range(3) for k in range(50) for purpose in range(16)]
    assert len({draw(*key) for key in keys}) == len(keys)
    plain = np.random.Generator(np.random.Philox(key=[7 * 64 + data.DROP, 5]))
    assert np.array_equal(data.rng(7, 5, data.DROP).integers(1 << 62, size=9), plain.integers(1 << 62, size=9))
    with pytest.raises(ValueError, match=">= 0"):
        data.rng(-1, 0, data.TASK)


def test_epochs_are_permutations():
    epochs = [[data.order(7, epoch * 50 + i, 50) for i in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert data.order(7, 120, 50) == epochs[2][20]


# ----------------------------------------------------------------------------------------------- tokenizer
@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(scenes.corpus(np.random.default_rng(0), 1000), 512)


def test_tokenizer_gives_a_word_with_its_space_one_token(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("a red circle")] == ["a", " red", " circle"]
    assert len(tokenizer.encode(CAPTION)) == len(CAPTION.split())


def test_tokenizer_round_trips_any_text(tokenizer):
    everything = "".join(chr(i) for i in range(0x20000) if not 0xD800 <= i < 0xE000)
    assert tokenizer.decode(tokenizer.encode(everything)) == everything
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices("ab \n\t'é漢😀\u0301\u3000\0.!1२", k=draw.randrange(40)))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for run in ("a", " ", "\n", "!", "漢", "9"):
        assert tokenizer.decode(tokenizer.encode(run * 100_000)) == run * 100_000


def test_no_text_spells_the_end_token(tokenizer):
    assert tokenizer.end == tokenizer.n_vocab - 1
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.end not in ids and tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([*tokenizer.encode("a red"), tokenizer.end, *ids]) == "a red"
    assert tokenizer.decode([0xFF, 10**6]) == "\ufffd\ufffd"


def test_bpe_merges_the_most_frequent_pair_first():
    tokenizer = Tokenizer.train(["abab abab cd cd cd xy"], 300)
    tokens = [tokenizer.decode([i]) for i in range(256, tokenizer.end)]
    assert tokens == ["ab", " c", " cd", "abab"]                # 4, 3, 3, 2 times; nothing else occurs twice
    assert tokenizer.n_vocab == 256 + len(tokens) + 1


def test_bpe_is_the_naive_algorithm():
    draw = random.Random(1)
    text = " ".join("".join(draw.choice("abc") for _ in range(draw.randrange(1, 9))) for _ in range(300))
    words = [list(word.encode()) for word in data.regex.findall(data.PATTERN, text)]
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < 320:
        pairs = data.Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        token = tokens[best[0]] + tokens[best[1]]
        if token not in tokens:
            tokens.append(token)
        words = [data._merge(word, best, tokens.index(token)) for word in words]
    trained = Tokenizer.train([text], 321).to_dict()["tokens"]
    assert [token.encode("latin-1") for token in trained] == tokens


def test_tokenizer_state_is_plain_and_checked(tokenizer):
    state = json.loads(json.dumps(tokenizer.to_dict()))
    again = Tokenizer.from_dict(state)
    assert again.encode(CAPTION) == tokenizer.encode(CAPTION) and again.end == tokenizer.end
    tokens = state["tokens"]
    for bad in (None, [], {}, {"name": "bpe"}, {"name": "bpe", "tokens": 3}, {"name": "no such encoding"},
                {"name": "bpe", "tokens": tokens[1:]}, {"name": "bpe", "tokens": tokens + [tokens[-1]]},
                {"name": "bpe", "tokens": tokens + [""]}, {"name": "bpe", "tokens": tokens + ["漢"]},
                {"name": "bpe", "tokens": tokens + [7]}):
        with pytest.raises(ValueError) as error:
            Tokenizer.from_dict(bad)
        one_line(error)
    with pytest.raises(ValueError, match="257"):
        Tokenizer.train(["a"], 256)


def test_named_encoding_that_cannot_be_fetched(monkeypatch):
    def offline(name):
        raise ConnectionError("no\nroute")
    monkeypatch.setattr(data.tiktoken, "get_encoding", offline)
    with pytest.raises(OSError, match="cl100k_base.*TIKTOKEN_CACHE_DIR") as error:
        Tokenizer.named("cl100k_base")
    one_line(error)


def test_pad_to_multiple():
    assert data.pad_to_multiple([1, 2, 3], 4, 9) == [1, 2, 3, 9]
    assert data.pad_to_multiple([1, 2, 3, 4], 4, 9) == [1, 2, 3, 4, 9, 9, 9, 9]
    assert data.pad_to_multiple([1, 2, 3, 4], 4, 9, ended=False) == [1, 2, 3, 4]
    assert data.pad_to_multiple([1, 2, 3], 2, 9, ended=False) == [1, 2, 3, 9]
    assert data.pad_to_multiple([], 2, 9, ended=False) == []


# ---------------------------------------------------------------------------------------- generated scenes
def test_generated_samples_depend_on_seed_and_number_alone():
    first, again, other = (GeneratedScenes(seed, pool=50) for seed in (1, 1, 2))
    for task in ("t2t", "t2i", "it2t"):
        forwards = [getattr(first, task)(k) for k in range(40)]
        assert forwards == [getattr(again, task)(k) for k in reversed(range(40))][::-1]
        assert forwards != [getattr(other, task)(k) for k in range(40)]
    assert all((a == b).all() for a, b in zip(first.images(range(50)), again.images(range(50))))


def test_generated_samples_are_true_of_their_picture():
    world, asked = GeneratedScenes(3, size=(32, 48), pool=100, any_order=0.5), 0
    assert world.image_hw(0) == (32, 48) and world.images([0])[0].shape == (32, 48, 3)
    for k in range(100):
        caption, index = world.t2i(k)
        assert scenes.is_exact(scenes.read_caption(caption), world.scene_of(index))
        prompt, index, answer = world.it2t(k)
        if prompt in data.DESCRIBE:
            assert scenes.is_exact(scenes.read_caption(answer), world.scene_of(index))
        else:
            asked += 1
            assert scenes.check_answer(world.scene_of(index), prompt, answer)
        assert world.t2t(k).endswith(".")
    assert 30 < asked < 70
    with pytest.raises(ValueError, match="pool"):
        GeneratedScenes(0, pool=0)


def test_heldout_scenes_are_held_out():
    seen, heldout = GeneratedScenes(0, pool=200), GeneratedScenes(0, pool=200, heldout=True)
    assert not any(scenes.is_heldout(seen.scene_of(i).objects) for i in range(200))
    assert all(scenes.is_heldout(heldout.scene_of(i).objects) for i in range(200))


# -------------------------------------------------------------------------------------------------- pixels
def decoded(raw: bytes, size=(8, 8)) -> np.ndarray:
    pixels = data.decode(raw, [size])
    assert pixels.shape == (*size, 3) and pixels.dtype == np.uint8
    return pixels


def gray16(*levels: int) -> Image.Image:
    return Image.fromarray(np.resize(np.array(levels, np.uint16), (8, 8)))


half_red = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
palette = Image.new("P", (8, 8), 1)
palette.putpalette([0, 0, 0, 10, 200, 30])

MODES = {
    "1": (stored(Image.new("1", (8, 8), 1)), (255, 255, 255)),
    "L": (stored(Image.new("L", (8, 8), 77)), (77, 77, 77)),
    "L transparent colour": (stored(Image.new("L", (8, 8), 77), transparency=77), (255, 255, 255)),
    "LA": (stored(Image.new("LA", (8, 8), (0, 51))), (204, 204, 204)),
    "RGB": (stored(picture()), (200, 10, 60)),
    "RGB transparent colour": (stored(picture(), transparency=(200, 10, 60)), (255, 255, 255)),
    "RGBA": (stored(half_red), (255, 127, 127)),
    "RGBA webp": (stored(half_red, "WEBP", lossless=True), (255, 127, 127)),
    "RGBA tiff": (stored(half_red, "TIFF"), (255, 127, 127)),
    "P": (stored(palette), (10, 200, 30)),
    "P transparent": (stored(palette, transparency=1), (255, 255, 255)),
    "P alphas": (stored(palette, transparency=bytes([0, 0])), (255, 255, 255)),
    "P gif": (stored(palette, "GIF"), (10, 200, 30)),
    "CMYK jpeg": (stored(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
    "CMYK tiff": (stored(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF"), (0, 255, 255)),
    "YCbCr jpeg": (stored(picture(color=(90, 90, 90)), "JPEG", quality=100), (90, 90, 90)),
    "YCbCr tiff": (stored(Image.new("YCbCr", (8, 8), (128, 128, 128)), "TIFF"), (128, 128, 128)),
    "LAB tiff": (stored(Image.new("LAB", (8, 8), (255, 128, 128)), "TIFF"), (255, 255, 255)),
    "I;16": (stored(gray16(25700)), (100, 100, 100)),
    "I;16 transparent": (stored(gray16(25700), transparency=25700), (255, 255, 255)),
    "I;16 tiff": (stored(gray16(25700), "TIFF"), (100, 100, 100)),
    "I;16B tiff": (struct.pack(">2sHI", b"MM", 42, 8) + struct.pack(">H", 8) + b"".join(
        struct.pack(">HHI", tag, 4, 1) + struct.pack(">I", value) for tag, value in
        [(256, 8), (257, 8), (258, 16), (259, 1), (262, 1), (273, 110), (278, 8), (279, 128)])
        + bytes(4) + struct.pack(">H", 25700) * 64, (100, 100, 100)),
    "I pgm": (b"P5 8 8 65535 " + struct.pack(">H", 25700) * 64, (100, 100, 100)),
    "F tiff": (stored(Image.new("F", (8, 8), 0.4), "TIFF"), (102, 102, 102)),
    "F tiff of 255": (stored(Image.new("F", (8, 8), 40.0), "TIFF"), (40, 40, 40)),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb(name):
    raw, color = MODES[name]
    assert np.abs(decoded(raw).astype(int) - color).max() <= 1


def test_16_bit_gray_keeps_its_gradient():
    levels = decoded(stored(gray16(*range(0, 65536, 1024))))[..., 0].ravel()
    assert np.array_equal(levels, np.round(np.arange(0, 65536, 1024) / 257))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(kind):
    frames = [picture(color=color) for color in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]]
    options = {"lossless": True} if kind == "WEBP" else {}
    raw = stored(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(raw)).n_frames == 3
    assert (decoded(raw) == (255, 0, 0)).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    quadrants = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    seen = quadrants.repeat(16, 0).repeat(32, 1)          # (32, 64, 3), as a viewer must see it
    undo = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
            5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 1),
            7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}[kind]
    raw = stored(Image.fromarray(np.ascontiguousarray(undo(seen))), kind, exif=exif, **options)
    shapes = [(64, 32), (48, 48), (32, 64)]
    assert data.decode(raw, shapes, header_only=True) == (32, 64)
    pixels = data.decode(raw, shapes).astype(int)
    assert np.abs(pixels[4:-4:8, 4:-4:8] - seen.astype(int)[4:-4:8, 4:-4:8]).max() < 8


def test_scaling_crops_the_centre_and_keeps_the_aspect():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 250                                        # the centre square
    assert (decoded(stored(Image.fromarray(wide)), (10, 10)) > 200).all()
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    assert np.array_equal(decoded(stored(Image.fromarray(noise))), noise)       # of that size: untouched
    big = stored(picture((2000, 1000)), "JPEG")
    assert np.abs(decoded(big, (16, 16)).astype(int) - (200, 10, 60)).max() < 4


def test_buckets():
    assert data.buckets(64, 16) == [(48, 80), (64, 64), (80, 48)]
    shapes = data.buckets(256, 16)
    assert all(h % 16 == w % 16 == 0 and 0.75 * 256**2 < h * w <= 256**2 for h, w in shapes)
    assert (256, 256) in shapes and {(w, h) for h, w in shapes} == set(shapes)
    assert data.decode(stored(picture((300, 200))), shapes, header_only=True) == (208, 304)
    for bad in (65, 0, 8):
        with pytest.raises(ValueError, match="multiple of 16"):
            data.buckets(bad, 16)


def forged_png(width: int, height: int) -> bytes:
    """A PNG that claims to be of this size and holds next to nothing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)


BAD_PICTURES = {
    "empty": (b"", "known format"),
    "text": (b"not a picture", "known format"),
    "truncated png": (stored(Image.effect_noise((64, 64), 50))[:-500], "damaged"),
    "truncated jpeg": (stored(Image.effect_noise((64, 64), 50), "JPEG")[:-500], "damaged"),
    "truncated webp": (stored(Image.effect_noise((64, 64), 50), "WEBP")[:-200], "damaged|known"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) print\n%%EOF\n", "known format"),
    "bomb": (forged_png(60_000, 60_000), "megapixels"),
    "small bomb": (forged_png(8000, 8000), "megapixels"),
    "forged header": (forged_png(7000, 7000), "damaged"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures_are_refused(name):
    raw, reason = BAD_PICTURES[name]
    with pytest.raises(ValueError, match=reason) as error:
        data.decode(raw, [(8, 8)])
    assert "\n" not in str(error.value) and "0x" not in str(error.value)


def test_mutated_pictures_raise_value_errors_only(monkeypatch):
    monkeypatch.setattr(data, "MAX_PIXELS", 10**6)              # for speed
    draw, refused = random.Random(0), 0
    sources = [raw for name, (raw, _) in MODES.items()]
    for i in range(1500):
        raw = bytearray(sources[i % len(sources)])
        for _ in range(draw.choice([1, 3, 20])):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        try:
            data.decode(bytes(raw[:draw.choice([len(raw), draw.randrange(len(raw))])]), [(8, 8)])
        except ValueError:
            refused += 1
    assert 300 < refused < 1500


def test_load_image(tmp_path):
    picture().save(tmp_path / "a.png")
    assert (data.load_image(str(tmp_path / "a.png"), (16, 24)) == np.full((16, 24, 3), (200, 10, 60))).all()
    (tmp_path / "b.png").write_bytes(b"x")
    for name, reason in (("b.png", "known format"), ("c.png", "exist"), (".", "no file")):
        with pytest.raises((ValueError, OSError), match=reason) as error:
            data.load_image(str(tmp_path / name), (8, 8))
        assert str(tmp_path / name) in one_line(error)


# ------------------------------------------------------------------------------------- captioned pictures
def contents(pictures: ImageText) -> list[tuple[str, int]]:
    return sorted((item.text, int(pictures.images([i])[0][0, 0, 0])) for i, item in enumerate(pictures.items))


EXPECTED = [(f"picture {i}", 10 * i) for i in range(6)]


def test_imagefolder_and_captions_jsonl(tmp_path):
    assert contents(ImageText(imagefolder(tmp_path / "a"), size=8)) == EXPECTED
    folder = imagefolder(tmp_path / "b", table="captions.jsonl", key="file")
    assert contents(ImageText(str(folder), size=8)) == EXPECTED
    (folder / "captions.jsonl").rename(folder / "part.jsonl")
    assert contents(ImageText([folder / "part.jsonl"], size=8)) == EXPECTED
    assert len(contents(ImageText([tmp_path / "a", folder / "part.jsonl"], size=8))) == 12


def test_a_list_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(imagefolder(tmp_path))
    assert contents(ImageText("metadata.jsonl", size=8)) == contents(ImageText(".", size=8)) == EXPECTED


def test_same_named_txt_files(tmp_path, capsys):
    for i in range(6):
        folder = tmp_path / f"sub{i % 2}"
        folder.mkdir(exist_ok=True)
        picture(color=(10 * i,) * 3).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"\ufeffpicture {i}\n")
    (tmp_path / "README.txt").write_text("not a caption")
    assert contents(ImageText(tmp_path, size=8)) == EXPECTED
    picture().save(tmp_path / "alone.png")
    assert contents(ImageText(tmp_path, size=8)) == EXPECTED
    line = capsys.readouterr().err
    assert "1 of 7 images" in line and "alone.png" in line and line.count("\n") == 1


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_webdataset_shards(tmp_path, format):
    long = "d/" + "x" * 120                     # needs a GNU or pax long name
    for part in range(2):
        members = []
        for i in range(3 * part, 3 * part + 3):
            name = f"./{'e' if format == tarfile.USTAR_FORMAT else long}/{i:04d}"
            raw = stored(picture(color=(10 * i,) * 3), "PNG")
            caption = json.dumps({"caption": f"picture {i}"}).encode() if i % 2 else f"picture {i}".encode()
            members += [(f"{name}.png", raw), (f"{name}.cls", b"1")]
            members += [(f"{name}.json" if i % 2 else f"{name}.txt", caption)]
        shard(tmp_path / f"{part}.tar", members, format)
    assert contents(ImageText(tmp_path, size=8)) == EXPECTED
    assert contents(ImageText([tmp_path / "0.tar", tmp_path / "1.tar"], size=8)) == EXPECTED


def test_hostile_tar_members_are_never_read(tmp_path, capsys):
    secret = imagefolder(tmp_path / "outside") / "5.png"
    raw = stored(picture(color=(30, 30, 30)))
    path = shard(tmp_path / "a.tar", [
        ("ok.png", raw), ("ok.txt", b"fine"), ("/abs.png", raw), ("/abs.txt", b"x"), ("../up.png", raw),
        ("../up.txt", b"x"), ("a/../../up2.png", raw), ("a/../../up2.txt", b"x"),
        ("soft.png", None, tarfile.SYMTYPE, str(secret)), ("soft.txt", b"x"),
        ("hard.png", None, tarfile.LNKTYPE, "../outside/5.png"), ("hard.txt", b"x"),
        ("fifo.png", None, tarfile.FIFOTYPE, ""), ("dev.png", None, tarfile.CHRTYPE, ""),
        ("dir", None, tarfile.DIRTYPE, ""), ("two\nlines.png", raw)])
    before = sorted(tmp_path.rglob("*"))
    assert contents(ImageText(path, size=8)) == [("fine", 30)]
    assert sorted(tmp_path.rglob("*")) == before                # nothing was extracted
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="leads out"):
        ImageText(path, size=8, strict=True)


def test_damaged_tars(tmp_path):
    raw = stored(Image.effect_noise((32, 32), 90))
    members = [(f"{i}.{end}", content) for i in range(4) for end, content in [("png", raw), ("txt", b"t")]]
    path = shard(tmp_path / "a.tar", members)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(raw) // 512 * 512 + 1024] ^= 255                # in the second header
    forged = bytearray(whole)
    forged[124:136] = b"77777777777\0"                          # a size of 8 GiB
    forged[148:156] = b"%06o\0 " % (sum(forged[:148]) + 8 * 32 + sum(forged[156:512]))
    negative = bytearray(whole)
    negative[124:136] = b"\xff" * 12                            # a size of -1, base 256
    negative[148:156] = b"%06o\0 " % (sum(negative[:148]) + 8 * 32 + sum(negative[156:512]))
    for bad in (whole[:700], whole[:3000], whole[:1], b"", b"x" * 5000, flipped, forged, negative,
                gzip.compress(whole)):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="a.tar") as error:
            ImageText(path, size=8)
        one_line(error)
    draw = random.Random(0)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        headers = [member.offset for member in tar]
    for _ in range(500):
        mutant = bytearray(whole)
        for _ in range(draw.choice([1, 5])):
            mutant[draw.choice(headers) + draw.randrange(512)] = draw.randrange(256)
        at = draw.choice(headers)               # most mutants would fail their checksum: mend one in two
        total = sum(mutant[at:at + 148]) + 8 * 32 + sum(mutant[at + 156:at + 512])
        mutant[at + 148:at + 156] = b"%06o\0 " % total
        path.write_bytes(mutant)
        try:
            ImageText(path, size=8)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)


def test_paths_never_lead_out_of_the_folder(tmp_path):
    imagefolder(tmp_path / "outside")
    folder = imagefolder(tmp_path / "in")
    (folder / "link.png").symlink_to(tmp_path / "outside" / "0.png")
    (folder / "sub").symlink_to(tmp_path / "outside")
    for name in ("../outside/0.png", str(tmp_path / "outside" / "0.png"), str(folder / "0.png"), "link.png",
                 "sub/0.png", ".."):
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
        with pytest.raises(ValueError, match="leads out of the folder") as error:
            ImageText(folder, size=8)
        one_line(error)
    (folder / "metadata.jsonl").unlink()
    (folder / "link.txt").write_text("x")
    with pytest.raises(ValueError, match="leads out of the folder"):
        ImageText(folder, size=8)
    (folder / "captions.jsonl").symlink_to(tmp_path / "outside" / "metadata.jsonl")
    with pytest.raises(ValueError, match="leads out of the folder"):
        ImageText(folder, size=8)


GOOD_ROW = '{"file_name": "0.png", "text": "x"}\n'
BAD_TABLES = {
    "missing file": ('{"file_name": "no.png", "text": "x"}', FileNotFoundError, r"metadata.jsonl:2.*no.png"),
    "a folder": ('{"file_name": "d", "text": "x"}', FileNotFoundError, "no file 'd'"),
    "no name": ('{"text": "x"}', ValueError, "file_name"),
    "null byte": ('{"file_name": "a\\u0000", "text": "x"}', ValueError, "file_name"),
    "empty text": ('{"file_name": "0.png", "text": " \\n"}', ValueError, ":2.*empty"),
    "no text": ('{"file_name": "0.png"}', ValueError, "NoneType"),
    "number": ('{"file_name": "0.png", "text": 3}', ValueError, "int"),
    "half a surrogate": ('{"file_name": "0.png", "text": "\\ud800"}', ValueError, "UTF-8"),
    "not json": ("{", ValueError, ":2.*JSON"),
    "no object": ("[1]", ValueError, ":2.*list"),
    "deep json": ("[" * 100_000, ValueError, "JSON"),
    "latin-1": ('{"file_name": "0.png", "text": "\xe9"}'.encode("latin-1"), ValueError, ":2.*UTF-8 at byte"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_metadata(tmp_path, name):
    row, kind, reason = BAD_TABLES[name]
    folder = imagefolder(tmp_path)
    (folder / "d").mkdir()
    row = row if isinstance(row, bytes) else row.encode()
    (folder / "metadata.jsonl").write_bytes(GOOD_ROW.encode() + row)
    with pytest.raises(kind, match=reason) as error:
        ImageText(folder, size=8)
    one_line(error)


def test_long_lines_are_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_LINE", 1000)
    folder = imagefolder(tmp_path)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "x" * 2000}))
    with pytest.raises(ValueError, match="metadata.jsonl:1: a line of over"):
        ImageText(folder, size=8)


def test_no_usable_data_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ImageText(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no captioned image"):
        ImageText(tmp_path)
    (tmp_path / "a.zip").write_bytes(b"x")
    with pytest.raises(ValueError, match="neither"):
        ImageText(tmp_path / "a.zip")
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(b"x")
        (tmp_path / f"{i}.txt").write_text("x")
    with pytest.raises(ValueError, match="2 of 2 images cannot be used: '0.png'"):
        ImageText(tmp_path)
    (tmp_path / "1.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"1.txt: not UTF-8 at byte 2"):
        ImageText(tmp_path)


@pytest.mark.parametrize("cache", [1 << 28, 0])                 # decoded at the start, or when asked for
def test_bad_pictures_among_good_ones_are_left_out(tmp_path, capsys, monkeypatch, cache):
    monkeypatch.setattr(data, "CACHE_BYTES", cache)
    folder = imagefolder(tmp_path)
    (folder / "2.png").write_bytes(b"x")
    (folder / "4.png").write_bytes(forged_png(60_000, 60_000))
    pictures = ImageText(folder, size=8)
    assert contents(pictures) == [EXPECTED[i] for i in (0, 1, 3, 5)]
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "2 of 6" in line and "2.png" in line and "4.png" in line
    with pytest.raises(ValueError, match="2 of 6.*strict_data"):
        ImageText(folder, size=8, strict=True)


def test_damage_found_late_gives_way_to_the_next_picture_with_its_caption(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    folder = imagefolder(tmp_path)
    for name in ("3.png", "5.png"):
        Image.effect_noise((32, 32), 90).save(folder / name)
        os.truncate(folder / name, 500)                         # the header is whole
    pictures = ImageText(folder, size=8)
    assert pictures.num_images == 6 and capsys.readouterr().err == ""
    found = [pictures.t2i(k) for k in range(6)]
    assert sorted(caption for caption, _ in found) == sorted(f"picture {i}" for i in (0, 0, 1, 2, 4, 4))
    for caption, index in found:
        assert pictures.images([index])[0][0, 0, 0] == 10 * int(caption[-1])
    assert (pictures.images([3])[0] == 40).all()
    assert capsys.readouterr().err.count("\n") == 2             # once for each
    with pytest.raises(ValueError, match="3.png|5.png"):
        list(map(ImageText(folder, size=8, strict=True).t2i, range(6)))


def test_a_file_that_vanishes_is_an_error_not_a_skip(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    raw = stored(picture())
    path = shard(tmp_path / "a.tar", [("0.png", raw), ("0.txt", b"x")])
    pictures = ImageText(path, size=8)
    os.truncate(path, 540)
    with pytest.raises(OSError, match="shorter"):
        pictures.t2i(0)
    path.unlink()
    with pytest.raises(OSError, match="a.tar.*restore") as error:
        pictures.t2i(0)
    one_line(error)


def test_epochs_of_pictures_and_buckets(tmp_path):
    folder = imagefolder(tmp_path)
    picture((40, 20)).save(folder / "0.png")
    pictures = ImageText(folder, seed=5, size=32, aspect=True, multiple=8)
    assert {pictures.image_hw(i) for i in range(6)} == {(24, 40), (32, 32)}
    assert all(pictures.images([i])[0].shape[:2] == pictures.image_hw(i) for i in range(6))
    for epoch in range(3):
        assert sorted(pictures.t2i(6 * epoch + i)[1] for i in range(6)) == list(range(6))
    again = ImageText(folder, seed=5, size=32)
    assert [pictures.t2i(k) for k in range(20)] == [again.t2i(k) for k in range(20)]
    assert pictures.it2t(3) == ("describe the image.", pictures.t2i(3)[1], pictures.t2i(3)[0])
    assert sorted(pictures.corpus(100)[1:]) == [text for text, _ in EXPECTED]


# --------------------------------------------------------------------------------------------------- texts
def documents(path: Path, **options) -> list[str]:
    texts = TextFiles(path, **options)
    return [texts._read(*map(int, row)) for row in texts._docs]


@pytest.mark.parametrize("ending", ["txt", "txt.gz", "jsonl", "jsonl.gz"])
def test_text_formats(tmp_path, ending):
    texts = ["first é\nline", "second 漢", "third"]
    raw = ("\n".join(json.dumps({"text": text}) for text in texts) if "jsonl" in ending else
           "\ufeff \n" + "\n<|endoftext|>\n".join([*texts, " ", ""])).encode()
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(raw) if ending.endswith("gz") else raw)
    assert [text.lstrip("\ufeff \n") for text in documents(path)] == texts


def test_separators_and_characters_across_chunks(tmp_path):
    chunk = 1 << 20
    for shift in range(-15, 3):
        start = "é" * ((chunk + shift) // 2) + "a" * ((chunk + shift) % 2)
        (tmp_path / "a.txt").write_text(f"{start}<|endoftext|>漢b" + " " * chunk + "c\n")
        assert documents(tmp_path / "a.txt") == [start, "漢b" + " " * chunk + "c"]


@pytest.mark.parametrize("at", [0, 5, (1 << 20) - 1, 1 << 20, (1 << 20) + 700])
def test_text_that_is_not_utf8_is_named_by_its_byte(tmp_path, at):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * at + b"\xe6\xbcx" + b"a" * 1000)    # three bytes, the last one wrong
    with pytest.raises(ValueError, match=f"a.txt: not UTF-8 at byte {at};") as error:
        TextFiles(path)
    one_line(error)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"fine" * 99))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(path.read_bytes()[:at + 2]))
    with pytest.raises(ValueError, match=f"a.txt.gz: not UTF-8 at byte {at};"):
        TextFiles([tmp_path / "b.txt.gz", tmp_path / "a.txt.gz"])


def test_bad_text_files(tmp_path, monkeypatch):
    whole = gzip.compress(random.Random(0).randbytes(5000).hex().encode())
    (tmp_path / "d.txt").mkdir()
    files = {"cut.txt.gz": whole[:3000], "no.txt.gz": b"plain", "blank.txt": b" \n<|endoftext|>\n",
             "empty.txt": b"", "a.pdf": b"x", "row.jsonl": b'{"text": ""}', "big.txt.gz": whole}
    monkeypatch.setattr(data, "MAX_UNPACKED", 4000)
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    for name in [*files, "nowhere.txt", "d.txt"]:
        with pytest.raises((ValueError, OSError), match=name) as error:
            TextFiles(tmp_path / name)
        one_line(error)


def test_windows_cover_the_text_and_begin_at_a_border(tmp_path):
    words = [f"word{i}." if i % 9 == 8 else f"word{i}" for i in range(3000)]
    (tmp_path / "a.txt").write_text(" ".join(words))
    texts = TextFiles(tmp_path / "a.txt", seed=1, seq_len=32)
    windows = [texts.t2t(k) for k in range(texts.num_windows)]
    for window in windows:
        got = window.split()
        first = words.index(got[0])
        assert first % 9 == 0 and got[:-1] == words[first:first + len(got) - 1]     # a sentence begins it
        assert len(window) >= 256 or got[-1] == words[-1]       # 8 bytes a token, unless the document ends
    assert set(words) == {word for window in windows for word in window.split() if word in words}
    assert windows == [TextFiles(tmp_path / "a.txt", seed=1, seq_len=32).t2t(k) for k in range(len(windows))]
    assert windows != [texts.t2t(k + texts.num_windows) for k in range(len(windows))]


def test_texts_do_not_grow_in_memory(tmp_path):
    with open(tmp_path / "a.txt", "w") as file:
        for i in range(40):
            file.write("some words and more of them\n" * 37_000)        # 40 MB
    tracemalloc.start()
    texts = TextFiles(tmp_path / "a.txt")
    for k in range(200):
        texts.t2t(k)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


# ------------------------------------------------------------------------------------------------- mixture
def test_what_data_and_text_ask_for(tmp_path):
    folder = imagefolder(tmp_path / "a")
    (tmp_path / "a.txt").write_text("once upon a time")
    both = data.open_data(0, [folder], [tmp_path / "a.txt"], size=8)
    assert both.tasks == {"t2t", "t2i", "it2t"} and both.num_images == 6
    assert both.t2t(4) == "once upon a time" and both.t2i(4)[0].startswith("picture")
    assert both.images([2])[0].shape == (8, 8, 3) and both.image_hw(2) == (8, 8)
    assert {"once upon a time", "picture 0", "picture 1"} <= set(both.corpus(12))
    assert data.open_data(0, [folder], size=8).t2t(4).startswith("picture")
    assert data.open_data(0, text=[tmp_path / "a.txt"]).tasks == {"t2t"}
    assert isinstance(data.open_data(0, size=16, pool=10), GeneratedScenes)


def test_demonstration():
    done = subprocess.run([sys.executable, data.__file__], text=True, capture_output=True, check=True)
    assert all(part in done.stdout for part in ("13 tokens (expect 13", "back: True", "4 are used"))


# ---- files that hang or fill memory ------------------------------------------------------------------------

@pytest.mark.parametrize("kind", (b"x", b"g", b"L"))
def test_headers_that_grow_are_refused_before_they_are_read(tmp_path, kind):
    """tarfile reads what such a header claims to have, and takes a time of its square."""
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = kind, 1 << 40
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(ValueError, match="16 KiB") as error:
        ImageText(path)
    one_line(error)


def test_a_long_name_is_no_such_header(tmp_path):
    name = "a" * 300
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
            for ending, raw in ((".png", stored(picture())), (".txt", b"x")):
                info = tarfile.TarInfo(name + ending)
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
        assert ImageText(tmp_path / "a.tar", size=8).num_images == 1


@pytest.mark.parametrize("name, words", (("metadata.jsonl", "not a file"), ("a.tar", "no captioned image")))
def test_a_pipe_is_not_waited_for(tmp_path, name, words):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=words):
        ImageText(tmp_path)


def test_a_tokenizer_file_is_a_file_of_some_size(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        data.Tokenizer.from_file(path)
    path.symlink_to("/dev/zero")
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        data.Tokenizer.from_file(path)
    with pytest.raises(ValueError, match="matches nothing"):
        data.Tokenizer.from_dict(data.Tokenizer.train(["a b"], 257).to_dict() | {"pattern": "x*"})
    looks = data.Tokenizer.from_dict(data.Tokenizer.train(["a b"], 257).to_dict() | {"pattern": "(?=a)"})
    with pytest.raises(ValueError, match="pattern fails"):
        looks.encode("a b")
