"""What the Triton kernels compile to for GPUs that are not here, and what they must cost on paper.

    python bench/kernel_report.py [--D 3072,49152]

Compiles ahead of time (about 1 s a row), reads registers, spills, shared memory and instructions from the
machine code, and prints the least time of 10,000 x 50,000 images and of a norm. No time here is measured.
"""
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import aot
from kernels.nearest_triton import group_bits, tiles
from kernels.norm_triton import tiling
from run import option, stage

Q, N = 10_000, 50_000
# int8 operations, instructions (64 a clock and multiprocessor) and bytes a second, of data sheets of the SXM
# models; from L2, what the kernel reached on an H200, and for an A100 what microbenchmarks find.
ROOFLINES = {"H200": dict(capability=90, tops=1979e12, issued=64 * 132 * 1.76e9, l2=6.7e12, hbm=4.8e12),
             "H100": dict(capability=90, tops=1979e12, issued=64 * 132 * 1.76e9, l2=6.7e12, hbm=3.35e12),
             "A100": dict(capability=80, tops=624e12, issued=64 * 108 * 1.41e9, l2=4.5e12, hbm=2.0e12)}
BATCH, COPIED = 512, 4.17e12       # images of a norm; bytes a second, copied by an H200 (3.0e12 on an H100)
REGISTERS, WARPS = 2**16, 64       # of a multiprocessor
SHAPES = (1024, 256), (256, 256)   # pixels and channels of DDPM++ of width 128 at 32x32 and 16x16


@dataclass(frozen=True)
class Options:
    D: tuple[int, ...] = option((3072, 49152), "values of an image")


def machine_code(D):
    """Prints a table; returns, by capability, the computing instructions of nearest_two_kernel an element."""
    print(f"machine code for D = {D:,}, by compute capability\n")
    print("sm   kernel   tile (Q x N x pixels, warps, stages)  registers  spills  shared KiB (of)  "
          "tensor core            arithmetic/element")
    kernels = dict(prepare=aot.compile_prepare, nearest=aot.compile_nearest, merge=aot.compile_merge)
    arithmetic = {}
    for capability, limit in aot.SHARED_BYTES.items():
        tile = tiles(capability, D)
        elements = tile["BQ"] * tile["BN"] / (tile["num_warps"] * aot.WARP_THREADS)
        for name, compiled in kernels.items():
            report, shape, last = compiled(capability, D), "", ""
            if name == "nearest":
                arithmetic[capability] = report.arithmetic / elements
                shape = "{BQ} x {BN} x {BK}, {num_warps}, {num_stages}".format(**tile)
                last = f"{arithmetic[capability]:.1f}"
            print(f"{capability:<4} {name:<8} {shape:<37} {report.registers:>9} {report.spills:>7} "
                  f"{report.shared_bytes // 1024:>10} ({limit // 1024:>3})  "
                  f"{' '.join(report.tensor_core):<23} {last:>18}", flush=True)
    return arithmetic


def roofline(D, arithmetic):
    """Prints gigabytes moved, the least there is to move, and milliseconds, of each part of a call."""
    print(f"\n{Q:,} x {N:,} images of {D:,} values, on paper: GB moved (GB at least), ms\n")
    print("GPU   references, once        queries  tiles, from L2           products  epilogue"
          "            merge    a call")
    for name, gpu in ROOFLINES.items():
        tile = tiles(gpu["capability"], D)
        W = tile["BN"] >> group_bits(D, tile["BN"])
        parts = {"references": (2 * N * D, 2 * N * D, "hbm"), "queries": (2 * Q * D, 2 * Q * D, "hbm"),
                 "tiles": (Q * N * D * (1 / tile["BQ"] + 1 / tile["BN"]), (Q + N) * D, "l2"),
                 "merge": (Q * (2 * W + 1) * D, 3 * Q * D, "hbm")}
        ms = {part: 1e3 * moved / gpu[memory] for part, (moved, _, memory) in parts.items()}
        text = {part: f"{moved / 1e9:.2f} ({least / 1e9:.2f}) {ms[part]:.2f}"
                for part, (moved, least, _) in parts.items()}
        products = 1e3 * 2 * Q * N * D / gpu["tops"]
        epilogue = 1e3 * Q * N * arithmetic[gpu["capability"]] / gpu["issued"]
        call = ms["queries"] + max(ms["tiles"], products + epilogue) + ms["merge"]
        print(f"{name} {text['references']:>17} {text['queries']:>17} {text['tiles']:>19} {products:>15.2f} "
              f"{epilogue:>9.2f} {text['merge']:>16} {call:>9.2f}")


def norms():
    """Prints registers, spills and warps by compute capability, and the least time of each norm."""
    print(f"norm with shift, silu and dropout; the floor is {BATCH} images at {COPIED / 1e12:.2f} TB/s\n")
    print("sm    pixels  channels  type  pass     registers  spills  warps/SM  "
          "passes (floor)      GB  floor, ms")
    for capability, (HW, C), (element, bytes), back in itertools.product(
            aot.SHARED_BYTES, SHAPES, (("fp32", 4), ("bf16", 2)), (False, True)):
        report = aot.compile_norm(capability, HW, C, element, back)
        tile = tiling(HW, C, min(32, C // 4), bytes, back)
        blocks = REGISTERS // (report.registers * aot.WARP_THREADS * tile["num_warps"])  # of a multiprocessor
        warps = min(WARPS, blocks * tile["num_warps"])
        floor = 3 if back else 2  # read x (and the gradient of y), write what is asked
        passes = floor if tile["WHOLE"] else f"{floor} + {floor - 1} of L2"
        total = floor * BATCH * HW * C * bytes
        print(f"{capability:<5} {HW:>6} {C:>9}  {element}  {'back' if back else 'forward':<8} "
              f"{report.registers:>9} {report.spills:>7} {warps:>9}  {f'{passes} ({floor})':<15} "
              f"{total / 1e9:>6.2f} {1e3 * total / COPIED:>10.2f}", flush=True)


def report(options):
    for D in options.D:
        roofline(D, machine_code(D))
        print()
    norms()


def main():
    stage(report, Options, __doc__)


if __name__ == "__main__":
    main()
