"""What the Triton kernel compiles to for GPUs that are not here, and what 10,000 x 50,000 images must cost.

    python bench/kernel_report.py [--D 3072]

Compiles ahead of time (about 1 s a row), reads registers, spills, shared memory and instructions from the machine code,
and prints the paper roofline of kernels/nearest_triton.py. No GPU is used: nothing here is a measured time.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import norm_report  # noqa: E402
from kernels.aot import SHARED_BYTES, WARP_THREADS, compile_nearest  # noqa: E402
from kernels.nearest_triton import tiles  # noqa: E402
from run import option, stage  # noqa: E402

Q, N = 10_000, 50_000
# int8 operations and bytes a second: data sheets of the SXM models; L2 bandwidth as microbenchmarks find it
ROOFLINES = {"H100": dict(capability=90, tops=1979e12, l2=5.5e12, hbm=3.35e12),
             "A100": dict(capability=80, tops=624e12, l2=4.5e12, hbm=2.0e12)}


@dataclass(frozen=True)
class Options:
    D: int = option(3072, "values of an image")


def machine_code(D):
    print(f"nearest_two_kernel, D = {D}, by compute capability\n")
    print("sm   tile (Q x N x pixels, warps, stages)  registers  spills  shared KiB (of)  tensor core          arithmetic/element")
    for capability, limit in SHARED_BYTES.items():
        tile, report = tiles(capability), compile_nearest(capability, D)
        elements = tile["BQ"] * tile["BN"] / (tile["num_warps"] * WARP_THREADS)
        shape = f"{tile['BQ']} x {tile['BN']} x {tile['BK']}, {tile['num_warps']}, {tile['num_stages']}"
        opcode = " ".join(report.tensor_core)
        print(f"{capability:<4} {shape:<37} {report.registers:>9} {report.spills:>7} {report.shared_bytes / 1024:>10.0f} "
              f"({limit // 1024:>3})  {opcode:<21} {report.arithmetic / elements:>17.1f}")


def roofline(D):
    print(f"\nroofline of {Q:,} x {N:,} images of {D:,} values, in milliseconds; the largest bounds it\n")
    print("GPU   products  L2 to SM (GB)   HBM (GB)")
    for name, gpu in ROOFLINES.items():
        tile = tiles(gpu["capability"])
        l2_bytes = Q * N * D * (1 / tile["BQ"] + 1 / tile["BN"])
        hbm_bytes = (Q + N) * D
        print(f"{name}  {2 * Q * N * D / gpu['tops'] * 1e3:>8.2f}  {l2_bytes / gpu['l2'] * 1e3:>8.2f} ({l2_bytes / 1e9:.1f})"
              f"  {hbm_bytes / gpu['hbm'] * 1e3:>8.2f} ({hbm_bytes / 1e9:.1f})")


def report(options):
    machine_code(options.D)
    roofline(options.D)
    norm_report.table()


def main():
    stage(report, Options, __doc__)


if __name__ == "__main__":
    main()
