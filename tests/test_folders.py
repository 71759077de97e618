"""ldm_edu.folders: every odd file handled or refused by name, the same order and batches every time."""
import csv
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import types
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch.utils.data import DataLoader, DistributedSampler

from ldm_edu import folders
from ldm_edu.core import check_images
from ldm_edu.folders import (
    BucketedBatches,
    ImageFolder,
    Part,
    Pictures,
    as_size,
    caption_from_name,
    find_images,
    from_torchvision,
    make_buckets,
    nearest_bucket,
    read_image,
    resize_image,
    to_rgb,
    train_validation_split,
)

CIFAR = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10-test.zip"
needs_cifar = pytest.mark.skipif(not CIFAR.exists(), reason=f"needs the real images of {CIFAR.name} beside the checkout (shared/data)")


def photo(height=40, width=60, seed=0):
    """Smooth colours with some noise: what a small photograph looks like to a codec."""
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x / max(width - 1, 1), y / max(height - 1, 1), 0.5 + 0.5 * np.sin((x + y) / 9)], axis=-1)
    noise = np.random.default_rng(seed).normal(0, 0.02, base.shape)
    return Image.fromarray((np.clip(base + noise, 0, 1) * 255).astype(np.uint8))


def save(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or photo()).save(path, **options)
    return path


def tree(root):
    """Every file below root with its bytes and time."""
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(Path(root).rglob("*")) if p.is_file()}


def flat(root, name="red.png"):
    return ImageFolder(root, size=8, cache=False)[find_images(root).index(name)]["image"].mean((1, 2))


# --- formats ----------------------------------------------------------------------------------------------------------

FORMATS = {
    "rgb.jpg": {}, "RGB.JPEG": {}, "rgb.png": {}, "rgb.webp": {"lossless": True}, "rgb.bmp": {}, "rgb.gif": {}, "rgb.tif": {},
    "rgb.TIFF": {}, "rgb.ppm": {}, "rgb.pnm": {}, "rgb.jpe": {}, "rgb.jfif": {},
}


def test_every_suffix_is_read_to_the_same_picture(tmp_path):
    for name, options in FORMATS.items():
        save(tmp_path / name, **options)
    data = ImageFolder(tmp_path, size=16)
    assert len(data) == len(FORMATS)
    images = torch.stack([item["image"] for item in data])
    check_images(images)
    assert images.dtype == torch.float32 and images.shape == (len(FORMATS), 3, 16, 16)
    spread = (images - images.mean(0)).abs().amax(dim=(1, 2, 3))
    assert spread.max() < 0.25, dict(zip(data.names, spread.tolist()))  # gif keeps 256 colours, jpeg loses a little


def grey(value=200):
    return Image.new("L", (12, 10), value)


def palette_with_transparency():
    image = Image.new("P", (12, 10), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(1, (0, 0, 6, 10))
    return image


MODES = {  # name -> (image, save options, expected mean colour 0...255, tolerance)
    "grey.png": (grey(), {}, (200, 200, 200), 0),
    "grey.jpg": (grey(), {"quality": 95}, (200, 200, 200), 2),
    "one_bit.png": (Image.new("1", (12, 10), 1), {}, (255, 255, 255), 0),
    "palette.png": (palette_with_transparency(), {}, (127.5, 127.5, 0), 1),
    "palette_index_transparent.png": (palette_with_transparency(), {"transparency": 0}, (127.5, 255, 127.5), 1),
    "palette_bytes_transparent.png": (palette_with_transparency(), {"transparency": bytes([255, 0])}, (255, 127.5, 127.5), 1),
    "palette.gif": (palette_with_transparency(), {"transparency": 0}, (127.5, 255, 127.5), 1),
    "rgb_transparent_colour.png": (Image.new("RGB", (12, 10), (9, 9, 9)), {"transparency": (9, 9, 9)}, (255, 255, 255), 0),
    "grey_transparent_colour.png": (grey(9), {"transparency": 9}, (255, 255, 255), 0),
    "grey_alpha.png": (Image.new("LA", (12, 10), (100, 0)), {}, (255, 255, 255), 0),
    "rgba_half.png": (Image.new("RGBA", (12, 10), (255, 0, 0, 128)), {}, (255, 127, 127), 1),
    "rgba_clear.webp": (Image.new("RGBA", (12, 10), (255, 0, 0, 0)), {"lossless": True, "exact": True}, (255, 255, 255), 0),
    "cmyk.jpg": (Image.new("CMYK", (12, 10), (0, 255, 255, 0)), {"quality": 95}, (255, 0, 0), 3),
    "cmyk.tif": (Image.new("CMYK", (12, 10), (0, 255, 255, 0)), {}, (255, 0, 0), 3),
    "sixteen.png": (Image.fromarray(np.full((10, 12), 200 * 257, np.uint16)), {}, (200, 200, 200), 0),
    "sixteen.tif": (Image.fromarray(np.full((10, 12), 200 * 257, np.uint16)), {}, (200, 200, 200), 0),
    "thirty_two.tif": (Image.fromarray(np.full((10, 12), 200 * 257, np.int32)), {}, (200, 200, 200), 0),
    "float.tif": (Image.fromarray(np.full((10, 12), 0.5, np.float32)), {}, (128, 128, 128), 1),
    "one_pixel.png": (Image.new("RGB", (1, 1), (10, 20, 30)), {}, (10, 20, 30), 0),
    "one_row.png": (Image.new("RGB", (1000, 1), (10, 20, 30)), {}, (10, 20, 30), 0),
    "one_column.png": (Image.new("RGB", (1, 1000), (10, 20, 30)), {}, (10, 20, 30), 0),
}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("crop", ["center", "stretch"])
def test_modes(tmp_path, name, crop):
    image, options, colour, tolerance = MODES[name]
    save(tmp_path / name, image, **options)
    item = ImageFolder(tmp_path, size=(6, 8), crop=crop)[0]["image"]
    assert item.shape == (3, 6, 8) and item.dtype == torch.float32
    got = ((item + 1) * 127.5).mean((1, 2))
    torch.testing.assert_close(got, torch.tensor(colour, dtype=torch.float32), rtol=0, atol=tolerance + 0.6)


def test_background_shows_through_and_counts_in_the_fingerprint(tmp_path):
    save(tmp_path / "a.png", Image.new("RGBA", (9, 9), (255, 0, 0, 0)))
    white, blue = ImageFolder(tmp_path, 4), ImageFolder(tmp_path, 4, background=(0, 0, 255))
    torch.testing.assert_close(blue[0]["image"].mean((1, 2)), torch.tensor([-1.0, -1.0, 1.0]))
    assert white.fingerprint() != blue.fingerprint()


@pytest.mark.parametrize("background", [(1, 2), (0, 0, 256), (0, 0, -1), (0.5, 0.5, 0.5), 255, "white"])
def test_a_background_that_is_no_colour_is_refused(tmp_path, background):
    save(tmp_path / "a.png", Image.new("RGBA", (9, 9), (255, 0, 0, 0)))
    for read in (lambda: ImageFolder(tmp_path, 4, background=background), lambda: read_image(tmp_path / "a.png", None, background)):
        with pytest.raises(ValueError, match=re.escape(f"background: got {background!r}, expected three integers in 0...255")):
            read()


def test_a_background_may_be_any_three_integers(tmp_path):
    save(tmp_path / "a.png", Image.new("RGBA", (9, 9), (255, 0, 0, 0)))
    alike = [ImageFolder(tmp_path, 4, background=colour) for colour in ((0, 1, 255), [0, 1, 255], np.array([0, 1, 255], np.uint8), (False, True, 255))]
    assert len({data.fingerprint() for data in alike}) == 1 and alike[0].background == (0, 1, 255)


def test_sixteen_bit_rgb_png(tmp_path):
    """Pillow cannot write it, so the file is made by hand: 2x2 pixels of (65535, 32768, 0)."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + struct.pack(">HHH", 65535, 32768, 0) * 2 for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(png)
    got = ((ImageFolder(tmp_path, 2)[0]["image"] + 1) * 127.5).mean((1, 2))
    torch.testing.assert_close(got, torch.tensor([255.0, 128.0, 0.0]), rtol=0, atol=0.6)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_exif_orientation(tmp_path, orientation, suffix):
    """A file stored turned, with the tag that says so, is read as the upright picture."""
    upright = Image.new("RGB", (48, 32), (0, 0, 0))
    upright.paste((255, 0, 0), (0, 0, 24, 16))
    upright.paste((0, 255, 0), (24, 0, 48, 16))
    undo = {2: 0, 3: 1, 4: 2, 5: 3, 6: 4, 7: 5, 8: 6}
    back = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE",
            8: "ROTATE_270"}
    stored = upright.transpose(Image.Transpose[back[orientation]]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a{suffix}", stored, exif=exif, **({"quality": 95} if suffix == ".jpg" else {}))
    picture, shape = read_image(path)
    assert shape == (32, 48) and picture.size == (48, 32)
    difference = np.abs(np.asarray(picture, int) - np.asarray(upright, int)).mean()
    assert difference < 8, (orientation, suffix, difference)
    assert ImageFolder(tmp_path).sizes == [(32, 48)]


def test_garbage_in_exif_does_not_spoil_a_good_picture(tmp_path):
    for name, exif in {"a.jpg": b"Exif\0\0garbage", "b.jpg": b"Exif\0\0II*\0\xff\xff\xff\xff", "c.png": b"MM\0*\0\0\0\x08\0\x99"}.items():
        save(tmp_path / name, photo(), exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(ImageFolder(tmp_path, 8)) == 3


def test_jpeg_is_never_decoded_below_three_times_the_size(tmp_path):
    path = save(tmp_path / "big.jpg", photo(600, 900), quality=95)
    full = resize_image(read_image(path)[0], (32, 32))
    for size in (16, 32, 64, 150, 300, 600):
        picture, shape = read_image(path, (size, size))
        assert shape == (600, 900)
        assert min(picture.size) >= min(3 * size, 600)
    quick = resize_image(read_image(path, (32, 32))[0], (32, 32))
    assert np.abs(np.asarray(full, int) - np.asarray(quick, int)).mean() <= 1.5


# --- resizing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(64, 64), (64, 200), (200, 64), (7, 5), (1, 1), (1, 500), (33, 47)])
@pytest.mark.parametrize("size", [(32, 32), (16, 48), (1, 1)])
def test_resize_gives_the_wanted_shape_and_keeps_a_constant(height, width, size):
    image = Image.new("RGB", (width, height), (12, 34, 56))
    for crop in ("center", "stretch"):
        out = resize_image(image, size, crop)
        assert out.size == (size[1], size[0])
        assert out.getextrema() == ((12, 12), (34, 34), (56, 56))


def test_center_crop_takes_the_centre():
    image = Image.new("RGB", (300, 100), (255, 0, 0))
    image.paste((0, 255, 0), (100, 0, 200, 100))
    out = np.asarray(resize_image(image, (32, 32)))
    assert (out[:, 2:-2, 1] > 240).all()
    tall = np.asarray(resize_image(image.transpose(Image.Transpose.ROTATE_90), (32, 32)))
    assert (tall[2:-2, :, 1] > 240).all()
    squeezed = np.asarray(resize_image(image, (32, 32), "stretch"))
    assert squeezed[16, 2, 0] > 240 and squeezed[16, 16, 1] > 240 and squeezed[16, 29, 0] > 240


def test_own_size_changes_nothing():
    image = photo(32, 32)
    assert np.array_equal(np.asarray(resize_image(image, (32, 32))), np.asarray(image))


def test_frequencies_beyond_the_new_grid_vanish():
    """A grating of 0.4 cycles a pixel cannot live on a grid four times coarser."""
    x = np.arange(256)
    wave = (127.5 + 100 * np.cos(2 * np.pi * 0.4 * x)).astype(np.uint8)
    image = Image.fromarray(np.repeat(np.tile(wave, (256, 1))[..., None], 3, 2))
    out = np.asarray(resize_image(image, (64, 64)), float)[:, 8:-8]
    taken = np.asarray(image, float)[::4, ::4]
    assert out.std() < 3 < 40 < taken.std()


# --- scanning ---------------------------------------------------------------------------------------------------------


def test_order_hidden_files_and_case(tmp_path):
    for name in ["b.png", "A.JPG", "sub/z.png", "sub/deep/a.png", ".hidden.png", ".cache/x.png", "sub/.DS_Store.png"]:
        save(tmp_path / name, grey(), format="PNG")
    (tmp_path / "notes.txt").write_text("not an image")
    assert find_images(tmp_path) == ["A.JPG", "b.png", "sub/deep/a.png", "sub/z.png"]
    assert find_images(str(tmp_path)) == find_images(tmp_path)


def test_linked_folders_are_followed_but_never_in_circles(tmp_path):
    save(tmp_path / "store" / "a.png", grey())
    root = tmp_path / "root"
    root.mkdir()
    (root / "birds").symlink_to(tmp_path / "store")
    (root / "again").symlink_to(root)
    assert find_images(root) == ["birds/a.png"]


def test_folders_that_link_to_each_other_are_read_once(tmp_path):
    """Each under its own name; twins would land in training and in validation."""
    for here, there in (("a", "b"), ("b", "a")):
        save(tmp_path / "in" / here / f"{here}.png", grey()), save(tmp_path / "out" / here / "sub" / f"{here}.png", grey())
        (tmp_path / "in" / here / "other").symlink_to(tmp_path / "in" / there)
        (tmp_path / "out" / here / "other").symlink_to(tmp_path / "out" / there)
    assert find_images(tmp_path / "in") == ["a/a.png", "b/b.png"]
    (tmp_path / "in" / "c").symlink_to(tmp_path / "out" / "b")
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    assert find_images(tmp_path / "in") == ["a/a.png", "b/b.png", "c/other/sub/a.png", "c/sub/b.png"]
    (tmp_path / "in" / ".store").mkdir()
    save(tmp_path / "in" / ".store" / "d.png", grey())
    (tmp_path / "in" / "d").symlink_to(tmp_path / "in" / ".store")
    assert find_images(tmp_path / "in")[-1] == "d/d.png", "a hidden folder has only the link's name"


def test_missing_file_and_empty_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder, expected one with pictures"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"^nowhere: there is no such folder in {Path.cwd()}, expected"):
        ImageFolder("nowhere")
    with pytest.raises(ValueError, match="got no image among 0 files"):
        ImageFolder(tmp_path)
    (tmp_path / "IMG_1.heic").write_bytes(b"1")
    with pytest.raises(ValueError, match=r"got no image among 1 files.*expected some .*\.png.* 1 \.heic \(such as IMG_1\.heic\)\. Convert them to PNG"):
        ImageFolder(tmp_path)
    with pytest.raises(NotADirectoryError, match="heic"):
        ImageFolder(tmp_path / "IMG_1.heic")


def test_pictures_of_other_formats_are_counted_and_named(tmp_path):
    for name in ("good.png", "b/IMG_2.HEIC", "b/IMG_1.heic", "raw.dng", "._IMG_1.heic", "notes.txt", "good.txt"):
        save(tmp_path / name, grey(), format="PNG")
    for call in (find_images, ImageFolder):
        with pytest.warns(UserWarning) as seen:
            call(tmp_path)
        assert [str(w.message) for w in seen] == [
            f"{tmp_path}: left out are pictures in formats that are not read: 2 .heic, 1 .dng (such as b/IMG_1.heic). "
            "Convert them to PNG or JPEG, or move them away."]


@pytest.mark.skipif(not folders.AVIF, reason="this Pillow reads no AVIF")
def test_avif_is_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = photo(30, 50)
    save(tmp_path / "a.avif", lying, quality=95, exif=exif)
    save(tmp_path / "b.png", lying.transpose(Image.Transpose.ROTATE_270))
    data = ImageFolder(tmp_path, (50, 30))
    assert list(map(tuple, data.sizes)) == [(50, 30), (50, 30)]
    assert (data[0]["image"] - data[1]["image"]).abs().mean() < 0.04 < (data[0]["image"] - data[1]["image"].flip(1)).abs().mean()


def test_a_pillow_without_avif_says_that_it_is_left_out(tmp_path):
    """In a fresh process, whose Pillow is told to have been built without it."""
    save(tmp_path / "a.avif"), save(tmp_path / "b.png")
    code = ("import sys; from PIL import features; features.modules.pop('avif', None)\nfrom ldm_edu.folders import FORMATS, find_images\n"
            "assert 'AVIF' not in FORMATS; print(find_images(sys.argv[1]))")
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True, cwd=Path(folders.__file__).parents[1])
    assert run.stdout.strip() == "['b.png']" and "1 .avif (such as a.avif)" in run.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse names that are not Unicode")
def test_names_that_are_not_unicode(tmp_path):
    root = os.fsencode(tmp_path / "p")
    os.mkdir(root)
    save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", root + b"/caf\xe9.png")
    for _ in range(2):
        data = ImageFolder(tmp_path / "p", 8, cache_dir=tmp_path / "run")
        assert len(data) == 1 and len(data.fingerprint()) == 64 and data[0]["image"].shape == (3, 8, 8)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user whom file permissions bind")
def test_closed_folder_is_refused(tmp_path):
    save(tmp_path / "a" / "a.png", grey())
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(PermissionError, match="closed"):
        ImageFolder(tmp_path)


# --- broken files -----------------------------------------------------------------------------------------------------


def make_broken(root, monkeypatch=None):
    """One file of each kind of damage; returns {name: a word its report must hold}."""
    good = save(root / "good.jpg", photo(64, 64), quality=95).read_bytes()
    png = save(root / "good.png", photo(64, 64)).read_bytes()
    big = save(root / "bomb.png", Image.new("1", (400, 300))).read_bytes()
    assert big
    broken = {
        "zero.jpg": (b"", "empty"), "page.jpg": (b"<html>404</html>", "html"), "cut.jpg": (good[: len(good) // 2], "truncated"),
        "cut.png": (png[: len(png) // 2], "truncated"), "head.png": (png[:20], ""), "noise.webp": (os.urandom(500), "not an image"),
        "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PS-Adobe"),
        "crc.png": (png[:40] + bytes([png[40] ^ 255]) + png[41:], ""),
    }
    for name, (data, _) in broken.items():
        (root / name).write_bytes(data)
    (root / "dangling.png").symlink_to(root / "gone.png")
    (root / "folder.png").mkdir()
    save(root / "folder.png" / "inside.png", Image.fromarray(np.full((4, 4), 1 << 20, np.int32)).convert("I"), format="TIFF")
    words = {name: word for name, (_, word) in broken.items()}
    return words | {"dangling.png": "FileNotFound", "bomb.png": "120000|400x300", "folder.png/inside.png": "1048576"}


@pytest.fixture
def broken(tmp_path, monkeypatch):
    words = make_broken(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    return words


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_all_broken_files_are_named_at_once(tmp_path, broken):
    before = tree(tmp_path / ".")
    with pytest.raises(ValueError) as err:
        ImageFolder(tmp_path, classes=False)
    lines = {line.split(":")[0].strip(): line for line in str(err.value).splitlines()[1:-1]}
    assert sorted(lines) == sorted(broken)
    for name, word in broken.items():
        assert any(part in lines[name] for part in word.split("|")), lines[name]
    assert "on_error='skip'" in str(err.value)
    assert tree(tmp_path / ".") == before


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_skip_warns_once_with_the_names(tmp_path, broken):
    with pytest.warns(UserWarning) as record:
        data = ImageFolder(tmp_path, classes=False, on_error="skip")
    texts = [str(w.message) for w in record if w.category is UserWarning]
    assert len(texts) == 1 and all(name in texts[0] for name in broken)
    assert data.names == ["good.jpg", "good.png"] and len(data) == 2
    assert record[0].filename == __file__ or "DecompressionBomb" in str(record[0].category)


def test_a_real_bomb_is_refused_by_name_quickly(tmp_path):
    """A PNG header that promises 60,000 x 60,000 pixels: Pillow itself raises."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    with pytest.raises(ValueError, match="bomb.png: DecompressionBombError"):
        ImageFolder(tmp_path)


def test_a_text_bomb_in_a_png_is_refused_by_name(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    save(tmp_path / "a.png", grey(), pnginfo=info)
    with pytest.raises(ValueError, match="a.png: ValueError"):
        ImageFolder(tmp_path)


def test_nothing_left_is_refused_even_when_skipping(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="a.jpg: an empty file"):
        ImageFolder(tmp_path, on_error="skip")


def test_a_file_that_breaks_later_is_named(tmp_path):
    path = save(tmp_path / "a.png", grey())
    data = ImageFolder(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(OSError, match=r"a\.png: fine when it was checked"):
        data[0]


@pytest.mark.parametrize("options, words", [
    ({"size": 0}, "size: got 0"), ({"size": (8, 0)}, "size"), ({"size": 2.5}, "size"), ({"size": (1, 2, 3)}, "size"),
    ({"crop": "random"}, "crop"), ({"on_error": "ignore"}, "on_error"), ({"cache": "yes"}, "cache"),
    ({"captions": "names"}, "captions"), ({"classes": "yes"}, "classes"),
])
def test_wrong_options_say_what_was_got(tmp_path, options, words):
    save(tmp_path / "a.png", grey())
    with pytest.raises((ValueError, TypeError), match=words):
        ImageFolder(tmp_path, **options)


# --- remembering ------------------------------------------------------------------------------------------------------


def test_second_start_decodes_nothing_and_new_files_only(tmp_path, monkeypatch):
    root, cache = tmp_path / "pictures", tmp_path / "run"
    for i in range(5):
        save(root / f"{i}.png", photo(seed=i))
    before, calls, real = tree(root), [], folders.read_image
    monkeypatch.setattr(folders, "read_image", lambda path, *rest: calls.append(Path(path).name) or real(path, *rest))
    first = ImageFolder(root, cache_dir=cache)
    assert sorted(calls) == [f"{i}.png" for i in range(5)]
    calls.clear()
    second = ImageFolder(root, cache_dir=cache)
    assert calls == [] and second.sizes == first.sizes == [(40, 60)] * 5
    assert second.fingerprint() == first.fingerprint()
    save(root / "new.png")
    os.utime(root / "2.png", ns=(1, 1))
    third = ImageFolder(root, cache_dir=cache)
    assert sorted(calls) == ["2.png", "new.png"] and third.fingerprint() != first.fingerprint()
    assert {p: v for p, v in tree(root).items() if p.name in "0.png1.png"} == {p: v for p, v in before.items() if p.name in "0.png1.png"}


def test_broken_files_are_never_remembered_as_good(tmp_path):
    root, cache = tmp_path / "pictures", tmp_path / "run"
    save(root / "a.png")
    (root / "b.png").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ValueError, match="b.png"):
            ImageFolder(root, cache_dir=cache)
    save(root / "b.png")
    assert len(ImageFolder(root, cache_dir=cache)) == 2


def test_a_damaged_index_is_named(tmp_path):
    save(tmp_path / "pictures" / "a.png")
    ImageFolder(tmp_path / "pictures", cache_dir=tmp_path / "run")
    index, = (tmp_path / "run").iterdir()
    index.write_text("{")
    with pytest.raises(ValueError, match=index.name):
        ImageFolder(tmp_path / "pictures", cache_dir=tmp_path / "run")


def test_two_folders_share_one_cache_dir(tmp_path):
    for kind in ("train", "test"):
        save(tmp_path / kind / f"{kind}.png", photo(seed=len(kind)))
        ImageFolder(tmp_path / kind, cache_dir=tmp_path / "run")
    assert len(list((tmp_path / "run").iterdir())) == 2


def test_fingerprint_changes_with_pixels_not_with_captions(tmp_path):
    save(tmp_path / "a" / "x.png")
    save(tmp_path / "a" / "y.png")
    base = ImageFolder(tmp_path, 16)
    same = [ImageFolder(tmp_path, 16), ImageFolder(tmp_path, (16, 16), captions="filename", classes=False, cache=False)]
    assert {d.fingerprint() for d in same} == {base.fingerprint()}
    others = [ImageFolder(tmp_path, 17), ImageFolder(tmp_path, 16, crop="stretch"), ImageFolder(tmp_path / "a", 16)]
    (tmp_path / "a" / "y.png").rename(tmp_path / "a" / "z.png")
    others.append(ImageFolder(tmp_path, 16))
    save(tmp_path / "a" / "z.png", photo(seed=3))
    others.append(ImageFolder(tmp_path, 16))
    assert len({d.fingerprint() for d in others} | {base.fingerprint()}) == 6


def test_fingerprint_is_the_same_where_the_folder_moves(tmp_path):
    save(tmp_path / "here" / "x.png")
    first = ImageFolder(tmp_path / "here", 16).fingerprint()
    (tmp_path / "here").rename(tmp_path / "there")
    assert ImageFolder(tmp_path / "there", 16).fingerprint() == first


@pytest.mark.parametrize("cache", [True, False, "auto"])
def test_cache_changes_nothing_but_time(tmp_path, cache, monkeypatch):
    for i in range(4):
        save(tmp_path / f"{i}.png", photo(seed=i))
    data, calls, real = ImageFolder(tmp_path, 16, cache=cache), [], folders.read_image
    monkeypatch.setattr(folders, "read_image", lambda path, *rest: calls.append(path) or real(path, *rest))
    plain = torch.stack([item["image"] for item in ImageFolder(tmp_path, 16, cache=False)])
    calls.clear()
    for _ in range(2):
        torch.testing.assert_close(torch.stack([item["image"] for item in data]), plain, rtol=0, atol=0)
    assert len(calls) == (8 if cache is False else 4)


def test_auto_cache_has_a_limit(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    monkeypatch.setattr(folders, "CACHE_BYTES", 3 * 16 * 16)
    assert ImageFolder(tmp_path, 16)._cache is not None
    assert ImageFolder(tmp_path, 17)._cache is None
    assert ImageFolder(tmp_path, 17, cache=True)._cache is not None


# --- classes and captions ---------------------------------------------------------------------------------------------


def test_classes_from_folders(tmp_path):
    for name in ["zebra/a.png", "ant/b.png", "ant/deep/c.png"]:
        save(tmp_path / name)
    data = ImageFolder(tmp_path, 8)
    assert data.class_names == ["ant", "zebra"] and data.labels == [0, 0, 1]
    assert [item["label"] for item in data] == [0, 0, 1] and set(data[0]) == {"image", "label"}
    assert set(ImageFolder(tmp_path, 8, classes=False)[0]) == {"image"}


def test_flat_folder_has_no_classes_and_a_mixture_is_refused(tmp_path):
    save(tmp_path / "a.png")
    data = ImageFolder(tmp_path, 8)
    assert data.class_names is None and data.labels is None and set(data[0]) == {"image"}
    with pytest.raises(ValueError, match="a.png"):
        ImageFolder(tmp_path, 8, classes=True)
    save(tmp_path / "sub" / "b.png")
    with pytest.raises(ValueError, match="got 1 images outside class folders .such as a.png. and 1 inside"):
        ImageFolder(tmp_path, 8)
    assert len(ImageFolder(tmp_path, 8, classes=False)) == 2


def test_skipped_files_do_not_renumber_the_classes(tmp_path):
    save(tmp_path / "b" / "b.png")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="a/a.png"):
        data = ImageFolder(tmp_path, 8, on_error="skip")
    assert data.class_names == ["a", "b"] and data[0]["label"] == 1


@pytest.mark.parametrize("name, caption", [
    ("a_red_bird.jpg", "a red bird"), ("birds/A red bird (2).jpg", "A red bird"), ("a-red-bird-003.png", "a red bird"),
    ("a_t-shirt_12.png", "a t-shirt"), ("two__spaces.png", "two spaces"), ("2_cats.png", "2 cats"), ("bird.tar.png", "bird.tar"),
    ("ein_Käfer_7.png", "ein Käfer"), ("лиса_2.png", "лиса"),
])
def test_caption_from_name(name, caption):
    assert caption_from_name(name) == caption


def test_captions_from_names(tmp_path):
    save(tmp_path / "a_red_bird.jpg")
    save(tmp_path / "birds" / "a_blue_bird_02.png")
    data = ImageFolder(tmp_path, 8, captions="filename", classes=False)
    assert data.captions == ["a red bird", "a blue bird"] and data[1]["caption"] == "a blue bird"
    save(tmp_path / "0001.png")
    save(tmp_path / "___.png")
    with pytest.raises(ValueError, match=r"(?s)0001.png: no caption.*___.png: no caption"):
        ImageFolder(tmp_path, 8, captions="filename", classes=False)


def test_captions_from_sidecars(tmp_path):
    for stem in ("a", "b", "c", "d"):
        save(tmp_path / f"{stem}.png")
    (tmp_path / "a.txt").write_text("\ufeffein schöner\n Vogel \n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("   \n")
    (tmp_path / "c.txt").write_bytes("Käfer".encode("utf-16"))
    with pytest.raises(ValueError) as err:
        ImageFolder(tmp_path, 8, captions="sidecar")
    assert all(f"{s}.png: " in str(err.value) for s in "bcd") and "a.png" not in str(err.value)
    with pytest.warns(UserWarning, match="b.png"):
        assert ImageFolder(tmp_path, 8, captions="sidecar", on_error="skip").captions == ["ein schöner Vogel"]


def write_csv(path, rows, columns=("file_name", "text")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def write_jsonl(path, rows, columns=("file_name", "text")):
    path.write_text("\n".join(json.dumps(dict(zip(columns, row))) for row in rows) + "\n\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix, write", [(".csv", write_csv), (".jsonl", write_jsonl)])
def test_captions_from_a_table(tmp_path, suffix, write, monkeypatch):
    root = tmp_path / "pictures"
    save(root / "a.png")
    save(root / "sub" / "b.png")
    table = write(root / f"metadata{suffix}", [("sub\\b.png", 'two, "quoted"\nlines'), ("./a.png", "a bird")])
    expected = ["a bird", 'two, "quoted" lines']
    for source in (table, str(table), f"metadata{suffix}"):
        assert ImageFolder(root, 8, captions=source, classes=False).captions == expected
    monkeypatch.chdir(tmp_path)
    write(tmp_path / f"elsewhere{suffix}", [("a.png", "a bird"), ("sub/b.png", "b")])
    assert ImageFolder(root, 8, captions=f"elsewhere{suffix}", classes=False).captions == ["a bird", "b"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ImageFolder(root, 8, captions=f"nowhere{suffix}", classes=False)


@pytest.mark.parametrize("suffix, write", [(".csv", write_csv), (".jsonl", write_jsonl)])
def test_bad_tables_are_refused_with_file_and_entry(tmp_path, suffix, write):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    path = tmp_path / f"metadata{suffix}"
    write(path, [("a.png", "a bird"), ("c.png", "gone")])
    with pytest.raises(ValueError, match=r"(?s)b.png: no caption.*c.png: has a caption.*not there"):
        ImageFolder(tmp_path, 8, captions=path)
    write(path, [("a.png", "a bird"), ("a.png", "again")])
    with pytest.raises(ValueError, match=f"metadata{suffix}, entry 2.*twice"):
        ImageFolder(tmp_path, 8, captions=path)
    write(path, [("a.png", "a bird")], columns=("image", "caption"))
    with pytest.raises(ValueError, match=f"metadata{suffix}, entry 1.*expected a file_name and a text"):
        ImageFolder(tmp_path, 8, captions=path)
    path.write_text('{"file_name": "a.png", "text": 3}\n' if suffix == ".jsonl" else "file_name,text\na.png\n")
    with pytest.raises(ValueError, match="metadata|no caption"):
        ImageFolder(tmp_path, 8, captions=path)
    path.write_text("{broken\n")
    with pytest.raises(ValueError, match=f"metadata{suffix}"):
        ImageFolder(tmp_path, 8, captions=path)


@pytest.mark.parametrize("caption, safe", [
    ("a bird", True), ("a bird Left of a fox", False), ("the right-hand side", False), ("bright leaves", True),
])
def test_flip_safe(tmp_path, caption, safe):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(caption)
    assert ImageFolder(tmp_path, 8, captions="sidecar").flip_safe is safe
    assert ImageFolder(tmp_path, 8).flip_safe is True


@pytest.mark.parametrize("names, safe", [(("left_turn", "ahead"), False), (("turn_Right", "ahead"), False), (("bright", "cleft"), True)])
def test_names_of_classes_may_say_left_and_right(tmp_path, names, safe):
    for name in names:
        save(tmp_path / name / "a.png")
    data = ImageFolder(tmp_path, 8)
    assert data.flip_safe is safe and ImageFolder(tmp_path, 8, classes=False).flip_safe is True


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def zoo(tmp_path):
    """12 pictures of mixed shapes in 2 classes, named by what is on them."""
    for i in range(12):
        kind = "bird" if i % 3 else "fox"
        save(tmp_path / "zoo" / kind / f"a_small_{kind}_{i:02d}.png", photo(*[(40, 60), (60, 40), (50, 50), (30, 90)][i % 4], seed=i))
    return tmp_path / "zoo"


@pytest.mark.parametrize("cache, context", [(True, "fork"), (False, "fork"), (True, "spawn"), (True, "forkserver")])
def test_dataloader_with_two_workers(zoo, cache, context):
    data = ImageFolder(zoo, 16, captions="filename", cache=cache)
    plain = next(iter(DataLoader(ImageFolder(zoo, 16, captions="filename", cache=False), batch_size=12)))
    loader = DataLoader(data, batch_size=5, num_workers=2, multiprocessing_context=context)
    for _ in range(2 if context == "fork" else 1):
        batches = list(loader)
        assert [len(b["caption"]) for b in batches] == [5, 5, 2]
        images = check_images(torch.cat([b["image"] for b in batches]))
        torch.testing.assert_close(images, plain["image"], rtol=0, atol=0)
    assert batches[0]["label"].dtype == torch.int64 and batches[0]["caption"][0] == "a small bird"
    if cache and (context == "fork" or sys.platform == "linux"):
        assert data._cache.filled.all(), "what workers have decoded is there for all"


def test_a_pickle_of_a_data_set_holds_no_pictures(zoo):
    data = ImageFolder(zoo, 256, cache=True)
    items, packed = data.items(range(12)), pickle.dumps(data)
    assert len(packed) < 10_000 < data._cache.rows.nbytes and data._cache.filled.all()
    again = pickle.loads(packed)
    assert not again._cache.filled.any() and again.fingerprint() == data.fingerprint()
    for item, other in zip(items, again.items(range(12))):
        torch.testing.assert_close(item["image"], other["image"], rtol=0, atol=0)
    again._cache.rows[:] = 0
    torch.testing.assert_close(data[3]["image"], items[3]["image"], rtol=0, atol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_caches_give_their_files_back():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        folders.ByteCache(4, (3, 8, 8)).get(1, lambda: 7)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_items_indices_and_sizes(zoo):
    data = ImageFolder(zoo, (8, 24))
    assert data[0]["image"].shape == (3, 8, 24) and data[0]["image"].is_contiguous()
    assert data[-1]["image"].equal(data[11]["image"])
    with pytest.raises(IndexError):
        data[12]
    assert len(list(data)) == 12
    items = data.__getitems__([3, 1])
    assert items[0]["image"].equal(data[3]["image"]) and items[1]["label"] == data[1]["label"]
    assert data.items([0], (20, 10))[0]["image"].shape == (3, 20, 10)


def test_items_of_a_cached_set_may_be_changed_without_harm(zoo):
    data = ImageFolder(zoo, 8, cache=True)
    first = data[0]["image"].clone()
    data[0]["image"].zero_()
    assert data[0]["image"].equal(first)


def test_the_same_folder_gives_the_same_items_however_it_was_written(tmp_path):
    names = [f"{i}.png" for i in range(6)]
    for root, order in ((tmp_path / "a", names), (tmp_path / "b", names[::-1])):
        for name in order:
            save(root / name, photo(seed=int(name[0])))
    a, b = ImageFolder(tmp_path / "a", 8), ImageFolder(tmp_path / "b", 8, workers=1)
    assert a.names == b.names
    assert all(x["image"].equal(y["image"]) for x, y in zip(a, b))


# --- splits -----------------------------------------------------------------------------------------------------------


def test_split_is_a_partition_decided_by_the_seed(zoo):
    data = ImageFolder(zoo, 8, captions="filename")
    train, validation = train_validation_split(data, 0.25, seed=3)
    assert (len(train), len(validation)) == (9, 3) and sorted(train.names + validation.names) == data.names
    again, other = train_validation_split(data, 0.25, seed=3), train_validation_split(data, 0.25, seed=4)
    assert again[0].indices == train.indices and other[1].indices != validation.indices
    assert train[0]["image"].equal(data[train.indices[0]]["image"])
    assert train.__getitems__([1])[0]["caption"] == train.captions[1]
    assert train.class_names == ["bird", "fox"] and train.flip_safe and len(train.labels) == len(train.sizes) == 9
    assert len({data.fingerprint(), train.fingerprint(), validation.fingerprint(), other[0].fingerprint()}) == 4
    assert again[0].fingerprint() == train.fingerprint()
    assert next(iter(DataLoader(train, batch_size=9)))["image"].shape == (9, 3, 8, 8)


class Named(list):
    """A data set of so many items with names, as files have."""

    def __init__(self, n, first=0):
        super().__init__(range(n))
        self.names = [f"photos/IMG_{i:05d}.jpg" for i in range(first, first + n)]


def sides(data, **options):
    train, validation = train_validation_split(data, **options)
    return set(train.names), set(validation.names)


@pytest.mark.parametrize("n", [2, 19, 100, 101, 999])
def test_one_file_more_or_less_changes_the_side_of_one_other_at_most(n):
    for seed, data, more in [(s, Named(n), Named(n + 1, first)) for s in range(8) for first in (0, -1)]:
        (train, validation), (trained, unseen) = sides(data, seed=seed), sides(more, seed=seed)
        assert len(train & unseen | validation & trained) <= 1


def test_what_a_grown_folder_keeps_aside_was_not_trained_on():
    """But for a few at the edge: a shuffle would put in nine of ten."""
    train, _ = sides(Named(1000))
    for more in (1, 10, 100, 1000):
        _, unseen = sides(Named(1000 + more))
        assert len(train & unseen) <= 0.1 * len(unseen), more


def test_the_split_is_fair_and_differs_between_seeds():
    data = Named(4000)
    kept = [sides(data, seed=seed)[1] for seed in range(12)]
    assert all(len(k) == 400 for k in kept)
    for k in kept:  # by place: each tenth of the folder gives its share, 40 +- 4 standard deviations
        counts = np.bincount([data.names.index(name) // 400 for name in k], minlength=10)
        assert abs(counts - 40).max() <= 4 * 6
    both = [len(a & b) for i, a in enumerate(kept) for b in kept[:i]]
    assert abs(np.mean(both) - 40) < 4, "two seeds share a tenth of a tenth"


def test_items_without_names_are_split_by_their_place():
    train, validation = train_validation_split(range(50))
    again, unseen = train_validation_split(range(51))
    assert len(set(train.indices) & set(unseen.indices)) <= 1 and (train.names, again.names) == (None, None) and len(validation) == 5


def test_names_that_are_not_unicode_are_split_too():
    data = Named(4)
    data.names[2] = "caf\udce9.png"
    assert sum(map(len, train_validation_split(data))) == 4


@pytest.mark.parametrize("n, fraction, sizes", [(2, 0.001, (1, 1)), (2, 0.999, (1, 1)), (10, 0.5, (5, 5)), (1000, 0.1, (900, 100))])
def test_split_sizes(n, fraction, sizes):
    assert tuple(map(len, train_validation_split(range(n), fraction))) == sizes


@pytest.mark.parametrize("n, fraction", [(1, 0.5), (10, 0), (10, 1), (10, -1), (0, 0.5)])
def test_split_refuses(n, fraction):
    with pytest.raises(ValueError, match=f"got fraction {fraction} of {n} items"):
        train_validation_split(range(n), fraction)


# --- buckets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, step, aspect", [(256, 32, 2.0), (32, 8, 2.0), (512, 64, 3.0), (64, 64, 2.0), (1024, 64, 4.0), (32, 4, 1.0)])
def test_buckets(size, step, aspect):
    buckets = make_buckets(size, step, aspect)
    assert (size, size) in buckets and len(set(buckets)) == len(buckets)
    assert {(w, h) for h, w in buckets} == set(buckets)
    for h, w in buckets:
        assert h % step == w % step == 0 and max(h, w) <= aspect * min(h, w)
        assert abs(h * w / size**2 - 1) <= 0.15


@pytest.mark.parametrize("arguments", [(30, 8), (0, 8), (32, 0), (32, 8, 0.5)])
def test_buckets_refuse(arguments):
    with pytest.raises(ValueError, match="expected step to divide size"):
        make_buckets(*arguments)


def test_nearest_bucket_is_nearest_in_ratio():
    buckets = [(16, 32), (32, 16), (24, 24)]
    assert nearest_bucket(100, 100, buckets) == (24, 24)
    assert nearest_bucket(100, 142, buckets) == (16, 32) and nearest_bucket(142, 100, buckets) == (32, 16)
    assert nearest_bucket(100, 140, buckets) == (24, 24) and nearest_bucket(140, 100, buckets) == (24, 24)
    assert nearest_bucket(1, 1000, buckets) == (16, 32)


def test_bucketed_batches(zoo):
    data = ImageFolder(zoo, 32, captions="filename", cache=False)
    batches = BucketedBatches(data, 2, make_buckets(32, 8), seed=1)
    seen = [i for _, indices in batches.plan for i in indices]
    assert sorted(seen) == list(range(12))
    shapes = set()
    for (bucket, indices), batch in zip(batches.plan, DataLoader(batches, batch_size=None, num_workers=2)):
        assert batch["image"].shape == (len(indices), 3, *bucket)
        check_images(batch["image"])
        assert batch["caption"] == [data.captions[i] for i in indices] and batch["label"].tolist() == [data.labels[i] for i in indices]
        assert all(nearest_bucket(*data.sizes[i], make_buckets(32, 8)) == bucket for i in indices)
        shapes.add(bucket)
    assert len(shapes) >= 3


def test_bucketed_batches_depend_on_seed_and_epoch_only(zoo):
    data = ImageFolder(zoo, 32, cache=False)
    def plan(seed, epoch):
        batches = BucketedBatches(data, 2, make_buckets(32, 8), seed=seed)
        batches.set_epoch(epoch)
        return batches.plan
    assert plan(0, 3) == plan(0, 3) and plan(0, 3) != plan(0, 4) and plan(0, 3) != plan(1, 3)
    buckets = make_buckets(32, 8)
    assert BucketedBatches(data, 2, buckets[::-1]).plan == BucketedBatches(data, 2, buckets).plan


def test_bucketed_batches_drop_the_rest_and_share_among_processes(zoo):
    data = ImageFolder(zoo, 32, cache=False)
    whole = BucketedBatches(data, 2, make_buckets(32, 8), drop_last=True)
    assert all(len(indices) == 2 for _, indices in whole.plan)
    parts = [list(DistributedSampler(whole, num_replicas=2, rank=r, shuffle=False, drop_last=True)) for r in (0, 1)]
    assert not set(parts[0]) & set(parts[1])


def test_bucketed_batches_of_a_part(zoo):
    train, _ = train_validation_split(ImageFolder(zoo, 32, captions="filename"), 0.25)
    batches = BucketedBatches(train, 4, make_buckets(32, 8))
    assert sorted(c for b in batches for c in b["caption"]) == sorted(train.captions)


def test_bucketed_batches_refuse(zoo):
    data = ImageFolder(zoo, 32)
    for arguments in ((range(3), 2, [(8, 8)]), (data, 0, [(8, 8)]), (data, 2, [])):
        with pytest.raises(ValueError, match="expected an ImageFolder or a part of one"):
            BucketedBatches(*arguments)


# --- torchvision's data sets, from tiny files in their real formats ---------------------------------------------------


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision checks its downloads by MD5; our tiny files have other sums."""
    for module in ("cifar", "flowers102", "celeba"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).exists())


def write_cifar(root):
    base, rng = root / "cifar-10-batches-py", np.random.default_rng(0)
    base.mkdir(parents=True)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        with open(base / name, "wb") as file:
            pickle.dump({"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 9]}, file)
    with open(base / "batches.meta", "wb") as file:
        pickle.dump({"label_names": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]}, file)
    return base


def test_cifar10(tmp_path, unchecked):
    base = write_cifar(tmp_path)
    data = from_torchvision("CIFAR10", tmp_path, size=32)
    test = from_torchvision("CIFAR10", tmp_path, size=32, split="test")
    assert len(data) == 20 and len(test) == 4 and data.class_names[9] == "truck" and data.flip_safe
    with open(base / "data_batch_1", "rb") as file:
        pixels = pickle.load(file)["data"][3].reshape(3, 32, 32)
    assert data[3]["label"] == 9
    torch.testing.assert_close(data[3]["image"], torch.from_numpy(pixels).float() / 127.5 - 1)
    assert len({d.fingerprint() for d in (data, test, from_torchvision("CIFAR10", tmp_path, size=16))}) == 3
    batch = next(iter(DataLoader(from_torchvision("CIFAR10", tmp_path, size=16, cache=False), batch_size=8, num_workers=2)))
    assert batch["image"].shape == (8, 3, 16, 16) and batch["label"].dtype == torch.int64
    train, _ = train_validation_split(data, 0.2)
    assert isinstance(train, Part) and train.class_names == data.class_names
    assert isinstance(data, Pictures)
    with pytest.raises(ValueError, match="got Pictures"):
        BucketedBatches(data, 2, [(8, 8)])


def test_fashion_mnist(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(3 * 28 * 28, dtype=np.uint32).reshape(3, 28, 28).astype(np.uint8)
    for kind in ("train", "t10k"):
        (raw / f"{kind}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 3, 28, 28) + pixels.tobytes())
        (raw / f"{kind}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 3) + bytes([9, 0, 5]))
    data = from_torchvision("FashionMNIST", tmp_path, size=28)
    assert [item["label"] for item in data] == [9, 0, 5] and data.class_names[9] == "Ankle boot"
    torch.testing.assert_close(data[1]["image"], (torch.from_numpy(pixels[1]).float() / 127.5 - 1).expand(3, 28, 28))
    assert from_torchvision("FashionMNIST", tmp_path, split="test", size=32)[0]["image"].shape == (3, 32, 32)


def fake_scipy(monkeypatch):
    """scipy is not a requirement: only torchvision's reading of two small .mat files needs it."""
    tables = {"setid.mat": {"trnid": np.array([1, 2]), "valid": np.array([3]), "tstid": np.array([4])},
              "imagelabels.mat": {"labels": np.array([1, 102, 3, 4])}}
    module = types.ModuleType("scipy.io")
    module.loadmat = lambda path, **_: tables[Path(path).name]
    monkeypatch.setitem(sys.modules, "scipy", types.ModuleType("scipy"))
    monkeypatch.setitem(sys.modules, "scipy.io", module)


def test_flowers102(tmp_path, unchecked, monkeypatch):
    base = tmp_path / "flowers-102"
    for i in range(1, 5):
        save(base / "jpg" / f"image_{i:05d}.jpg", photo(seed=i))
    for name in ("setid.mat", "imagelabels.mat"):
        (base / name).write_bytes(b"")
    fake_scipy(monkeypatch)
    splits = {s: from_torchvision("Flowers102", tmp_path, size=16, split=s) for s in ("train", "validation", "test")}
    assert {s: len(d) for s, d in splits.items()} == {"train": 2, "validation": 1, "test": 1}
    assert splits["train"].labels == [0, 101] and len(splits["train"].class_names) == 102
    assert splits["test"][0]["image"].shape == (3, 16, 16)


def test_flowers102_without_scipy_says_so(tmp_path, unchecked, monkeypatch):
    (tmp_path / "flowers-102" / "jpg").mkdir(parents=True)
    for name in ("setid.mat", "imagelabels.mat"):
        (tmp_path / "flowers-102" / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match="Flowers102.*scipy"):
        from_torchvision("Flowers102", tmp_path)


def test_celeba_attributes_become_captions(tmp_path, unchecked):
    base = tmp_path / "celeba"
    names = [f"{i:06d}.jpg" for i in range(1, 5)]
    for i, name in enumerate(names):
        save(base / "img_align_celeba" / name, photo(seed=i))
    (base / "list_attr_celeba.txt").write_text("4\n5_o_Clock_Shadow Smiling Young\n" + "".join(f"{n} {a}\n" for n, a in zip(names, ["1 -1  1", "-1  1 -1", "-1 -1 -1", "1 1 1"])))
    (base / "list_eval_partition.txt").write_text("".join(f"{n} {k}\n" for n, k in zip(names, (0, 0, 1, 1))))
    (base / "identity_CelebA.txt").write_text("".join(f"{n} 7\n" for n in names))
    (base / "list_bbox_celeba.txt").write_text("3\nid x y w h\n" + "".join(f"{n} 0 0 9 9\n" for n in names))
    (base / "list_landmarks_align_celeba.txt").write_text("3\n" + " ".join("abcdefghij") + "\n" + "".join(f"{n} 0 0 0 0 0 0 0 0 0 0\n" for n in names))
    data = from_torchvision("CelebA", tmp_path, size=16)
    assert data.captions == ["a face, 5 o clock shadow, young", "a face, smiling"] and data.labels is None
    assert data[0]["image"].shape == (3, 16, 16)
    assert from_torchvision("CelebA", tmp_path, size=16, split="validation").captions[0] == "a face"


@pytest.mark.parametrize("name", folders.TORCHVISION)
def test_missing_files_say_how_to_get_them(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"(?s){name}.*download=True.*MB|GB"):
        from_torchvision(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_names_and_splits_list_the_known(tmp_path):
    with pytest.raises(ValueError, match="CIFAR10.*did you mean"):
        from_torchvision("CIFAR-10", tmp_path)
    with pytest.raises(ValueError, match="split of CIFAR10: got 'validation', expected one of 'train', 'test'"):
        from_torchvision("CIFAR10", tmp_path, split="validation")


# --- small pieces and real images -------------------------------------------------------------------------------------


def test_as_size_and_to_rgb_keep_what_is_right():
    assert as_size(5) == (5, 5) and as_size([4, 6]) == (4, 6)
    image = photo()
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    root = tmp_path_factory.mktemp("cifar")
    with zipfile.ZipFile(CIFAR) as archive:
        archive.extractall(root, [n for n in archive.namelist() if n.endswith(".jpg") and int(n[-8:-4]) < 100])
    return root / "test"


@needs_cifar
def test_real_images(cifar, tmp_path):
    data = ImageFolder(cifar, 32, cache_dir=tmp_path)
    assert len(data) == 1000 and len(data.class_names) == 10 and data.class_names[0] == "airplane"
    assert set(data.sizes) == {(32, 32)} and np.bincount(data.labels).tolist() == [100] * 10
    batch = check_images(next(iter(DataLoader(data, batch_size=1000)))["image"])
    assert -0.2 < batch.mean() < 0.1 and 0.4 < batch.std() < 0.6
    with Image.open(cifar / data.names[123]) as image:
        expected = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(data[123]["image"], expected)


@needs_cifar
def test_real_images_in_buckets_and_parts(cifar, tmp_path):
    data = ImageFolder(cifar, 32, cache_dir=tmp_path)
    train, validation = train_validation_split(data, 0.1)
    assert len(validation) == 100 and not set(train.names) & set(validation.names)
    batches = BucketedBatches(validation, 32, make_buckets(32, 8))
    assert {b["image"].shape[1:] for b in batches} == {(3, 32, 32)}
