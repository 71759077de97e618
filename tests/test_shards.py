"""ldm_edu.shards and tar_images: what a folder gives, shards give; hostile tars are named; any step of any run finds its items."""
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import warnings

import numpy as np
import pytest
import shards_toy as toy
import torch
from PIL import Image
from test_folders import MODES, photo, save
from torch import nn
from torch.utils.data import DataLoader

from ldm_edu import cli, tar_images
from ldm_edu.core import derive_seed, read_json
from ldm_edu.folders import ImageFolder, Part, WithField, train_validation_split
from ldm_edu.runs import NonFiniteLoss
from ldm_edu.shards import ShardFiles, ShardOrder, expand_braces, find_shards, holds_shards, scan_shard
from ldm_edu.tar_images import TarImages, open_pictures, pack_images
from ldm_edu.training import TrainConfig, TrainingTask, batch_indices, epoch_order, train


def png(seed=0, size=(40, 60)):
    out = io.BytesIO()
    photo(*size, seed=seed).save(out, "PNG")
    return out.getvalue()


def make_tar(path, members, mode="w"):
    """A tar of (name, bytes) or (name, function that changes the header)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if callable(content):
                content(member)
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def kind(type_, to=""):
    def change(member):
        member.type, member.linkname = type_, to
    return change


@pytest.fixture
def zoo(tmp_path):
    """24 pictures in 2 classes with captions, as a folder and packed."""
    for i in range(24):
        name = f"{'bird' if i % 3 else 'fox'}/{i:02d}"
        save(tmp_path / "zoo" / f"{name}.png", photo(*[(40, 60), (60, 40), (50, 50)][i % 3], seed=i))
        (tmp_path / "zoo" / f"{name}.txt").write_text(f"an animal, number {'one' if i == 1 else i}")
    pack_images(tmp_path / "zoo", tmp_path / "shards", megabytes=0.02, captions="sidecar")
    return tmp_path


def assert_same_items(folder, packed, inside=lambda name: name.split(".tar/")[1]):
    place = {inside(name): i for i, name in enumerate(packed.names)}
    assert sorted(place) == sorted(folder.names) and len(packed) == len(folder)
    for i, name in enumerate(folder.names):
        a, b = folder[i], packed[place[name]]
        assert a.keys() == b.keys() and a["image"].equal(b["image"]) and all(a[key] == b[key] for key in a if key != "image"), name
        assert folder.sizes[i] == packed.sizes[place[name]]
    assert folder.class_names == packed.class_names and folder.flip_safe == packed.flip_safe


# --- the same as a folder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop, background, cache", [("center", (255, 255, 255), True), ("stretch", (0, 0, 255), False)])
def test_every_mode_of_picture_is_that_of_the_folder(tmp_path, crop, background, cache):
    for name, (image, options, _, _) in MODES.items():
        save(tmp_path / "odd" / name, image, **options)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "odd" / "turned.jpg", photo(), exif=exif)
    save(tmp_path / "odd" / "LOUD.JPG", photo(seed=3), format="JPEG")
    pack_images(tmp_path / "odd", tmp_path / "shards", megabytes=0.02, seed=None)  # by name: in the folder's order
    options = {"size": (24, 16), "crop": crop, "background": background, "cache": cache}
    folder, packed = ImageFolder(tmp_path / "odd", **options), TarImages(tmp_path / "shards", **options)
    assert len(find_shards(tmp_path / "shards")) > 1
    assert len(packed) == len(folder) == len(MODES) + 2 and packed.sizes == folder.sizes
    for i, name in enumerate(folder.names):
        assert packed.names[i].lower().endswith(name[-4:].lower()) and packed[i]["image"].equal(folder[i]["image"]), name


def test_classes_and_captions_are_those_of_the_folder(zoo):
    packed = TarImages(zoo / "shards", 16, captions="sidecar")
    assert_same_items(ImageFolder(zoo / "zoo", 16, captions="sidecar"), packed)
    assert packed.class_names == ["bird", "fox"] and packed.flip_safe
    assert_same_items(ImageFolder(zoo / "zoo", 16, classes=False), TarImages(zoo / "shards", 16, classes=False))


def test_real_images_are_those_of_the_folder(cifar_folder, tmp_path):
    paths = pack_images(cifar_folder, tmp_path / "shards", megabytes=0.2)
    folder, packed = ImageFolder(cifar_folder, 32), TarImages(tmp_path / "shards", 32)
    assert len(paths) > 3 and len(packed) == 600
    assert_same_items(folder, packed)
    assert np.bincount(packed.labels).tolist() == np.bincount(folder.labels).tolist() and len(packed.class_names) == 10


def test_tables_json_and_names_give_captions(tmp_path):
    told = json.dumps({"caption": "a grey cat", "width": 3}).encode()
    make_tar(tmp_path / "0.tar", [("a_red_bird_02.png", png()), ("a_red_bird_02.json", told), ("fox.png", png(1)), ("fox.json", b'{"text": "a fox"}')])
    assert TarImages(tmp_path, 8, captions="json").captions == ["a grey cat", "a fox"]
    assert TarImages(tmp_path, 8, captions="filename").captions == ["a red bird", "fox"]
    (tmp_path / "meta.csv").write_text("file_name,text\na_red_bird_02.png,a robin\nfox.png,vulpes\n")
    assert TarImages(tmp_path, 8, captions="meta.csv").captions == ["a robin", "vulpes"]
    (tmp_path / "meta.csv").write_text("file_name,text\na_red_bird_02.png,a robin\nwolf.png,lupus\n")
    with pytest.raises(ValueError) as err:
        TarImages(tmp_path, 8, captions="meta.csv")
    assert "0.tar/fox.png: no caption" in str(err.value) and "wolf.png: has a caption in meta.csv, but is not there" in str(err.value)
    with pytest.raises(ValueError, match="0.tar/a_red_bird_02.png: no caption in words of UTF-8 .sidecar."):
        TarImages(tmp_path, 8, captions="sidecar")
    with pytest.raises(ValueError, match="captions: got 'names', expected None, 'filename', 'sidecar', 'json'"):
        TarImages(tmp_path, 8, captions="names")


@pytest.mark.parametrize("cls, words", [(b"cat", "got 'cat' for a class, expected a number"), (b"-1", "got '-1'"), (b"1000000", "got '1000000' .* 0...99999"),
                                        (b"\xff", "got nothing"), (None, "got nothing for a class")])
def test_bad_classes_are_named(tmp_path, cls, words):
    make_tar(tmp_path / "0.tar", [("a.png", png()), ("a.cls", b"3"), ("b.png", png(1)), *([("b.cls", cls)] if cls is not None else [])])
    with pytest.raises(ValueError, match=rf"0.tar/b.png: {words}"):
        TarImages(tmp_path, 8)
    with pytest.warns(UserWarning, match="0.tar/b.png"):
        data = TarImages(tmp_path, 8, on_error="skip")
    assert data.labels == [3] and data.class_names == ["0", "1", "2", "3"]
    assert TarImages(tmp_path, 8, classes=False).labels is None


def test_webdataset_reads_our_shards_and_we_read_theirs(zoo, tmp_path):
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed: the layout is compared with our own reading of it only")
    paths = [str(path) for path in find_shards(zoo / "shards")]
    theirs = {sample["__key__"]: sample for sample in wds.WebDataset(paths, shardshuffle=False)}
    packed = TarImages(zoo / "shards", 16, captions="sidecar")
    assert len(theirs) == len(packed)
    for i, name in enumerate(packed.names):
        sample = theirs[name.split(".tar/")[1].removesuffix(".png")]
        assert sample["txt"].decode() == packed.captions[i] and int(sample["cls"]) == packed.labels[i]
        assert sample["png"] == (zoo / "zoo" / name.split(".tar/")[1]).read_bytes()
    (tmp_path / "other").mkdir()
    with wds.TarWriter(str(tmp_path / "other" / "0.tar")) as writer:
        for i in range(3):
            writer.write({"__key__": f"{i:04d}", "png": np.asarray(photo(seed=i)), "cls": i % 2, "txt": f"picture {i}", "json": {"caption": f"told {i}"}})
    data = TarImages(tmp_path / "other", 16, captions="sidecar")
    assert data.names == [f"0.tar/{i:04d}.png" for i in range(3)] and data.labels == [0, 1, 0] and data.captions[2] == "picture 2"
    assert TarImages(tmp_path / "other", 16, captions="json").captions[1] == "told 1"
    save(tmp_path / "one" / "x.png", photo(seed=1))
    assert data[1]["image"].equal(ImageFolder(tmp_path / "one", 16)[0]["image"])


# --- hostile tars -------------------------------------------------------------------------------------------------------

MEMBERS = {
    "../../etc/up.png": (png(), "its name leads out of the archive"), "/absolute.png": (png(), "its name leads out of the archive"),
    "soft.png": (kind(tarfile.SYMTYPE, "/etc/hostname"), "a link to /etc/hostname"), "hard.png": (kind(tarfile.LNKTYPE, "good.png"), "a link to good.png"),
    "pipe.png": (kind(tarfile.FIFOTYPE), "a sparse or special file"), "device.png": (kind(tarfile.CHRTYPE), "a sparse or special file"),
    "no.png": (b"this is text", "not an image that Pillow knows"), "empty.png": (b"", "an empty file (0 bytes)"), "half.png": (png()[:200], "OSError|SyntaxError"),
    "a.b.png": (png(), "its key ends at the first dot (a), and that has no picture of its own"),
}


def test_bad_members_are_named_all_at_once(tmp_path):
    more = [("good.png", png()), ("two.png", png()), ("two.jpg", png()), ("again.png", png()), ("again.png", png(1)), ("folder", kind(tarfile.DIRTYPE)),
            ("folder.png", kind(tarfile.DIRTYPE)), (".hidden.png", b"x"), ("__MACOSX__/x.png", b"x"), ("in/.DS_Store/x.png", b"x"), ("good.seg.png", b"a field"), ("notes.md", b"x")]
    make_tar(tmp_path / "s" / "0.tar", [*more, *((name, content) for name, (content, _) in MEMBERS.items())])
    with pytest.raises(ValueError) as err:
        TarImages(tmp_path / "s", 8)
    lines = {line.split(": ")[0].strip(): line for line in str(err.value).splitlines()[1:-1]}
    assert sorted(lines) == sorted([f"0.tar/{name}" for name in MEMBERS] + ["0.tar/two.png", "0.tar/again.png"])
    for name, (_, words) in MEMBERS.items():
        assert any(word in lines[f"0.tar/{name}"] for word in words.split("|")), lines[f"0.tar/{name}"]
    assert "2 pictures of one key: two.png, two.jpg" in lines["0.tar/two.png"] and "comes twice" in lines["0.tar/again.png"]
    with pytest.warns(UserWarning, match="12 files cannot be used"):
        data = TarImages(tmp_path / "s", 8, on_error="skip")
    assert data.names == ["0.tar/good.png"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0.tar", "0.tar.index.json", "s"]  # nothing was unpacked anywhere


SHARDS = {
    "empty file": (lambda whole: b"", "an empty file (0 bytes)"), "no tar": (lambda whole: b"hello " * 500, "cut short or no tar"),
    "a picture": (lambda whole: png(), "no tar|cut short"), "nothing inside": (lambda whole: bytes(10240), "got no picture inside"),
    "cut in a picture": (lambda whole: whole[: len(whole) // 2], "cut short"), "cut between": (lambda whole: whole.rstrip(b"\0")[: -512] and whole[: 512 * 20], "cut short"),
    "garbage between": (lambda whole: whole[: len(whole.rstrip(b"\0")) // 512 * 512 + 512] + b"x" * 10240, "damaged: no end mark"),
}


@pytest.mark.parametrize("what", SHARDS)
def test_bad_shards_are_named(tmp_path, what):
    make_tar(tmp_path / "0.tar", [("a.png", png())])
    whole = make_tar(tmp_path / "1.tar", [(f"{i}.png", png(i)) for i in range(4)]).read_bytes()
    change, words = SHARDS[what]
    (tmp_path / "1.tar").write_bytes(change(whole))
    with pytest.raises(ValueError, match=r"1 files cannot be used\n  1.tar: ") as err:
        TarImages(tmp_path, 8)
    assert any(word in str(err.value) for word in words.split("|")), str(err.value)
    with pytest.warns(UserWarning, match="1.tar: "):
        assert len(TarImages(tmp_path, 8, on_error="skip")) == 1


def test_a_cut_is_noticed_wherever_it_is(tmp_path):
    whole = make_tar(tmp_path / "0.tar", [(f"{i}.png", png(i, (9, 9))) for i in range(3)]).read_bytes()
    for end in range(0, len(whole.rstrip(b"\0")), 64):
        (tmp_path / "0.tar").write_bytes(whole[:end])
        with pytest.raises(ValueError, match="cut short|empty file"):
            scan_shard(tmp_path / "0.tar")


@pytest.mark.parametrize("mode, suffix, tool", [("w:gz", ".tar.gz", "gunzip"), ("w:gz", ".tar", "gunzip"), ("w:gz", ".tgz", "gunzip"), ("w:bz2", ".tar.bz2", "bunzip2"),
                                                ("w:xz", ".tar.xz", "unxz")])
def test_compressed_shards_are_refused_with_what_to_do(tmp_path, mode, suffix, tool):
    make_tar(tmp_path / f"0{suffix}", [("a.png", png())], mode)
    with pytest.raises(ValueError, match=rf"0{suffix}: compressed by .*unpack it \({tool} 0{suffix}\)"):
        open_pictures(tmp_path, size=8)


def test_which_shards_are_meant(tmp_path):
    for name in ("10.tar", "09.tar", "sub/1.tar"):
        make_tar(tmp_path / name, [(f"{name[0]}.png", png())])
    names = lambda source: [path.name for path in find_shards(source)]
    assert names(tmp_path) == ["09.tar", "10.tar"] == names(f"{tmp_path}/{{09..10}}.tar") == names(f"{tmp_path}/*.tar")
    assert names([tmp_path / "10.tar", str(tmp_path / "09.tar")]) == ["10.tar", "09.tar"] and names(tmp_path / "10.tar") == ["10.tar"]
    assert expand_braces("{8..10}") == ["8", "9", "10"] and expand_braces("a{b,c}d{0..1}") == ["abd0", "abd1", "acd0", "acd1"]
    assert TarImages([tmp_path / "10.tar", tmp_path / "sub" / "1.tar"], 8).names == ["10.tar/1.png", "sub/1.tar/s.png"]
    with pytest.raises(FileNotFoundError, match=r"1 of 3 shards are not there, for example .*11.tar"):
        find_shards(f"{tmp_path}/{{09..11}}.tar")
    with pytest.raises(ValueError, match="got 2 shards, 1 of them different"):
        find_shards([tmp_path / "10.tar"] * 2)
    with pytest.raises(ValueError, match="got 0 shards"):
        find_shards(f"{tmp_path}/x*.tar")
    assert holds_shards(tmp_path) and holds_shards("a/{0..9}.tar") and not holds_shards("scenes") and not holds_shards(tmp_path / "nowhere")
    save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"got 2 shards .* and 1 pictures \(such as loose.png\) in one folder"):
        holds_shards(tmp_path)


# --- the index ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """Counts the pictures that are decoded."""
    calls, real = [], tar_images.read_image
    monkeypatch.setattr(tar_images, "read_image", lambda *given: calls.append(1) or real(*given))
    return calls


@pytest.mark.parametrize("beside", [True, False])
def test_the_index_is_made_once(tmp_path, decoded, beside):
    for i in range(2):
        make_tar(tmp_path / "s" / f"{i}.tar", [(f"{i}{j}.png", png(10 * i + j)) for j in range(5)])
    options = {"size": 8, "cache_dir": None if beside else tmp_path / "cache"}
    before = {path: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    first = TarImages(tmp_path / "s", **options)
    assert len(decoded) == 10 and {path: path.read_bytes() for path in before} == before
    assert len(list((tmp_path / ("s" if beside else "cache")).glob("*.index.json"))) == 2 and (beside or len(list((tmp_path / "s").iterdir())) == 2)
    decoded.clear()
    second = TarImages(tmp_path / "s", **options)
    assert not decoded and second.fingerprint() == first.fingerprint() and second.sizes == first.sizes
    os.utime(tmp_path / "s" / "0.tar", ns=(1, 1))
    with pytest.warns(UserWarning, match="0.tar: changed in size or time since its index was made"):
        assert TarImages(tmp_path / "s", **options).fingerprint() == first.fingerprint()
    assert not decoded  # the bytes were read again, and are known
    make_tar(tmp_path / "s" / "1.tar", [(f"1{j}.png", png(10 + j if j else 99)) for j in range(5)])
    with pytest.warns(UserWarning, match="1.tar: changed"):
        assert TarImages(tmp_path / "s", **options).fingerprint() != first.fingerprint()
    assert len(decoded) == 1


def test_what_could_not_be_decoded_is_tried_again(tmp_path, monkeypatch):
    make_tar(tmp_path / "0.tar", [("a.png", png()), ("big.png", png(1, (90, 90)))])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    with pytest.raises(ValueError, match="big.png: .*MAX_IMAGE_PIXELS"), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        TarImages(tmp_path, 8)
    monkeypatch.undo()
    assert len(TarImages(tmp_path, 8)) == 2


@pytest.mark.parametrize("text", ["{", '{"format": "other"}', '{"format": "ldm_edu shard 1"}', "[]", '{"format": "ldm_edu shard 1", "size": 1, "mtime_ns": 1, "faults": {}, "entries": [[1]]}'])
def test_a_damaged_index_is_named(tmp_path, text):
    make_tar(tmp_path / "0.tar", [("a.png", png())])
    (tmp_path / "0.tar.index.json").write_text(text)
    with pytest.raises(ValueError, match="0.tar.index.json"):
        TarImages(tmp_path, 8)


def test_the_fingerprint_is_of_names_and_bytes(zoo, tmp_path):
    base = TarImages(zoo / "shards", 16).fingerprint()
    (zoo / "shards").rename(zoo / "moved")
    assert {TarImages(zoo / "moved", 16).fingerprint(), TarImages(zoo / "moved", 16, captions="sidecar", window=None).fingerprint()} == {base}
    others = [TarImages(zoo / "moved", 17), TarImages(zoo / "moved", 16, crop="stretch"), TarImages(zoo / "moved", 16, background=(0, 0, 0)),
              TarImages(find_shards(zoo / "moved")[1:], 16)]
    assert len({data.fingerprint() for data in others} | {base}) == 5
    with pytest.raises(ValueError, match=r"background: got \(1, 2\), expected three integers"):
        TarImages(zoo / "moved", 16, background=(1, 2))


def test_two_processes_share_the_work_and_read_the_same(tmp_path):
    for i in range(12):
        make_tar(tmp_path / "s" / f"{i:02d}.tar", [(f"{i}-{j}.png", png(10 * i + j, (9, 9))) for j in range(8)])
    started = [subprocess.Popen([sys.executable, toy.__file__, "index", str(tmp_path / "s"), str(tmp_path / f"{rank}.json")],
                                env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2"}) for rank in range(2)]
    assert [process.wait(240) for process in started] == [0, 0]
    reports = [read_json(tmp_path / f"{rank}.json") for rank in range(2)]
    alone = TarImages(tmp_path / "s", 8)
    assert {report["fingerprint"] for report in reports} == {alone.fingerprint()} and reports[0]["sum"] == reports[1]["sum"]
    decoded = [report["decoded"] for report in reports]
    assert 96 <= sum(decoded) <= 96 + 8 * 2, decoded  # at most the last shard or two were looked through by both


def test_work_is_shared_and_all_of_it_done(monkeypatch):
    from ldm_edu.shards import own_turns

    assert own_turns(5) == [0, 1, 2, 3, 4] and own_turns(0) == []
    for world, n in ((2, 7), (3, 12), (5, 3)):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        turns = []
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            turns.append(own_turns(n))
            assert sorted(turns[-1]) == list(range(n))
        firsts = [turn[: (rank + 1) * n // world - rank * n // world] for rank, turn in enumerate(turns)]
        assert sorted(i for first in firsts for i in first) == list(range(n))
        assert all(turn[len(first) :][: len(other)] == other[::-1] for turn, first, other in zip(turns, firsts, [*firsts[1:], firsts[0]]))


# --- reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache, context", [(True, "fork"), (False, "fork"), (False, "spawn")])
def test_workers_open_files_of_their_own(zoo, cache, context):
    data = TarImages(zoo / "shards", 16, cache=cache)
    plain = torch.stack([item["image"] for item in data])  # opens handles before the fork
    for _ in range(1 if context == "spawn" else 2):
        loader = DataLoader(data, batch_size=12, num_workers=2, multiprocessing_context=context)
        assert torch.cat([batch["image"] for batch in loader]).equal(plain)
    assert pickle.loads(pickle.dumps(data))[3]["image"].equal(plain[3])


def test_a_forked_process_has_handles_of_its_own(zoo):
    files = ShardFiles(find_shards(zoo / "shards"))
    first = files.read(0, 0, 600)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        files._lock.acquire()  # as if another thread of the parent had held it at the fork
        former = dict(files._handles)
        same = files.read(0, 0, 600) == first
        os._exit(0 if same and files._pid == os.getpid() and files._handles[0] is not former[0] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and files.read(0, 0, 600) == first


def test_few_handles_are_open(zoo):
    files = ShardFiles(find_shards(zoo / "shards"), most=2)
    for i in range(len(files.paths)):
        files.read(i, 0, 10)
    assert len(files._handles) == 2 < len(files.paths)
    files.close()
    assert not files._handles and len(files.read(0, 0, 10)) == 10


@pytest.mark.parametrize("how", ["cut", "rewritten", "replaced", "gone"])
def test_a_shard_that_changes_while_it_is_used_is_named(zoo, how):
    data, path = TarImages(zoo / "shards", 16, cache=False), find_shards(zoo / "shards")[0]
    if how != "replaced":
        data[0]
    whole = path.read_bytes()
    if how == "cut":
        os.truncate(path, 1000)
    elif how == "rewritten":
        with open(path, "r+b") as file:
            file.seek(600)
            file.write(b"xxxx")
        os.utime(path, ns=(5, 5))
    elif how == "replaced":
        path.unlink()
        path.write_bytes(whole + bytes(512))
    else:
        path.unlink()
        data._files.close()
    with pytest.raises(OSError, match=r"000000.tar/\w+/\d\d.png: fine when it was checked, now (OSError: .*000000.tar: (changed since|ends at)|FileNotFoundError)"):
        data[0]


# --- order --------------------------------------------------------------------------------------------------------------


def test_data_without_an_order_come_as_before():
    class Plain(torch.utils.data.Dataset):
        def __len__(self):
            return 37

    expected = torch.cat([torch.randperm(37, generator=torch.Generator().manual_seed(derive_seed(5, "epoch", epoch))) for epoch in range(4)]).tolist()
    for data in (37, Plain(), Part(Plain(), range(37)), WithField(Plain(), "x", None, "m")):
        assert [i for step in range(12) for i in batch_indices(data, 10, 5, step)] == expected[:120]
    assert epoch_order(37, 5, 1).tolist() == expected[37:74]


@pytest.mark.parametrize("window", [1, 3, 100])
def test_the_order_is_a_permutation_that_reads_few_shards(window):
    shards = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 20))
    order = ShardOrder(shards, window)
    for epoch in range(3):
        drawn = order(7, epoch)
        assert drawn.sort().values.tolist() == list(range(200)) and drawn.equal(ShardOrder(shards, window)(7, epoch))
        used = [len(set(shards[drawn[i : i + 20 * window]])) for i in range(0, 200, 20 * window)]
        assert max(used) <= window and (window > 9 or sum(used) == 10)
    assert not order(7, 0).equal(order(7, 1)) and not order(7, 0).equal(order(8, 0))
    assert order.fingerprint() == ShardOrder(shards, window).fingerprint() != ShardOrder(shards, window + 1).fingerprint()
    some = np.arange(0, 200, 3)
    part = order.part(some.tolist())
    assert part.shards.tolist() == shards[some].tolist() and part.fingerprint() != order.fingerprint()
    with pytest.raises(ValueError, match="window: got 0"):
        ShardOrder(shards, 0)


def test_all_orders_are_drawn_alike():
    """Every item is as often at every place: 3000 epochs of 6 items in 3 shards, chi-square below its 99.99 % point (25 degrees: 62)."""
    order, counts = ShardOrder([0, 0, 1, 1, 2, 2], 2), np.zeros((6, 6))
    for epoch in range(3000):
        counts[np.arange(6), order(0, epoch).numpy()] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 62


def test_parts_and_fields_keep_the_order(zoo):
    data = TarImages(zoo / "shards", 16, window=1)
    part, rest = train_validation_split(data, 0.2)
    for view in (part, WithField(part, "x", lambda item, index: index, "m"), Part(part, range(len(part)))):
        shards = [part.names[i].split("/")[0] for i in batch_indices(view, len(part), 0, 0)]
        assert sum(a != b for a, b in zip(shards, shards[1:])) == len(set(shards)) - 1  # one after the other
    assert TarImages(zoo / "shards", 16, window=None).epoch_order is None and Part(TarImages(zoo / "shards", 16, window=None), [0, 1]).epoch_order is None
    with pytest.raises(ValueError, match="window: got 2.5"):
        TarImages(zoo / "shards", 16, window=2.5)


class Means(TrainingTask):
    """Fits the mean colour of pictures."""

    def __init__(self, poison=-1):
        torch.manual_seed(0)
        self.model, self.poison = nn.Linear(3, 3), poison

    def loss(self, model, batch, rng):
        x = batch["image"].mean((2, 3))
        losses = (model(x) - x.flip(1)).square().mean(1)
        return losses * (float("nan") if rng.step == self.poison else 1), {}


QUICK = TrainConfig(steps=12, batch_size=7, warmup_steps=2, save_every=5, validate_every=0, log_every=1)


def test_a_run_resumes_in_mid_epoch_and_knows_its_order(zoo):
    data = TarImages(zoo / "shards", 16, window=2)
    whole = train(Means(), data, QUICK, zoo / "whole", progress=False).losses
    train(Means(), data, QUICK, zoo / "parts", progress=False, stop_after=5)
    with pytest.raises(ValueError, match="holds another run .*dataset.order"):
        train(Means(), TarImages(zoo / "shards", 16, window=3), QUICK, zoo / "parts", progress=False)
    again = TarImages(zoo / "shards", 16, window=2)
    assert train(Means(), again, QUICK.replace(workers=2), zoo / "parts", progress=False).losses == whole
    assert train(Means(), TarImages(zoo / "shards", 16, window=None), QUICK, zoo / "other", progress=False).losses != whole
    assert "order" not in read_json(zoo / "other" / "run.json")["dataset"]


def test_a_bad_loss_names_the_items_of_its_batch(zoo):
    data = TarImages(zoo / "shards", 16, window=1)
    with pytest.raises(NonFiniteLoss) as caught:
        train(Means(poison=3), data, QUICK, zoo / "run", progress=False)
    expected = torch.cat([data.epoch_order(0, 0), data.epoch_order(0, 1)])[21:28].tolist()
    assert caught.value.indices == expected


# --- packing ------------------------------------------------------------------------------------------------------------


def test_packing_is_exact_and_repeats(zoo):
    paths = find_shards(zoo / "shards")
    again = pack_images(zoo / "zoo", zoo / "again", megabytes=0.02, captions="sidecar")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    other = pack_images(zoo / "zoo", zoo / "other", megabytes=0.02, captions="sidecar", seed=1)
    assert [path.read_bytes() for path in other] != [path.read_bytes() for path in again]
    names = []
    for path in pack_images(zoo / "zoo", zoo / "sorted", megabytes=0.02, seed=None):
        with tarfile.open(path) as tar:
            names += tar.getnames()
    assert [name for name in names if name.endswith(".png")] == ImageFolder(zoo / "zoo").names
    assert max(path.stat().st_size for path in paths) < 20_000 + 40_000 and len(paths) >= 3


def test_packing_decodes_each_picture_once(zoo, decoded):
    pack_images(zoo / "zoo", zoo / "again")
    TarImages(zoo / "again", 8)
    assert not decoded  # the folder's own check decoded them


def test_names_that_are_no_keys_are_changed_apart(tmp_path):
    for i, name in enumerate(("a.png", "a.jpg", "b.c.png", "b_c.png", "über/ß.png")):
        save(tmp_path / "p" / name, photo(seed=i))
    pack_images(tmp_path / "p", tmp_path / "s", seed=None, classes=False)
    data = TarImages(tmp_path / "s", 16, classes=False)
    assert sorted(name.split("tar/")[1] for name in data.names) == ["a.jpg", "a_.png", "b_c.png", "b_c_.png", "über/ß.png"]
    folder = ImageFolder(tmp_path / "p", 16, classes=False)
    assert all(any(item["image"].equal(other["image"]) for other in folder) for item in data)


def test_nothing_is_overwritten_and_nothing_is_left_half(zoo, monkeypatch):
    before = {path: path.read_bytes() for path in (zoo / "shards").iterdir()}
    with pytest.raises(ValueError, match="expected a new folder: nothing is overwritten"):
        pack_images(zoo / "zoo", zoo / "shards")
    assert {path: path.read_bytes() for path in (zoo / "shards").iterdir()} == before
    calls, real = [], tar_images._add

    def full(*given):
        calls.append(1)
        if len(calls) == 30:
            raise OSError(28, "No space left on device")
        real(*given)

    monkeypatch.setattr(tar_images, "_add", full)
    with pytest.raises(OSError, match="No space left"):
        pack_images(zoo / "zoo", zoo / "new", megabytes=0.02, captions="sidecar")
    assert sorted(path.name for path in zoo.iterdir()) == ["shards", "zoo"]
    with pytest.raises(ValueError, match="megabytes: got 0"):
        pack_images(zoo / "zoo", zoo / "new", megabytes=0)
    (zoo / "zoo" / "bird" / "bad.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="bird/bad.png: not an image"):
        pack_images(zoo / "zoo", zoo / "new")


# --- from the shell -----------------------------------------------------------------------------------------------------


def test_the_command_packs_and_trains_on_shards(zoo, capsys):
    assert cli.main(["shard", "--data", str(zoo / "zoo"), "--out", str(zoo / "packed"), "--megabytes", "0.02", "--captions", "sidecar"]) == 0
    assert "shards, 0." in capsys.readouterr().out
    assert cli.main(["shard", "--data", str(zoo / "zoo"), "--out", str(zoo / "packed")]) == 2 and "nothing is overwritten" in capsys.readouterr().err
    small = ["--size", "16", "--steps", "2", "--batch-size", "4", "--precision", "fp32"]
    stage = ["train-autoencoder", "--data", str(zoo / "packed"), *small, "--out", str(zoo / "ae"), "--model.model-channels", "8", "--model.num-groups", "4"]
    assert cli.main(stage) == 0
    assert read_json(zoo / "ae" / "run.json")["dataset"]["order"]
    assert cli.main(["train", "--data", f"{zoo}/packed/*.tar", "--captions", "sidecar", "--first-stage", str(zoo / "ae"), "--recipe", "class-tiny", *small,
                     "--out", str(zoo / "ldm")]) == 0
    assert read_json(zoo / "ldm" / "model" / "config.json")["conditioner"]["config"]["class_names"] == ["bird", "fox"]
    os.truncate(find_shards(zoo / "packed")[0], 3000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cli.main(stage) == 2 and "000000.tar: cut short" in capsys.readouterr().err


def test_indices_go_beside_the_shards_unless_that_is_closed(tmp_path, monkeypatch):
    make_tar(tmp_path / "s" / "0.tar", [("a.png", png())])
    monkeypatch.setattr(tar_images.os, "access", lambda path, mode: False)
    open_pictures(tmp_path / "s", cache_dir=tmp_path / "run", size=8)
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["0.tar"] and len(list((tmp_path / "run").iterdir())) == 1
    monkeypatch.undo()
    open_pictures(tmp_path / "s", cache_dir=tmp_path / "run", size=8)
    assert (tmp_path / "s" / "0.tar.index.json").exists()


@pytest.mark.parametrize("said, why", [("{", "not valid JSON"), ("[]", "list indices"), ('{"size": 1, "faults": {}, "entries": []}', "mtime_ns")])
def test_an_index_that_cannot_be_read_says_what_to_do(tmp_path, said, why):
    path = tmp_path / "0.tar"
    make_tar(path, [("a.png", png())])
    said = said.replace("{", f'{{"format": "{tar_images.INDEX_FORMAT}", ', 1) if "size" in said else said
    tar_images.index_place(path).write_text(said)
    with pytest.raises(ValueError, match=f"0.tar.index.json: not an index of this version .*{why}.*delete the file, it will be made anew"):
        tar_images.kept_index(path)
    tar_images.index_place(path).unlink()
    assert len(tar_images.kept_index(path)["entries"]) == 1
