"""What the test modules share: the repository on the path, shared data where there are any, small images."""
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic sums; read when cuBLAS starts


@pytest.fixture
def cifar10k():
    """10,000 real CIFAR-10 images, where the machine has them."""
    path = SHARED / "data" / "cifar10-10k.zip"
    if not path.exists():
        pytest.skip("no ../shared/data/cifar10-10k.zip on this machine")
    return str(path)


@pytest.fixture
def write_images():
    """A function that writes uint8 images [N, H, W, C] as PNG files into a folder."""
    def write(folder, images):
        folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(folder / f"{i:04d}.png")
        return folder
    return write


@pytest.fixture
def noise():
    """Random uint8 images of a shape."""
    return lambda *shape, seed=0: np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)
