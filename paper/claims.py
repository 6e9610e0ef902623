"""What an experiment is: points to measure, and what is claimed of them."""
import math
from dataclasses import dataclass, field

SCALES = "cpu", "gpu", "paper"
SEEDS = dict(paper=1, gpu=1, cpu=3)  # runs of every point, where an experiment has no number of its own
KNOWN = "figure", "text", "second hand", "beyond"  # how a finding is known; beyond: it is not the paper's
FIRST, LAST, ALL = "first", "last", "all"
FASHION = dict(data="fashion-mnist", resolution=8)


@dataclass(frozen=True)
class Point:
    """A place in a figure: its line, its x, the options that it is given, and |D|; None asks for EMM."""
    series: str
    x: float | str
    given: dict
    n: int | None = None


@dataclass(frozen=True)
class Claim:
    """More at the first place than at the second: the difference lies in `range`, or, without a second, the
    value itself does.

    A place is (series, x): `FIRST` and `LAST` are the ends of the series, and `ALL` its mean over the x that
    both series have.
    """
    text: str
    more: tuple
    less: tuple = ()
    range: tuple = (0, math.inf)


@dataclass(frozen=True)
class Slope:
    """The power by which what is measured grows with x, the slope of log against log, lies in `range`.

    Of a series, or of all points at once.
    """
    text: str
    range: tuple
    series: str = ALL


@dataclass(frozen=True)
class Experiment:
    about: str
    x: str
    finding: str                               # in our words; beyond the paper also whose it is
    claims: list
    paper: list = field(default_factory=list)
    cpu: list = field(default_factory=list)
    gpu: list = field(default_factory=list)
    measure: str = ""                          # of paper/beyond.py; the ratio, or EMM where no |D| is given
    known: str = "text"                        # of KNOWN
    # (series, x; None for the file's) here -> (experiment, series; None for all) of paper/digitised.csv
    published: dict = field(default_factory=dict)
    seeds: dict = field(default_factory=dict)  # {scale: runs of every point}, in place of SEEDS


def over(name, *values, n=None, series="", also=None):
    """A point for each value of an option."""
    return [Point(series, value, dict(also or {}, **{name: value}), n) for value in values]


def sizes(*values, series="", given=None):
    """A point for each |D|."""
    return [Point(series, n, given or {}, n) for n in values]


def named(n, rows, also=None):
    """A point for each name of `rows` and what it gives."""
    return [Point("", name, dict(also or {}) | given, n) for name, given in rows.items()]
