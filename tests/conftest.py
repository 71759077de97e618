"""Shared fixtures: the checkout's folders, the real images beside it where there are some, one thread per process."""
import os
import zipfile
from pathlib import Path

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory) -> Path:
    """600 real images in ten class folders, from a copy of CIFAR-10 beside the checkout; skips where there is none."""
    archive = ROOT.parent / "shared" / "data" / "cifar10-train.zip"
    if not archive.exists():
        pytest.skip(f"needs real images: {archive.name} is not beside the checkout")
    folder = tmp_path_factory.mktemp("cifar")
    with zipfile.ZipFile(archive) as source:
        names = sorted(n for n in source.namelist() if n.endswith(".jpg"))
        source.extractall(folder, names[:: max(1, len(names) // 600)][:600])
    return folder / "train"
