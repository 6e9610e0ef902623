"""Compile a Triton kernel for a GPU that is not there, and read what the machine code needs.

The compiler and the disassembler come with triton. Works in a process without TRITON_INTERPRET.
"""
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import nearest_triton as nearest
from kernels.norm_triton import backward_kernel, forward_kernel, tiling
from kernels.resample_triton import BLOCK, resample_kernel

WARP_THREADS = 32
SHARED_BYTES = {80: 163 * 2**10, 86: 99 * 2**10, 89: 99 * 2**10, 90: 227 * 2**10, 100: 227 * 2**10,
                120: 99 * 2**10}  # a block may use, by compute capability (CUDA programming guide)
# Opcodes that compute nothing
MOVES = {"LDG", "LDGSTS", "LDS", "LDSM", "STS", "STG", "LDC", "LDCU", "BAR", "BRA", "BSSY", "BSYNC", "DEPBAR",
         "LDGDEPBAR", "EXIT", "NOP", "WARPGROUP", "WARPSYNC", "SYNCS", "FENCE", "CS2R", "S2R", "S2UR", "LDTM",
         "UTCBAR", "MEMBAR", "ERRBAR", "ELECT"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Report:
    registers: int          # a thread
    spills: int             # loads and stores of spilled registers
    stack_bytes: int        # a thread
    shared_bytes: int       # a block
    fills: set              # what a masked load gives where it reads nothing, in hexadecimal
    tensor_core: Counter    # tensor-core instructions by opcode, such as IGMMA.64x128x32.S8.S8
    opcodes: Counter        # all instructions by opcode without modifiers

    @property
    def arithmetic(self):
        """Instructions of the whole program that compute, apart from the tensor cores'."""
        return sum(n for op, n in self.opcodes.items() if op not in MOVES and "MMA" not in op)


def compile_for(kernel, capability, pointers, scalars, constants, num_warps, num_stages, multiples=()):
    """A Report on `kernel` for a compute capability such as 90.

    pointers: {argument: element type, such as "*i8"}, 16-byte aligned; scalars: {argument: "i32"};
    constants: {argument: value}; multiples: scalars that Triton finds to be multiples of 16.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else (pointers | scalars)[name] for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *multiples)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, WARP_THREADS),
                              options=dict(num_warps=num_warps, num_stages=num_stages))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        assembly = _run("nvdisasm", "-c", file.name)
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", assembly, re.M)
    opcodes = Counter(op.split(".")[0] for op in found)
    return Report(registers=int(re.search(r"REG:(\d+)", usage)[1]), spills=opcodes["LDL"] + opcodes["STL"],
                  stack_bytes=int(re.search(r"STACK:(\d+)", usage)[1]), shared_bytes=compiled.metadata.shared,
                  fills=set(re.findall(r"mov\.u\d+ %\w+, 0x(\w+);", compiled.asm["ptx"])),
                  tensor_core=Counter(op for op in found if "MMA" in op), opcodes=opcodes)


@triton.jit
def product_kernel(X, Y, Z, S: tl.constexpr):
    """Z int32 [S, S] = X Y for int8 [S, S]."""
    i = tl.arange(0, S)
    square = i[:, None] * S + i[None, :]
    tl.store(Z + square, tl.dot(tl.load(X + square), tl.load(Y + square), out_dtype=tl.int32))


def compile_product(capability):
    """A Report on the plainest product of int8: its tensor_core is what this Triton uses of the target's."""
    return compile_for(product_kernel, capability, dict(X="*i8", Y="*i8", Z="*i32"), {}, dict(S=128),
                       num_warps=4, num_stages=1)


def compile_prepare(capability, D):
    """A Report on prepare_kernel, as it prepares references, for images of D values."""
    tile, padded, score = _shape(capability, D)
    pointers = dict(IMAGES="*i8", OUT="*i8", KEYS=score)
    constants = dict(PIXELS=D, D=padded, G=nearest.group_bits(padded, tile["BN"]), BN=tile["BN"],
                     ROWS=nearest.ROWS, COLUMNS=nearest.COLUMNS)
    return compile_for(nearest.prepare_kernel, capability, pointers, dict(N="i32"), constants,
                       num_warps=4, num_stages=3)


def compile_nearest(capability, D):
    """A Report on nearest_two_kernel for images of D values."""
    tile, D, score = _shape(capability, D)
    pointers = dict(X="*i8", Y="*i8", KEYS=score, SCORES=score, CODES="*i32")
    scalars = dict.fromkeys(("Q", "N", "tiles_a_split", "splits"), "i32")
    constants = dict(D=D, G=nearest.group_bits(D, tile["BN"]), GROUP=nearest.GROUP, TERMS=nearest.INT32_TERMS,
                     **{name: tile[name] for name in ("BQ", "BN", "BK")})
    return compile_for(nearest.nearest_two_kernel, capability, pointers, scalars, constants,
                       tile["num_warps"], tile["num_stages"])


def compile_merge(capability, D):
    """A Report on merge_kernel for images of D values."""
    tile, D, score = _shape(capability, D)
    pointers = dict(X="*i8", Y="*i8", SCORES=score, CODES="*i32",
                    DISTANCES="*i64", INDEX="*i64", VERDICT="*i8")
    scalars = dict.fromkeys(("Q", "N", "splits", "p2", "q2"), "i32")
    W = tile["BN"] >> nearest.group_bits(D, tile["BN"])
    constants = dict(D=D, W=W, BK=nearest.merge_pixels(W, tile["BK"]))
    return compile_for(nearest.merge_kernel, capability, pointers, scalars, constants,
                       num_warps=4, num_stages=3)


def compile_norm(capability, HW, C, element, back=False):
    """A Report on norm_triton's kernel, forward or back, with all its parts.

    For HW pixels and C channels of `element`: "fp32" or "bf16".
    """
    tile = tiling(HW, C, min(32, C // 4), 4 if element == "fp32" else 2, back)
    pointers = dict.fromkeys(("WEIGHT", "BIAS", "MEAN", "SCALE"), "fp32")
    pointers |= dict(X=element, SHIFT=element, SEED="i64")
    pointers |= dict(G=element, DX=element, SUMS="fp32") if back else dict(Y=element)
    scalars = dict.fromkeys(("HW", "C", "B", "shift_row", "dropped"), "i32") | dict(eps="fp32", factor="fp32")
    multiples = [name for name, value in (("HW", HW), ("C", C), ("shift_row", C)) if value % 16 == 0]
    warps = tile.pop("num_warps")
    return compile_for(backward_kernel if back else forward_kernel, capability,
                       {name: f"*{type}" for name, type in pointers.items()}, scalars,
                       dict(SILU=True, **tile), warps, num_stages=3, multiples=multiples)


def compile_resample(capability, element, up):
    """A Report on resample_triton's kernel for `element`: "fp32" or "bf16"."""
    pointers = dict(X=f"*{element}", Y=f"*{element}")
    scalars = dict(W="i32", C="i32", count="i32", factor="fp32")
    return compile_for(resample_kernel, capability, pointers, scalars, dict(UP=up, BLOCK=BLOCK),
                       num_warps=4, num_stages=3, multiples=("W", "C", "count"))


def _shape(capability, D):
    """The tile for images of D values, D padded to it, and the type of scores."""
    tile = nearest.tiles(capability, D)
    padded = triton.cdiv(D, tile["BK"]) * tile["BK"]
    return tile, padded, "*i32" if padded <= nearest.MAX_INT32_PIXELS else "*i64"


def _run(tool, *arguments):
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout
