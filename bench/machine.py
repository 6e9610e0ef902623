"""What this machine is called, and where results that carry its name go."""
import re
from pathlib import Path

import torch

from disk import processor, write_json

RESULTS = Path(__file__).resolve().parent / "results"


def name():
    """Such as "AMD EPYC, 2 cores, AVX2", with the GPU before it if there is one."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{processor()}, {torch.backends.cpu.get_cpu_capability()}"


def save(table, record, machine="", folder=RESULTS):
    """Write the numbers behind a table to TABLE-MACHINE.json, of this machine if none is named."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{table}-{re.sub('[^a-z0-9]+', '-', (machine or name()).lower())}.json"
    write_json(path, record)
    return path
