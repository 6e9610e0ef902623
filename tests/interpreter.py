"""Triton's interpreter runs kernels on a CPU, with TRITON_INTERPRET=1 in the environment before the import.

That of Triton 3.6 counts loops with int() of an array of one number, which numpy refuses since 2.4: `mend`
makes up for it.
"""
import os
import subprocess
import sys

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from conftest import ROOT


@triton.jit
def count_kernel(N, OUT):
    for i in range(N):
        tl.store(OUT, i + 1)


def mend():
    """Let the interpreter count loops, if it cannot."""
    try:
        count_kernel[(1,)](3, torch.zeros(1, dtype=torch.int32))
    except interpreter.InterpreterError:
        patch = interpreter._patch_lang_tensor

        def patch_and_mend(tensor, *more):
            patch(tensor, *more)
            tensor.__index__ = lambda self: self.handle.data.item()
        interpreter._patch_lang_tensor = patch_and_mend


def check_tests(path):
    """Run the tests of a file that launch kernels in a second pytest, under the interpreter; all pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not compiles", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | dict(TRITON_INTERPRET="1"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " 0 passed" not in done.stdout and "passed" in done.stdout
