"""The order of a training set, and who is in which part and shown how often."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from images.subsets import balanced_order, in_part, repetition, shown


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.none() | st.integers(0, 9), st.data())
def test_any_prefix_is_as_even_as_it_can_be(classes, seed, draw):
    classes = torch.tensor(classes)
    order = balanced_order(classes, seed)
    assert sorted(order.tolist()) == list(range(len(classes)))
    n = draw.draw(st.integers(1, len(classes)))
    available, taken = torch.bincount(classes, minlength=5), torch.bincount(classes[order[:n]], minlength=5)
    most = taken.max()
    # behind only where a class is used up
    assert all(t >= most - 1 or t == a for t, a in zip(taken, available))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=80),
       st.floats(0, 1), st.none() | st.integers(0, 9))
def test_any_prefix_of_a_mixture_has_its_share(members, share, seed):
    classes, origin = (torch.tensor(column) for column in zip(*members))
    order = balanced_order(classes, seed, origin, share)
    assert len(set(order.tolist())) == len(order)
    for c in classes.unique():
        own = order[classes[order] == c]
        for k in range(1, len(own) + 1):
            assert abs(int(origin[own[:k]].sum()) - share * k) < 1 + 1e-6
        # where it ends, none is left of the source that is due
        due, before = (np.floor(k * share + 1e-9) for k in (len(own) + 1, len(own)))
        turn = int(due > before)
        used = own[origin[own] == turn]
        assert len(used) == int(((classes == c) & (origin == turn)).sum())
    longest = balanced_order(classes, seed, torch.zeros_like(origin), 0.0)
    assert longest.tolist() == balanced_order(classes, seed).tolist()


def test_parts():
    groups = torch.tensor([0, 0, 1, 0, 1, 0, 0])
    assert [in_part(groups, f"{i}/2").tolist() for i in (1, 2)] == [[0, 2, 3, 6], [1, 4, 5]]
    assert in_part(groups, "").tolist() == list(range(7)) and in_part(groups, "3/4").tolist() == [3]
    for wrong in ("0/2", "3/2", "1", "1/", "1/99999", "-1/2"):
        with pytest.raises(ValueError, match=f"--part '{wrong}'"):
            in_part(groups, wrong)


def test_images_that_are_repeated():
    times = torch.bincount(shown(10, "4:0.3", 1))
    assert sorted(times.tolist()) == [1] * 7 + [4] * 3 and shown(10, "", 1) is ...
    assert not torch.equal(times, torch.bincount(shown(10, "4:0.3", 2)))
    assert torch.equal(shown(10, "4:0.3", None), shown(10, "4:0.3", 0))
    assert repetition("10:.25") == (10, 0.25)
    for wrong in ("1:0.1", "20000:0.1", "4:0", "4:0.0", "4:1", "4:1.5", "4:nan", "4", "x:0.5", "-4:0.5"):
        with pytest.raises(ValueError, match=f"--repeat '{wrong}'"):
            repetition(wrong)
