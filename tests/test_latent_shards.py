"""ldm_edu.latent_shards: the bits of one file, whoever wrote them, killed or not, and every damage by name."""
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import shards_toy as toy
import torch
from safetensors.numpy import load_file, save_file
from torch.utils.data import DataLoader

from ldm_edu import latent_shards
from ldm_edu.checkpoint import LatentDataset, cache_identity, cache_latents
from ldm_edu.core import read_json
from ldm_edu.latent_shards import LatentShards, latent_cache, shard_latents
from ldm_edu.runs import fetch_batch
from ldm_edu.training import batch_indices

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def one_file(folder, **options):
    return cache_latents(toy.encoder(), toy.Pictures(), folder, **{"key": "k", "keys_to_keep": toy.KEEP, "flips": True, "batch_size": toy.BATCH,
                                                                   "progress": False, **options})


def assert_equal(a, b, flips=None):
    a, b = a.fetch(range(toy.ITEMS), flips), b.fetch(range(toy.ITEMS), flips)
    assert a.keys() == b.keys()
    for key in a:
        assert a[key] == b[key] if isinstance(a[key], list) else a[key].dtype == b[key].dtype and a[key].equal(b[key]), key


def run(*arguments, processes=1, **options):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    return subprocess.run([sys.executable, *launch, toy.__file__, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=ENVIRONMENT, **options)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("keep, flips", [(toy.KEEP, True), ((), False), (("caption", "image"), False)])
def test_shards_hold_the_bits_of_one_file(tmp_path, dtype, keep, flips, monkeypatch):
    one = one_file(tmp_path / "one", keys_to_keep=keep, flips=flips, dtype=dtype)
    monkeypatch.setattr(latent_shards, "ONE_FILE_BYTES", 0)
    monkeypatch.setattr(latent_shards, "SHARD_BYTES", 10_000)
    many = latent_cache(toy.encoder(), toy.Pictures(), tmp_path / "many", key="k", keys_to_keep=keep, flips=flips, dtype=dtype, batch_size=toy.BATCH, progress=False)
    assert isinstance(many, LatentShards) and len(list(many.folder.glob("*.safetensors"))) > 2 and many.info["rows"] % toy.BATCH == 0
    assert max(many.info["bytes"]) < 40_000
    assert many.fingerprint() == one.fingerprint() and many.shape == one.shape and many.flip_safe is flips and len(many) == len(one)
    assert_equal(one, many)
    if flips:
        assert_equal(one, many, torch.arange(toy.ITEMS) % 2 == 0)
        assert not one.fetch([0], [True])["mean"].equal(one.fetch([0], [False])["mean"])
    assert all(torch.equal(a, b) for a, b in zip(many[-1].values(), one[-1].values()) if isinstance(a, torch.Tensor))
    with pytest.raises(IndexError):
        many[toy.ITEMS]


def test_small_data_stay_in_one_file_and_a_finished_one_is_used(tmp_path, monkeypatch):
    options = {"key": "k", "keys_to_keep": toy.KEEP, "flips": True, "batch_size": toy.BATCH, "progress": False}
    seen, data = [], toy.Pictures()
    small = latent_cache(toy.encoder(seen=seen), data, tmp_path, **options)
    assert type(small) is LatentDataset and sum(seen) == 2 * (toy.ITEMS + 1)  # one item more, to see how large it is
    seen.clear()
    monkeypatch.setattr(latent_shards, "ONE_FILE_BYTES", 0)
    assert type(latent_cache(toy.encoder(seen=seen), data, tmp_path, **options)) is LatentDataset and not seen
    other = latent_cache(toy.encoder(seen=seen), data, tmp_path, **options | {"key": "other weights"})
    assert type(other) is LatentShards and other.fingerprint() != small.fingerprint()
    each = latent_shards.row_bytes(toy.encoder(), data, toy.identity(data))
    monkeypatch.setattr(latent_shards, "ONE_FILE_BYTES", each * toy.ITEMS)
    assert type(latent_cache(toy.encoder(), data, tmp_path / "border", **options)) is LatentDataset
    monkeypatch.setattr(latent_shards, "ONE_FILE_BYTES", each * toy.ITEMS - 1)
    assert type(latent_cache(toy.encoder(), data, tmp_path / "beyond", **options)) is LatentShards


def test_two_processes_write_the_cache_of_one(tmp_path):
    alone = toy.write(tmp_path / "alone")
    one, two = one_file(tmp_path / "one"), tmp_path / "two"
    two.mkdir()
    done = run("together", two, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = two / alone.folder.name
    assert toy.digest(folder) == toy.digest(alone.folder)
    assert_equal(one, LatentShards(folder))
    reports = [read_json(two / f"rank{rank}.json") for rank in range(2)]
    batches = [report["batches"] for report in reports]
    whole = 2 * -(-toy.ITEMS // toy.BATCH)  # two views
    assert min(batches) > 0.3 * whole and whole <= sum(batches) <= whole + 2 * toy.ROWS // toy.BATCH, batches
    assert reports[0]["mean"] == reports[1]["mean"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on(tmp_path, processes):
    whole, folder = toy.write(tmp_path / "whole"), tmp_path / "killed"
    child = subprocess.Popen([sys.executable, toy.__file__, "write", str(folder)], env=ENVIRONMENT)
    until = time.monotonic() + 120
    while len(found := sorted(folder.glob("*/*.safetensors"))) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    found = sorted(folder.glob("*/*.safetensors"))
    stamps = {path: path.stat().st_mtime_ns for path in found}
    assert 2 <= len(found) < 7 and not list(folder.glob("*/latents.json"))
    seen = []
    if processes == 1:
        toy.write(folder, seen=seen)
        assert sum(seen) == 2 * (toy.ITEMS - toy.ROWS * len(found))
    else:
        assert run("together", folder, processes=2).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in found} == stamps
    [stale.unlink() for stale in folder.glob("*/.latents-*.part")]
    assert toy.digest(folder / whole.folder.name) == toy.digest(whole.folder)


def test_leftovers_of_killed_runs_go_after_an_hour(tmp_path):
    folder = toy.write(tmp_path).folder
    young, old = folder / ".latents-1.part", folder / ".latents-2.part"
    for path in (young, old):
        path.touch()
    os.utime(old, (time.time() - 4000,) * 2)
    toy.write(tmp_path)
    assert young.exists() and not old.exists()


def tensor_place(path, name):
    """Where a tensor begins and ends in a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return [8 + size + place for place in json.loads(data[8 : 8 + size])[name]["data_offsets"]]


@pytest.mark.parametrize("what", ["latents", "field-label", "text-caption", "ends-caption", "crc", "header", "size of the header"])
def test_a_changed_byte_is_named(tmp_path, what):
    cached = toy.write(tmp_path)
    path = sorted(cached.folder.glob("*.safetensors"))[2]
    place = {"header": 30, "size of the header": 3}.get(what) or (tensor_place(path, what)[0] + 1)
    data = bytearray(path.read_bytes())
    data[place] ^= 0x55
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=rf"{path.name}: damaged"):
        LatentShards(cached.folder).fetch(range(toy.ITEMS))
    path.unlink()
    assert_equal(toy.write(tmp_path), one_file(tmp_path / "one"))


def test_missing_cut_and_foreign_shards_are_named(tmp_path):
    cached = toy.write(tmp_path)
    path = sorted(cached.folder.glob("*.safetensors"))[1]
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=rf"{path.name}: got {len(data) - 1} bytes, expected {len(data)} bytes: delete it"):
        toy.write(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name}: got no file"):
        LatentShards(cached.folder)
    path.write_bytes(data)
    open_before = LatentShards(cached.folder)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises((OSError, ValueError), match=path.name):
        open_before.fetch(range(toy.ITEMS))


def test_what_one_file_refuses_shards_refuse(tmp_path):
    data = toy.Pictures()
    with pytest.raises(ValueError, match="rows: got 12 in a shard, expected a multiple of batch_size 8"):
        shard_latents(toy.encoder(), data, tmp_path, info=toy.identity(data), rows=12, batch_size=8)
    with pytest.raises(ValueError, match="NaN"):
        shard_latents(lambda x: x * float("nan"), data, tmp_path, info=toy.identity(data), rows=16, batch_size=8, progress=False)
    data.flip_safe = False
    with pytest.raises(ValueError, match="flips: got True"):
        latent_cache(toy.encoder(), data, tmp_path, key="k", flips=True)
    with pytest.raises(ValueError, match="'captions', expected some of image"):
        latent_cache(toy.encoder(), data, tmp_path, key="k", keys_to_keep=("captions",))


def test_memory_does_not_grow_with_the_cache(tmp_path):
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc/self/status, which says how much memory a process has used")
    done = run("large", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["size"] >= 256 and 0 < report["written"] < 64 and report["read"] < 64, report


def test_workers_copies_and_order(tmp_path):
    cached = toy.write(tmp_path)
    plain = cached.fetch(range(toy.ITEMS))["mean"]
    copy = pickle.loads(pickle.dumps(cached))
    assert len(pickle.dumps(cached)) < 6000 and copy.fetch(range(toy.ITEMS))["mean"].equal(plain)
    for context in ("fork", "spawn"):
        loader = DataLoader(cached, batch_size=10, num_workers=2, multiprocessing_context=context, shuffle=False)
        assert torch.cat([batch["mean"] for batch in loader]).equal(plain)
    assert getattr(cached, "epoch_order", None) is None, "rows are read by place: training shuffles all of them, and not a few shards at a time"
    shards = {index // toy.ROWS for index in batch_indices(cached, toy.ITEMS // 4, 0, 0)}
    assert len(shards) >= 5, "one batch of 25 draws from most of the 7 shards: rows may lie class after class"
    assert fetch_batch(cached, [3, 99])["caption"] == ["a picture, number 3", "a picture, number 99"]


@pytest.mark.parametrize("field, values", [("caption", "captions"), ("label", "labels")])
def test_what_is_kept_beside_the_latents_is_part_of_their_identity(field, values):
    """A folder's fingerprint is of its pictures: corrected captions must not be answered from an old cache."""

    class Told:
        captions, labels = ["a", "b"], [0, 1]

        def __len__(self):
            return 2

        def fingerprint(self):
            return "same pictures"
    old, new = Told(), Told()
    setattr(new, values, getattr(old, values)[::-1])
    digest = lambda data, keys: cache_identity(data, "stage", keys, False, "float32", "image")["digest"]
    assert digest(old, (field,)) != digest(new, (field,)) and digest(old, ()) == digest(new, ()) and digest(old, (field,)) == digest(Told(), (field,))


def test_any_safetensors_reader_opens_a_shard(tmp_path):
    cached = toy.write(tmp_path)
    first = load_file(sorted(cached.folder.glob("*.safetensors"))[0])
    assert first["latents"].shape == (toy.ROWS, 2, 2, 4, 4, 4)
    np.testing.assert_array_equal(first["latents"][:, 0, 0], cached.fetch(range(toy.ROWS))["mean"].numpy())
    save_file(first, tmp_path / "copy.safetensors")  # and nothing in it is out of the ordinary
    assert read_json(cached.folder / "latents.json")["bytes"][0] == sorted(cached.folder.glob("*.safetensors"))[0].stat().st_size


def test_a_diffusion_model_trains_on_shards_and_resumes_in_mid_epoch(tmp_path, monkeypatch):
    from ldm_edu.autoencoder import AutoencoderConfig
    from ldm_edu.data import Scenes
    from ldm_edu.quantize import make_first_stage
    from ldm_edu.recipes import train_diffusion

    monkeypatch.setattr(latent_shards, "ONE_FILE_BYTES", 2000)
    monkeypatch.setattr(latent_shards, "SHARD_BYTES", 1)  # one batch in each
    torch.manual_seed(0)
    stage = make_first_stage(AutoencoderConfig(4, 8, (1, 2, 2), 1, mid_attention=False, num_groups=4)).eval()
    data = Scenes(16, n=200, objects=(1, 1), fields=("image", "caption"))

    def go(out, stop=None, **options):
        def halt(report):
            if report.step == stop:
                raise KeyboardInterrupt
        return train_diffusion(data, stage, "unconditional-tiny", out, progress=False, callbacks=[halt], steps=12, batch_size=24, precision="fp32",
                               save_every=1, **options)

    whole = go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "parts", stop=6)
    parts = go(tmp_path / "parts", workers=1)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values()))
    assert len(list((tmp_path / "whole" / "latents").glob("*/*.safetensors"))) == 4
    assert "order" not in read_json(tmp_path / "whole" / "run.json")["dataset"], "all rows are shuffled, as from one file"
    monkeypatch.setattr(latent_shards, "ONE_FILE_BYTES", 2**30)
    alike = go(tmp_path / "one")
    assert len(list((tmp_path / "one" / "latents").glob("*/*.safetensors"))) == 0
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), alike.state_dict().values())), "the same training from one file"


def test_rows_are_counted_as_in_one_file_and_no_others_are_read(tmp_path):
    """20 rows, in shards of 8: the last one is not full, so a place counted from the end is none in a shard that is."""
    data = torch.utils.data.Subset(toy.Pictures(), range(20))
    data.fingerprint = lambda: "twenty"
    options = {"key": "k", "keys_to_keep": toy.KEEP, "batch_size": toy.BATCH, "progress": False}
    one = cache_latents(toy.encoder(), data, tmp_path / "one", **options)
    info = cache_identity(data, "k", toy.KEEP, False, "float32", "image")
    shards = shard_latents(toy.encoder(), data, tmp_path / "many", info=info, rows=8, batch_size=toy.BATCH, progress=False)
    a, b = (cache.fetch([-1, -20, 3, -12, 19]) for cache in (one, shards))
    assert all(a[key] == b[key] if isinstance(a[key], list) else a[key].equal(b[key]) for key in a)
    for index in (20, -21, 1000):
        with pytest.raises(IndexError, match=f"indices: got {index}, expected -20 to 19"):
            shards.fetch([0, index])
    with pytest.raises(ValueError, match="flips: got 1 mirrored pictures to read, expected none: .*flips=False"):
        shards.fetch([0, 1], torch.tensor([False, True]))
    for rows, batch in ((0, 8), (-8, 8), (8, 0), (8, -8)):
        with pytest.raises(ValueError, match=f"rows: got {rows} in a shard, expected a multiple of batch_size {batch}, both at least 1"):
            shard_latents(toy.encoder(), data, tmp_path / "odd", info=info, rows=rows, batch_size=batch, progress=False)
    assert not (tmp_path / "odd").exists()


def test_one_file_is_not_taken_for_shards_and_no_batch_is_empty(tmp_path):
    cache = one_file(tmp_path)
    with pytest.raises(ValueError, match="got a cache in one file, expected one in shards: checkpoint.LatentDataset opens it"):
        LatentShards(cache.folder)
    for encode in (cache_latents, latent_cache):
        for wrong in (0, -8, 2.0, True):
            with pytest.raises(ValueError, match=f"batch_size: got {wrong}, expected an integer, at least 1"):
                encode(toy.encoder(), toy.Pictures(), tmp_path / "other", key="k", batch_size=wrong, progress=False)
    assert not (tmp_path / "other").exists()
    assert len(cache_latents(toy.encoder(), toy.Pictures(), tmp_path / "other", key="k", batch_size=np.int64(8), progress=False)) == len(toy.Pictures())


@pytest.mark.parametrize("arrays, texts", [({"label": np.zeros(2)}, {}), ({"label": np.zeros(4)}, {}), ({}, {"label": ["a"] * 5})])
def test_a_field_of_another_length_is_not_packed(arrays, texts):
    with pytest.raises(ValueError, match=r"label: got \d rows, expected 3, one for each latent"):
        latent_shards.pack_rows(np.zeros((3, 1, 1, 2, 2, 2), np.float32), arrays, texts)
