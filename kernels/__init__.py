"""Exact nearest neighbours and the closed-form optimum over a training set of images."""
from kernels.nearest import memorized, nearest_two
from kernels.optimum import Optimum

__all__ = ["memorized", "nearest_two", "Optimum"]
