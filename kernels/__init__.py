"""Exact nearest neighbours and the closed-form optimum over a training set of images."""
from kernels.nearest import nearest_two
from kernels.optimum import Optimum

__all__ = ["nearest_two", "Optimum"]
