"""Images out of files: standard data sets, folders, zips and arrays, as people have them (docs/inputs.md)."""
from images.files import place, read, shape_of, there
from images.pixels import load_arrays, picture
from images.standard import STANDARD

__all__ = ["STANDARD", "load_arrays", "picture", "place", "read", "shape_of", "there"]
