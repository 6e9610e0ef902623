"""measure/denoisers.py: membership and agreement of small cases; losses are tested with paper/compare.py."""
import pytest
import torch

from measure import denoisers


def test_membership_is_that_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    # whole numbers, many of them equal
    members, others = (torch.randint(low, 400, (n,), generator=generator).double()
                       for low, n in ((0, 150), (40, 301)))
    found = denoisers.membership(members, others)
    pairs = [(float(a < b) + float(a == b) / 2) for a in members for b in others]
    assert found["auc"] == pytest.approx(sum(pairs) / len(pairs))
    rates = [(float((members < t).double().mean()), float((others < t).double().mean()))
             for t in torch.arange(402)]
    best = max(true for true, false in rates if false <= 0.01)
    assert found["tpr"] == pytest.approx(best) and best > 0
    few = denoisers.membership(torch.tensor([0.1, 0.9]), torch.tensor([0.5]))
    assert few == dict(auc=0.5, tpr=0.5)  # one member of two is under all outside
    assert denoisers.membership(torch.zeros(3), torch.zeros(5)) == dict(auc=0.5, tpr=0)


def test_samples_of_known_distances():
    one = torch.tensor([[0, 0], [10, 0], [0, 0]], dtype=torch.uint8).reshape(3, 1, 1, 2)
    other = torch.tensor([[3, 4], [10, 0], [0, 8]], dtype=torch.uint8).reshape(3, 1, 1, 2)
    found = denoisers.agreement(one, other, torch.tensor([26, 1, 65]), torch.tensor([26, 0, 64]))
    # squared distances 25, 0, 64; the second pair equals a training image, the third is as far as one
    assert found["closer"] == 1 and found["share"] == 1 / 3
    assert found["rms_a_seed"] == pytest.approx(((25 + 0 + 64) / 6) ** 0.5)
    # the other's [0, 8], [3, 4], [10, 0]
    assert found["rms_two_seeds"] == pytest.approx((64 + (49 + 16) + 100) ** 0.5 / 6 ** 0.5)
    assert found["rms_training"] == pytest.approx((182 / 12) ** 0.5)
    assert found["quantiles_a_seed"][0] == 0 and found["quantiles_a_seed"][-1] == pytest.approx(32 ** 0.5)
