"""The Triton norm on paper: machine code for GPUs that are not here, and the memory that it moves.

    python bench/norm_report.py     a minute on one core; no time in its table is measured
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels.aot import SHARED_BYTES, WARP_THREADS, compile_norm
from kernels.norm_triton import tiling

BATCH, BANDWIDTH = 512, 4.17e12    # bytes a second, copied by an H200 (3.0e12 on an H100)
REGISTERS, WARPS = 2**16, 64       # of a multiprocessor
SHAPES = (1024, 256), (256, 256)   # pixels and channels of DDPM++ of width 128 at 32x32 and 16x16


def table():
    """Print registers, spills and warps by compute capability, and the time of one norm of each shape."""
    print("\nnorm with shift, silu and dropout; "
          f"the floor is {BATCH} images at {BANDWIDTH / 1e12:.2f} TB/s\n")
    print("sm    pixels  channels  type  pass     registers  spills  warps/SM  "
          "passes (floor)      GB  floor, ms")
    for capability in SHARED_BYTES:
        for HW, C in SHAPES:
            for element, bytes in (("fp32", 4), ("bf16", 2)):
                for back in (False, True):
                    row(capability, HW, C, element, bytes, back)


def row(capability, HW, C, element, bytes, back):
    report = compile_norm(capability, HW, C, element, back)
    tile = tiling(HW, C, min(32, C // 4), bytes, back)
    blocks = REGISTERS // (report.registers * WARP_THREADS * tile["num_warps"])  # that fit a multiprocessor
    warps = min(WARPS, blocks * tile["num_warps"])
    floor = 3 if back else 2           # read x (and the gradient of y), write what is asked
    passes = floor if tile["WHOLE"] else f"{floor} + {floor - 1} of L2"
    total = floor * BATCH * HW * C * bytes
    print(f"{capability:<5} {HW:>6} {C:>9}  {element}  {'back' if back else 'forward':<8} "
          f"{report.registers:>9} {report.spills:>7} {warps:>9}  {f'{passes} ({floor})':<15} "
          f"{total / 1e9:>6.2f} {1e3 * total / BANDWIDTH:>10.2f}", flush=True)


if __name__ == "__main__":
    table()
