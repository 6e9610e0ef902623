"""What this machine is called, and where results that carry its name go."""
import os
import re
from pathlib import Path

import torch

from run import write_json

RESULTS = Path(__file__).resolve().parent / "results"


def name():
    """Such as "AMD EPYC, 2 cores, AVX2", with the GPU before it if there is one."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)[1]
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{cpu}, {len(os.sched_getaffinity(0))} cores, {torch.backends.cpu.get_cpu_capability()}"


def save(table, record):
    """Write the numbers behind a table to results/TABLE-MACHINE.json. Returns the path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{table}-{re.sub('[^a-z0-9]+', '-', name().lower())}.json"
    write_json(path, record)
    return path
