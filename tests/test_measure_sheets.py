import numpy as np
import torch
from PIL import Image

from measure import sheets


def test_the_most_and_the_never_copied():
    train = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 1, 4, 4) * 5 + 20
    copies = torch.zeros(40, dtype=torch.int64)
    copies[[7, 30, 9]] = torch.tensor([2, 5, 2])
    sheet = np.asarray(sheets.copied_sheet(train, copies, rows=1))[..., 0]
    middle = sheets.PAD + (sheets.CELL + sheets.PAD) * np.arange(12) + 48
    row = [24 + 48 + panel * (24 + sheets.CELL + sheets.PAD + 16) for panel in range(2)]
    most, never = sheet[row[0], middle], sheet[row[1], middle]
    assert ((most[:3] - 20) // 5).tolist() == [30, 7, 9] and set(most[3:].tolist()) == {255}
    assert ((never - 20) // 5).tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13]


def test_samples_stand_in_the_order_of_their_seeds():
    samples = torch.arange(14, dtype=torch.uint8)[:, None, None, None].expand(14, 3, 4, 4) * 10
    sheet = np.asarray(sheets.sample_sheet(samples, range(5, 19)))
    step, half = sheets.CELL + sheets.PAD, sheets.CELL // 2
    top, left = sheets.HEAD + half, sheets.PAD + half
    found = [sheet[top + i // 12 * (step + sheets.CAPTION), left + i % 12 * step, 0] for i in range(14)]
    assert found == list(range(0, 140, 10))
    assert len(np.asarray(sheets.sample_sheet(samples.repeat(10, 1, 1, 1), range(140)))) == 24 + 8 * 120


def test_pairs_by_carlinis_ratio():
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 1, 4, 4) * 50
    squares = torch.tensor([[16, 25, 10_000], [9, 10, 11]])  # 4/5 and 3/3.2; by the mean 4/36 and 3/3.2
    index = torch.tensor([[0, 1, 2], [3, 2, 1]])
    middle = sheets.HEAD + sheets.CELL // 2

    def first(sheet):
        return [sheet.getpixel((sheets.PAD + sheets.CELL // 2 + i * (sheets.CELL + sheets.PAD), middle))[0]
                for i in range(7)]
    sheet = sheets.pair_sheet(images[:2], images, squares, index, neighbours=3)
    assert first(sheet) == [0, 0, 50, 50, 150, 100, 255]  # sample 0 and its nearest two, sample 1 and its
    squares[0, 1] = 17  # 4/4.12, no longer the smaller one by the second nearest
    assert first(sheets.pair_sheet(images[:2], images, squares[:, :2], index))[0] == 50


def test_pixels_stay_alike():
    for side, shown in ((8, 96), (28, 84), (96, 96), (200, 96)):
        assert sheets.fitted(Image.new("L", (side, side))).size == (shown, shown)
    stripes = np.asarray(sheets.fitted(Image.fromarray(np.tile(np.array([[0, 255]], np.uint8), (28, 14)))))
    assert np.diff(np.flatnonzero(np.diff(stripes[0].astype(int)))).tolist() == [3] * 26
