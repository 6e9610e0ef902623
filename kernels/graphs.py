"""CUDA graphs: launches recorded once and then replayed, for work that takes less time than launching it."""
import sys

import torch

WARM_UP = 2  # calls launched one by one: they compile kernels, choose algorithms and reserve workspaces


class Replayed:
    """Call one function, of tensors of the same shapes each time: replayed(function, *tensors).

    From the third call on it is replayed as a CUDA graph. A `pure` function, which changes nothing, is called
    for nothing first, and every answer is the graph's: in float32 cuDNN may choose other kernels for a graph
    (measured at width 256), which round otherwise.

    Random numbers are the same: torch's default generator, seeded before a call as ever, is read at each
    replay. The function may not wait for the device.
    Where it cannot be recorded that is said on stderr, once, and it is called as it is.
    """

    def __init__(self, wanted=True, pure=False):
        self.wanted, self.pure, self.calls = wanted, pure, 0
        self.graph = self.held = self.result = None

    def __call__(self, function, *tensors):
        if self.wanted and self.graph is None and (self.pure or self.calls == WARM_UP):
            for _ in range(WARM_UP - self.calls):
                function(*tensors)
            self.capture(function, tensors)
        if self.graph is None:
            result = function(*tensors)
            self.calls = min(self.calls + 1, WARM_UP)  # not of one that ran out of memory
            return result
        for held, tensor in zip(self.held, tensors):
            held.copy_(tensor)
        self.graph.replay()
        return self.result.clone()

    def forget(self):
        """Give back the memory that the graph holds; the next call records another."""
        self.graph = self.held = self.result = None

    def capture(self, function, tensors):
        self.held = [tensor.clone() for tensor in tensors]
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # gives back the memory that the calls before have used
                self.result = function(*self.held)
        except RuntimeError as error:
            self.wanted = False
            self.forget()
            print(f"no CUDA graph ({str(error).splitlines()[0]}): kernels are launched one by one, "
                  "which takes longer where they are small", file=sys.stderr, flush=True)
        else:
            self.graph = graph
