"""pytest tests/test_data.py"""
import gzip
import io
import json
import os
import tarfile
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import ImageText, Purpose, Scenes, TextFiles
from scenes import language, pictures

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")     # pytest resets the filter of data.py


def picture(size=(8, 8), color=(200, 10, 60)) -> Image.Image:
    return Image.new("RGB", size, color)


def stored(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def image_folder(folder: Path, table: str = "metadata.jsonl", key: str = "file_name") -> Path:
    """Six pictures: picture i is of gray level 10 i and has the caption "picture i"."""
    folder.mkdir(exist_ok=True)
    with open(folder / table, "w") as rows:
        for i in range(6):
            picture(color=(10 * i,) * 3).save(folder / f"{i}.png")
            print(json.dumps({key: f"{i}.png", "text": f"picture {i}"}), file=rows)
    return folder


def dataset_of(*paths: Path, **options) -> ImageText:
    return ImageText(paths, **{"hw": (8, 8)} | options)


def contents(*paths: Path) -> list[tuple[str, int]]:
    """(caption, gray level of the first pixel) of each picture."""
    dataset = dataset_of(*paths)
    return sorted((text, int(dataset.images([i])[0][0, 0, 0]))
                  for i, (_, text) in enumerate(dataset.captions()))


EXPECTED = [(f"picture {i}", 10 * i) for i in range(6)]


def shard(path: Path, members: dict[str, bytes | tuple], format=tarfile.PAX_FORMAT) -> Path:
    """A tar of name -> content, or name -> (type, link target)."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                content = b""
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def refused(read, *arguments) -> str:
    """The one line of the error that read(*arguments) raises."""
    with pytest.raises((ValueError, OSError)) as error:
        read(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)

# ---- Randomness --------------------------------------------------------------------------------

def test_rng_is_a_function_of_seed_number_and_purpose():
    keys = [(seed, k, purpose) for seed in range(3) for k in range(50) for purpose in Purpose]
    assert len({data.rng(*key).integers(1 << 62) for key in keys}) == len(keys)
    expected = np.random.Generator(np.random.Philox(key=[3 * 64 + Purpose.PICK, 7]))
    assert data.rng(3, 7, Purpose.PICK).random() == expected.random()
    assert list(Purpose) == [*range(12), *range(13, 17)]   # renumbering changes runs

# ---- Generated scenes --------------------------------------------------------------------------

def test_samples_depend_on_seed_and_number_alone():
    first, again, other = (Scenes(seed, pool=50) for seed in (1, 1, 2))
    for task in ("t2t", "t2i", "it2t"):
        forwards = [getattr(first, task)(k) for k in range(40)]
        assert forwards == [getattr(again, task)(k) for k in reversed(range(40))][::-1]
        assert forwards != [getattr(other, task)(k) for k in range(40)]
    assert all((a == b).all() for a, b in zip(first.images(range(50)), again.images(range(50))))


def test_samples_are_true_of_their_picture():
    world, questions = Scenes(3, hw=(32, 48), pool=100), 0
    assert world.image_hw(0) == (32, 48) and world.images([0])[0].shape == (32, 48, 3)
    for k in range(100):
        caption, index = world.t2i(k)
        assert language.is_exact(language.read_caption(caption), world.scene_of(index))
        prompt, index, answer = world.it2t(k)
        if prompt in data.DESCRIBE:
            assert language.is_exact(language.read_caption(answer), world.scene_of(index))
        else:
            questions += 1
            assert answer in language.answers(world.scene_of(index), prompt)
    assert 67 <= questions <= 83

def test_pixels_in_memory_are_limited_by_their_bytes(monkeypatch):
    drawn, render = [], pictures.render
    monkeypatch.setattr(data, "CACHE_BYTES", 2 * 3 * 32 * 32)
    monkeypatch.setattr(pictures, "render", lambda *given: drawn.append(given) or render(*given))
    for side, count in ((32, 2), (64, 4)):                  # two pictures fit, or none
        drawn.clear()
        Scenes(0, (side, side)).images([0, 1, 0, 1])
        assert len(drawn) == count

# ---- Pixels ------------------------------------------------------------------------------------

def decoded(raw: bytes, *shapes, header_only=False) -> np.ndarray | tuple[int, int]:
    return data.decode_picture(io.BytesIO(raw), list(shapes) or [(8, 8)], header_only)


gray16 = Image.fromarray(np.full((8, 8), 25700, np.uint16))
MODES = {
    "RGB": (stored(picture()), (200, 10, 60)),
    "RGBA": (stored(Image.new("RGBA", (8, 8), (255, 0, 0, 128))), (255, 127, 127)),
    "LA": (stored(Image.new("LA", (8, 8), (0, 51))), (204, 204, 204)),
    "L transparent": (stored(Image.new("L", (8, 8), 77), transparency=77), (255, 255, 255)),
    "P transparent": (stored(picture().quantize(2), transparency=0), (255, 255, 255)),
    "CMYK jpeg": (stored(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100),
                  (255, 0, 0)),
    "I;16": (stored(gray16), (100, 100, 100)),
    "I;16 transparent": (stored(gray16, transparency=25700), (255, 255, 255)),
    "I;16B tiff": (stored(Image.frombytes("I;16B", (8, 8), b"\x64\x00" * 64), "TIFF"),
                   (100, 100, 100)),
    "I pgm": (b"P5 8 8 65535 " + b"\x64\x00" * 64, (100, 100, 100)),
    "F tiff": (stored(Image.new("F", (8, 8), 0.4), "TIFF"), (102, 102, 102)),
    **{f"two frames {kind}": (stored(picture(), kind, save_all=True, lossless=True,
                                     append_images=[picture(color=(255, 0, 0))]), (200, 10, 60))
       for kind in ("GIF", "PNG", "WEBP", "TIFF")},
}


@pytest.mark.parametrize("raw, color", MODES.values(), ids=MODES)
def test_every_mode_becomes_rgb(raw, color):
    pixels = decoded(raw)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - color).max() <= 1


UNDO = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1)}


@pytest.mark.parametrize("kind, options", [("JPEG", {"quality": 100, "subsampling": 0}),
                                           ("PNG", {})], ids=["jpeg", "png"])
@pytest.mark.parametrize("orientation", UNDO)
def test_exif_orientation_is_applied(kind, options, orientation):
    quadrants = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    seen = quadrants.repeat(16, 0).repeat(32, 1)            # (32, 64, 3), as a viewer must see it
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(UNDO[orientation](seen)))
    given = stored(image, kind, exif=exif, **options), (64, 32), (48, 48), (32, 64)
    assert decoded(*given, header_only=True) == (32, 64)
    pixels = decoded(*given).astype(int)
    assert np.abs(pixels[4:-4:8, 4:-4:8] - seen.astype(int)[4:-4:8, 4:-4:8]).max() < 8


def test_scaling_crops_the_center_and_keeps_the_aspect():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 250                                                # the center square
    assert (decoded(stored(Image.fromarray(wide)), (10, 10)) > 200).all()
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    assert np.array_equal(decoded(stored(Image.fromarray(noise))), noise)       # of that size


def test_buckets(tmp_path):
    assert data.buckets(64, 16) == [(48, 80), (64, 64), (80, 48)]
    shapes = data.buckets(256, 16)
    assert all(h % 16 == w % 16 == 0 and 0.75 * 256**2 < h * w <= 256**2 for h, w in shapes)
    assert {(w, h) for h, w in shapes} == set(shapes)
    assert decoded(stored(picture((300, 200))), *shapes, header_only=True) == (208, 304)
    picture((40, 20)).save(image_folder(tmp_path) / "0.png")
    dataset = dataset_of(tmp_path, hw=(32, 32), aspect=True)
    assert {dataset.image_hw(i) for i in range(6)} == {(24, 40), (32, 32)}
    assert all(dataset.images([i])[0].shape[:2] == dataset.image_hw(i) for i in range(6))


def test_bad_pictures_are_refused():
    """Those of a format that runs code, or of more than 50 megapixels, by their header."""
    header = partial(decoded, header_only=True)
    for raw in (b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) print\n%%EOF\n",
                stored(Image.new("1", (5001, 10_000)))):
        refused(header, raw)
    assert header(stored(Image.new("1", (5000, 10_000)))) == (8, 8)
    for kind in ("PNG", "JPEG"):
        refused(decoded, stored(Image.effect_noise((64, 64), 50), kind)[:-500])

# ---- Captioned pictures ------------------------------------------------------------------------

def test_lists_of_captions(tmp_path, monkeypatch):
    assert contents(image_folder(tmp_path / "a")) == EXPECTED
    folder = image_folder(tmp_path / "b", "captions.jsonl", "file")
    assert contents(folder) == EXPECTED
    monkeypatch.chdir(folder)
    assert contents(tmp_path / "a", "captions.jsonl") == sorted(2 * EXPECTED)


def test_txt_files_of_the_same_name(tmp_path, capsys):
    for i in range(6):
        folder = tmp_path / f"sub{i % 2}"
        folder.mkdir(exist_ok=True)
        picture(color=(10 * i,) * 3).save(folder / f"of.{i}.png")
        (folder / f"of.{i}.txt").write_text(f"\ufeffpicture {i}\n")
    (tmp_path / "README.txt").write_text("")                            # no caption
    picture().save(tmp_path / "alone.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "empty.txt").write_text("a picture without a header")
    assert contents(tmp_path) == EXPECTED
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "alone.png" in line and "empty.png" in line


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_webdataset_shards(tmp_path, format):
    folder = "x." * 150                                                 # needs a long name
    for part in range(2):
        members = {}
        for i in range(3 * part, 3 * part + 3):
            text = json.dumps({"caption": f"picture {i}"}) if i % 2 else f"picture {i}"
            ending = "json" if i % 2 else "txt"
            members |= {f"./{folder}/{i}.png": stored(picture(color=(10 * i,) * 3)),
                        f"./{folder}/{i}.x": b"1", f"./{folder}/{i}.{ending}": text.encode()}
        shard(tmp_path / f"{part}.tar", members, format)
    assert contents(tmp_path) == contents(tmp_path / "0.tar", tmp_path / "1.tar") == EXPECTED


def test_the_key_in_a_shard_ends_at_the_first_dot(tmp_path, capsys):
    """7.seg.png and 7.cls.txt are further parts of sample 7, not a sample 7.seg and a 7.cls."""
    gray, other = stored(picture(color=(70, 70, 70))), stored(picture())
    path = shard(tmp_path / "a.tar", {
        "a.b/7.seg.png": other, "a.b/7.seg.txt": b"x", "a.b/7.jpg.txt": b"x", "a.b/7.png": gray,
        "a.b/7.cls.txt": b"3", "a.b/7.txt": b"seven", "a.b/8.seg.png": other})
    assert contents(path) == [("seven", 70)] and capsys.readouterr().err == ""


def test_links_in_a_shard_are_not_followed(tmp_path, capsys):
    secret = image_folder(tmp_path / "outside") / "5.png"
    raw = stored(picture(color=(30, 30, 30)))
    path = shard(tmp_path / "a.tar", {
        "ok.png": raw, "ok.txt": b"fine", "../up.png": raw, "../up.txt": b"up",
        "soft.png": (tarfile.SYMTYPE, str(secret)), "soft.txt": b"x",
        "hard.png": (tarfile.LNKTYPE, "../outside/5.png"), "hard.txt": b"x"})
    before = sorted(tmp_path.rglob("*"))
    assert contents(path) == [("fine", 30), ("up", 30)] and capsys.readouterr().err == ""
    assert sorted(tmp_path.rglob("*")) == before                        # nothing was unpacked


def test_damaged_shards(tmp_path):
    raw = stored(Image.effect_noise((32, 32), 90))
    path = shard(tmp_path / "a.tar", {"0.png": raw, "0.txt": b"t", "1.png": raw, "1.txt": b"t"})
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(raw) // 512 * 512 + 1024] ^= 255                        # in the second header
    for bad in (whole[:700], whole[:3000], b"", b"x" * 5000, flipped, gzip.compress(whole)):
        path.write_bytes(bad)
        assert "a.tar" in refused(dataset_of, path)


def test_paths_never_lead_out_of_the_folder(tmp_path):
    outside, folder = image_folder(tmp_path / "outside"), image_folder(tmp_path / "in")
    (folder / "link.png").symlink_to(outside / "0.png")
    (folder / "sub").symlink_to(outside)
    for name in ("../outside/0.png", str(folder / "0.png"), "link.png", "sub/0.png", ".."):
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
        assert f"'{name}' leads out of the folder" in refused(dataset_of, folder)
    (folder / "metadata.jsonl").unlink()
    assert "leads out of the folder" in refused(dataset_of, folder)     # link.png is in it
    (folder / "captions.jsonl").symlink_to(outside / "metadata.jsonl")
    assert "leads out of the folder" in refused(dataset_of, folder)


def test_bad_rows(tmp_path):
    table, good = image_folder(tmp_path) / "metadata.jsonl", b'{"file_name": "0.png", "text": "x"}'
    for text in (b'" \\n"', b"3", b'"\\ud800"', b'"\xe9"', b'"'):
        table.write_bytes(good + b"\n" + good.replace(b'"x"', text))
        assert "metadata.jsonl:2" in refused(dataset_of, tmp_path)
    table.write_bytes(good.replace(b"0", b"no"))
    assert "no.png" in refused(dataset_of, tmp_path)


def test_no_usable_picture(tmp_path):
    (tmp_path / "b.zip").write_bytes(b"x")
    (tmp_path / "a").mkdir()
    for name in ("a", "b.zip", "nowhere", "nowhere.tar", "nowhere.jsonl"):
        assert name in refused(dataset_of, tmp_path / name)


def test_another_picture_replaces_a_damaged_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    data.warn_once.cache_clear()
    folder = image_folder(tmp_path)
    for name in ("3.png", "5.png"):
        Image.effect_noise((32, 32), 90).save(folder / name)
        os.truncate(folder / name, 500)                                 # the header is whole
    dataset = dataset_of(folder)
    assert dataset.num_images == 6 and capsys.readouterr().err == ""
    samples = [dataset.t2i(k) for k in range(6)]
    assert sorted(caption[-1] for caption, _ in samples) == ["0", "1", "2", "2", "4", "4"]
    for caption, index in samples:
        assert dataset.images([index])[0][0, 0, 0] == 10 * int(caption[-1])
    assert (dataset.images([3])[0] == 40).all()
    assert capsys.readouterr().err.count("\n") == 2                     # one line for each
    os.remove(folder / "0.png")
    assert "0.png" in refused(dataset.images, [0])                      # a lost file is an error


def test_an_epoch_is_a_permutation(tmp_path):
    dataset, again = (dataset_of(image_folder(tmp_path), seed=5) for _ in range(2))
    samples = [dataset.t2i(k) for k in range(18)]
    epochs = [sorted(index for _, index in samples[i:i + 6]) for i in (0, 6, 12)]
    assert epochs == [[*range(6)]] * 3 and samples[:6] != samples[6:12] != samples[12:]
    assert samples == [again.t2i(k) for k in range(18)]
    assert dataset.it2t(3) == ("describe the image.", samples[3][1], samples[3][0])
    assert sorted(dataset.corpus(100)[1:]) == [text for text, _ in EXPECTED]

# ---- Texts -------------------------------------------------------------------------------------

@pytest.mark.parametrize("ending", ["txt", "txt.gz", "jsonl", "jsonl.gz"])
def test_text_formats(tmp_path, ending):
    texts = ["first é\nline", "second 漢", "third"]
    raw = ("\n".join(json.dumps({"text": text}) for text in texts) if "jsonl" in ending else
           "\ufeff \n" + "\n<|endoftext|>\n".join([*texts, " ", ""])).encode()
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(raw) if ending.endswith("gz") else raw)
    dataset = TextFiles([path], seq_len=8)
    assert sorted(dataset.t2t(k) for k in range(3)) == sorted(texts)    # one window each
    assert dataset.num_windows == 3 and dataset.tasks == {"t2t"} and not [*dataset.captions()]


def test_bad_text_files(tmp_path):
    whole = gzip.compress(np.random.default_rng(0).bytes(5000).hex().encode())
    files = {"cut.txt.gz": whole[:3000], "no.txt.gz": b"plain", "blank.txt": b" \n<|endoftext|>\n",
             "empty.txt": b"", "a.pdf": b"x", "row.jsonl": b'{"text": ""}',
             "latin.txt": b"a\n\xe6\xbcx", "latin.txt.gz": gzip.compress(b"a\n\xe6\xbcx")}
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    for name in [*files, "nowhere.txt"]:
        line = ":2" if "latin" in name else ""
        assert name + line in refused(TextFiles, [tmp_path / name])


def test_windows_cover_the_text_and_begin_at_a_border(tmp_path):
    words = [f"word{i}." if i % 9 == 8 else f"word{i}" for i in range(3000)]
    (tmp_path / "a.txt").write_text(" ".join(words))
    texts = TextFiles([tmp_path / "a.txt"], seed=1, seq_len=32)
    windows = [texts.t2t(k) for k in range(texts.num_windows)]
    for window in windows:
        got = window.split()
        first = words.index(got[0])
        assert first % 9 == 0                                           # a sentence begins it
        assert got[:-1] == words[first:first + len(got) - 1]
        assert len(window) >= 256 or got[-1] == words[-1]               # fills 32 tokens
    assert set(words) == {word for window in windows for word in window.split() if word in words}
    assert windows != [texts.t2t(k + texts.num_windows) for k in range(len(windows))]


def test_open_data(tmp_path):
    (tmp_path / "a.txt").write_text("once upon a time")
    flags = dict(seed=0, data=[], text=[], image_size=[24, 32], seq_len=256, aspect=False,
                 downsample=8, pool=10, questions=0.5)
    images, words = {"data": [image_folder(tmp_path / "a")]}, {"text": [tmp_path / "a.txt"]}
    world, captioned, texts, both = (data.open_data(Namespace(**flags | more)) for more in (
        {}, images, words, images | words))
    assert isinstance(world, Scenes) and world.image_hw(0) == (24, 32) and world.num_images == 10
    assert captioned.t2t(4).startswith("picture") and captioned.image_hw(0) == (24, 32)
    assert texts.tasks == {"t2t"} and both.tasks == {"t2t", "t2i", "it2t"}
    assert both.t2t(4) == "once upon a time" and both.t2i(4) == captioned.t2i(4)
    assert {"once upon a time", "picture 0", "picture 1"} <= set(both.corpus(12))
    assert [*both.captions()] == [(f"{i}.png", f"picture {i}") for i in range(6)]


def test_edits_and_clips_on_disk(tmp_path):
    folder = image_folder(tmp_path)
    (folder / "clip").mkdir()
    for i, name in enumerate(("f1.png", "f10.png", "f2.png", "notes.txt")):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(folder / "clip" / name, "PNG")
    rows = [{"file_name": "1.png", "source": "0.png", "text": "one"},
            {"file_name": "2.png", "source": ["0.png", "1.png"], "text": "two"},
            {"file_name": "clip", "text": "a clip"},
            {"file_name": "3.png", "source": None, "text": "a picture"}]
    table = folder / "metadata.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    dataset = dataset_of(folder)
    assert dataset.tasks == {"t2t", "t2i", "it2t", "ii", "vid"} and dataset.num_images == 9
    found = sorted([[(t.text, t.drawn) for t in dataset.ii(k)] for k in range(2)], key=len)
    assert found == [[("", False), ("one", True)], [("", False), ("", False), ("two", True)]]
    clip = dataset.vid(0)
    assert [turn.text for turn in clip] == ["a clip", "", ""] and all(t.drawn for t in clip)
    assert [int(x[0, 0, 0]) for x in dataset.images(t.image for t in clip)] == [0, 2, 1]
    assert dataset.t2i(0)[0] == "a picture" == dataset.t2t(0)
    assert [text for _, text in dataset.captions()] == ["a picture", "one", "two", "a clip"]

    table.write_text(json.dumps(rows[0]))                  # edits alone
    assert dataset_of(folder).tasks == {"ii"}
    os.mkdir(folder / "empty")
    for row, word in ((rows[0] | {"source": "no.png"}, "no.png"),
                      (rows[2] | {"source": "1.png"}, "clip"),
                      ({"file_name": "empty", "text": "x"}, "empty"),
                      (rows[0] | {"source": ["../x.png"]}, "x.png")):
        table.write_text(json.dumps(row))
        assert word in refused(dataset_of, folder)


def test_a_sequence_with_a_damaged_picture_is_left_out(tmp_path, capsys):
    data.warn_once.cache_clear()
    folder = image_folder(tmp_path)
    Image.effect_noise((32, 32), 90).save(folder / "3.png")
    os.truncate(folder / "3.png", 500)                     # the header is whole
    rows = [{"file_name": f"{i}.png", "source": f"{i + 1}.png", "text": str(i)} for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = dataset_of(folder)
    assert {dataset.ii(k)[-1].text for k in range(8)} == {"0", "1"}
    assert "3.png" in capsys.readouterr().err
