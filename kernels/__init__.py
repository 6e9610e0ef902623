"""Exact nearest neighbours and the closed-form optimum over a training set of images."""
from kernels.nearest import References, memorized, nearest_two
from kernels.optimum import Optimum

__all__ = ["References", "memorized", "nearest_two", "Optimum"]
