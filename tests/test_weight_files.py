"""Files of weights from elsewhere: pickles are never run, leftovers of training do no harm, released checkpoints come apart."""
import argparse
import functools
import os
import pickle
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from ldm_edu import weight_files as W

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}


class Asks:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


@pytest.fixture
def lightning(monkeypatch):
    """Classes of a library that is there when the file is written and gone when it is read."""
    made = {}
    for name, kind in (("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"), ("omegaconf.dictconfig", "DictConfig")):
        module = types.ModuleType(name)
        made[kind] = type(kind, (dict,) if kind == "DictConfig" else (), {"__module__": name})
        setattr(module, kind, made[kind])
        parts = name.split(".")
        for i in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_checkpoint_of_lightning_opens_without_lightning(tmp_path, lightning, monkeypatch, legacy):
    callback, config = lightning["ModelCheckpoint"](), lightning["DictConfig"](x=1)
    callback.best = [1, {2}]
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    file = {"state_dict": STATE, "epoch": 3, "callbacks": {lightning["ModelCheckpoint"]: callback}, "hparams": config, "options": argparse.Namespace(lr=1.0),
            "optimizer_states": [optimizer.state_dict()], "parameter": layer.weight, "size": torch.Size([1]), "dtype": torch.float32, "set": {1, 2}}
    torch.save(file, tmp_path / "m.ckpt", _use_new_zipfile_serialization=not legacy)
    for name in [name for name in sys.modules if name.startswith(("pytorch_lightning", "omegaconf"))]:
        monkeypatch.delitem(sys.modules, name)
    read = W.read_tensors(tmp_path / "m.ckpt")
    assert read["epoch"] == 3 and all(torch.equal(read["state_dict"][key], x) for key, x in STATE.items())
    assert isinstance(read["options"], W.Placeholder) and isinstance(read["hparams"], W.Placeholder)
    assert torch.equal(read["parameter"], layer.weight) and read["set"] == {1, 2} and read["dtype"] is torch.float32
    assert "pytorch_lightning" not in sys.modules


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("payload", ["system", "eval", "partial", "getattr", "import", "plain pickle"])
def test_a_payload_is_refused_and_not_run(tmp_path, payload, legacy):
    mark = tmp_path / "ran"
    asks = {"system": Asks(os.system, f"touch {mark}"), "eval": Asks(eval, f"open({str(mark)!r}, 'w')"), "partial": functools.partial(mark.touch),
            "getattr": Asks(getattr, "text", "upper"), "import": Asks(__import__, "os"), "plain pickle": Asks(os.mkdir, str(mark))}[payload]
    path = tmp_path / "m.ckpt"
    if payload == "plain pickle":
        path.write_bytes(pickle.dumps({"a": asks}, protocol=0 if legacy else 4))
    else:
        torch.save({"state_dict": STATE, "x": asks}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"m.ckpt: refused before anything was called that does not build tensors or containers: the pickle asks for \w+\.\w+"):
        W.read_tensors(path)
    assert not mark.exists()


def test_a_payload_behind_a_placeholder_is_refused(tmp_path):
    """A name inside an allowed module's object cannot reach further: attributes of modules are looked up by whole names only."""
    path = tmp_path / "m.ckpt"
    for name in (b"os.system", b"storage.UntypedStorage"):  # the second would even be a class that builds tensors
        path.write_bytes(b"\x80\x04\x8c\x05torch\x94\x8c" + bytes([len(name)]) + name + b"\x94\x93\x94.")
        with pytest.raises(ValueError) as err:
            W.read_tensors(path)
        assert "refused" in str(err.value)
    path.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x0aos.system  \x93\x8c\x04echo\x85R.")
    with pytest.raises(ValueError):
        W.read_tensors(path)


@pytest.mark.parametrize("target", ["torch._utils _rebuild_tensor_v2", "torch UntypedStorage", "collections OrderedDict"])
def test_a_pickle_cannot_change_what_it_names(tmp_path, target):
    """Setting attributes on a function or class would last for the whole process."""
    module, name = target.split()
    path = tmp_path / "m.ckpt"
    path.write_bytes(b"\x80\x04c" + module.encode() + b"\n" + name.encode() + b"\n}\x8c\x0c__defaults__K\x01\x85sb.")
    before = torch._utils._rebuild_tensor_v2.__defaults__
    with pytest.raises(ValueError, match="refused.*the pickle changes"):
        W.read_tensors(path)
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before and not hasattr(torch.UntypedStorage, "__defaults__")


class Program(torch.nn.Module):
    @torch.jit.export
    def __getstate__(self):
        return 1, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[int, bool]):
        print("a program ran")
        self.training = state[1]

    def forward(self, x: torch.Tensor):
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:'torch.load' received a zip file:UserWarning")
def test_a_program_is_refused_and_not_run(tmp_path, capfd):
    """torch.load hands TorchScript archives to another reader, which runs them."""
    torch.jit.save(torch.jit.script(Program()), str(tmp_path / "m.ckpt"))
    capfd.readouterr()
    with pytest.raises(ValueError, match="refused.*TorchScript archive, a program"):
        W.read_tensors(tmp_path / "m.ckpt")
    assert "ran" not in capfd.readouterr().out
    torch.load(tmp_path / "m.ckpt", weights_only=False)  # the danger is real
    assert "a program ran" in capfd.readouterr().out


def test_damaged_and_foreign_files_are_named(tmp_path):
    torch.save({"state_dict": STATE}, tmp_path / "whole.ckpt")
    save_file(STATE, tmp_path / "whole.safetensors")
    cases = {"cut.ckpt": (tmp_path / "whole.ckpt").read_bytes()[:-300], "cut.safetensors": (tmp_path / "whole.safetensors").read_bytes()[:-3], "empty.ckpt": b"", "text.pt": b"hello",
             "empty.safetensors": b""}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: damaged or no file of weights"):
            W.read_tensors(tmp_path / name)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="got a list"):
        W.read_tensors(tmp_path / "list.pt")
    with pytest.raises(ValueError, match="no such file"):
        W.read_tensors(tmp_path / "none.ckpt")
    assert torch.equal(W.read_tensors(tmp_path / "whole.safetensors")["a.weight"], STATE["a.weight"])


def released(ema=True, last=True):
    names = ["input_blocks.0.0.weight", "out.2.bias"]
    file = {"first_stage_model.encoder.conv_in.weight": torch.ones(1), "first_stage_model.loss.discriminator.weight": torch.ones(1),
            "cond_stage_model.embedding.weight": torch.ones(2), "betas": torch.ones(3), "scale_factor": torch.tensor(0.5), "model_ema.decay": torch.tensor(0.9)}
    file |= {f"model.diffusion_model.{name}": torch.zeros(1) for name in names} if last else {}
    file |= {"model_ema.diffusion_model" + name.replace(".", ""): torch.ones(1) for name in names} if ema else {}
    return {"state_dict": file, "epoch": 1}, names


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_released_checkpoint_comes_apart(wrapped):
    file, names = released()
    for ema in (True, False):
        parts = W.split_checkpoint(file if wrapped else file["state_dict"], names, ema)
        assert parts.ema is ema and parts.unet.keys() == set(names) and all(x == float(ema) for x in parts.unet.values())
        assert parts.first_stage.keys() == {"encoder.conv_in.weight"} and parts.conditioner.keys() == {"embedding.weight"}
        assert parts.scale_factor == 0.5 and list(parts.schedule) == ["betas"] and parts.dropped == []


def test_averaged_or_last_is_a_choice():
    both, names = released()
    with pytest.raises(ValueError, match="both averaged and last.*ema=True.*ema=False"):
        W.split_checkpoint(both, names)
    assert W.split_checkpoint(released(last=False)[0], names).ema and not W.split_checkpoint(released(ema=False)[0], names).ema
    with pytest.raises(ValueError, match="got one copy of the UNet, under model.diffusion_model.*leave ema out, or pass ema=False"):
        W.split_checkpoint(released(ema=False)[0], names, ema=True)
    with pytest.raises(ValueError, match="got averaged weights of the UNet alone: leave ema out, or pass ema=True"):
        W.split_checkpoint(released(last=False)[0], names, ema=False)
    for ema in (None, True, False):
        with pytest.raises(ValueError, match="averaged weights of a UNet with other names"):
            W.split_checkpoint(both, ["another.weight"], ema)
    with pytest.raises(ValueError, match="vae.ckpt: got no UNet.*encoder"):
        W.split_checkpoint({"encoder.conv_in.weight": torch.ones(1)}, names, where="vae.ckpt")


@pytest.mark.parametrize("start, suffix, message", [
    (b"version https://git-lfs.github.com/spec/v1\n", ".ckpt", "pointer of Git LFS in place of the file: fetch the file with `git lfs pull`"),
    (b"<!DOCTYPE html><html>", ".safetensors", "begins like a web page"),
    (b"", ".ckpt", "nothing that we know: fetch it again"), (b"hello hello", ".safetensors", "nothing that we know: fetch it again"),
])
def test_what_is_no_file_of_weights_is_named(tmp_path, start, suffix, message):
    path = tmp_path / f"m{suffix}"
    path.write_bytes(start)
    with pytest.raises(ValueError, match=message):
        W.read_tensors(path)


def test_wrong_suffixes_and_cut_files_are_told_apart(tmp_path):
    torch.save(STATE, tmp_path / "a.ckpt")
    torch.save(STATE, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "b.safetensors")
    for name, other in (("a.ckpt", ".safetensors"), ("old.ckpt", ".safetensors"), ("b.safetensors", ".ckpt")):
        content, wrong = (tmp_path / name).read_bytes(), tmp_path / f"wrong{other}"
        wrong.write_bytes(content)
        with pytest.raises(ValueError, match=f"begins like .*: rename it to end in {(tmp_path / name).suffix}"):
            W.read_tensors(wrong)
        cut = tmp_path / f"cut-{name}"
        cut.write_bytes(content[: int(0.7 * len(content))])
        with pytest.raises(ValueError, match=f"begins as a {cut.suffix} file does and is cut off or damaged: fetch it again"):
            W.read_tensors(cut)


def test_a_folder_s_weights_in_one_file_or_several(tmp_path):
    write = {".safetensors": save_file, ".bin": torch.save}
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
        for end in write:
            for half in ("", ".fp16"):
                folder = tmp_path / f"{stem}{half}{end}"
                folder.mkdir()
                write[end](STATE, folder / f"{stem}{half}{end}")
                assert all(torch.equal(W.read_folder(folder)[key], x) for key, x in STATE.items())
    folder = tmp_path / "all"
    folder.mkdir()
    for i, name in enumerate(("model.safetensors", "pytorch_model.bin", "model.fp16.safetensors", "pytorch_model.fp16.bin")):
        write["." + name.rsplit(".", 1)[1]]({"i": torch.tensor(i)}, folder / name)
    for i in range(4):
        assert W.read_folder(folder)["i"] == i
        W.weight_file(folder).unlink()
    with pytest.raises(ValueError, match="expected diffusion_pytorch_model.safetensors.*got nothing"):
        W.read_folder(folder)
    with pytest.raises(ValueError, match="no such folder"):
        W.read_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("end", [".safetensors", ".bin"])
def test_an_index_keeps_its_promises(tmp_path, end):
    import json

    write = {".safetensors": save_file, ".bin": torch.save}[end]
    for name in STATE:
        write({name: STATE[name]}, tmp_path / f"part-{name}{end}")
    index = tmp_path / f"pytorch_model{end}.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"part-{name}{end}" for name in STATE}}))
    assert all(torch.equal(W.read_folder(tmp_path)[name], x) for name, x in STATE.items())
    index.write_text(json.dumps({"weight_map": {"a.weight": f"part-a.weight{end}", "b": f"part-a.weight{end}"}}))
    with pytest.raises(ValueError, match="1 of 2 tensors are in none of its 1 files, for example b"):
        W.read_folder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"b": f"part-c{end}"}}))
    with pytest.raises(ValueError, match=f"part-c{end}: no such file"):
        W.read_folder(tmp_path)
    for bad in ({"b": "../elsewhere"}, {}):
        index.write_text(json.dumps({"weight_map": bad}))
        with pytest.raises(ValueError, match="expected names of files beside it"):
            W.read_folder(tmp_path)
