"""Sheets of images, as PNG: samples beside their nearest training images; the most and the never copied."""
from PIL import Image, ImageDraw, ImageFont

from images import picture
from measure.curve import distance_ratio

CELL = 96                 # pixels a side of an image
PAD = 8
COLUMNS = 12              # of the sheet of copied images


def pair_sheet(samples, train, distances, index, rows=8, neighbours=0):
    """The most (left) and the least (right) memorized samples: sample, nearest, second nearest, ratio."""
    d, ratio = distances.double().sqrt(), distance_ratio(distances, neighbours)
    order = ratio.argsort(stable=True).tolist()
    rows = min(rows, len(order))
    panels = (("most memorized", order[:rows]), ("least memorized", order[::-1][:rows]))
    pad, head, text = PAD, 44, 88
    width = 3 * (CELL + pad) + text
    sheet = Image.new("RGB", (2 * width + 3 * pad, head + rows * (CELL + pad) + pad), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for panel, (title, chosen) in enumerate(panels):
        left = pad + panel * (width + pad)
        pen.text((left, 4), title, fill="black", font=font)
        for column, word in enumerate(("sample", "nearest", "second", "ratio")):
            pen.text((left + column * (CELL + pad), 24), word, fill="black", font=font)
        for row, i in enumerate(chosen):
            top = head + row * (CELL + pad)
            for column, image in enumerate((samples[i], train[index[i, 0]], train[index[i, 1]])):
                cell = picture(image.numpy()).resize((CELL, CELL), Image.Resampling.NEAREST)
                sheet.paste(cell, (left + column * (CELL + pad), top))
            lines = [f"{ratio[i]:.3f}" if d[i, 1] > 0 else "0 / 0", f"d1 {d[i, 0]:.1f}", f"d2 {d[i, 1]:.1f}"]
            pen.multiline_text((left + 3 * (CELL + pad), top + CELL // 4), "\n".join(lines),
                               fill="black", font=font)
    return sheet


def copied_sheet(train, copies, rows=2):
    """The training images [N, C, H, W] with the most copies [N], and the first of those without any."""
    order = copies.argsort(descending=True, stable=True).tolist()
    count = COLUMNS * rows
    panels = (("most copied, and how often", [i for i in order if copies[i]][:count]),
              ("never copied (the first)", [i for i in order if not copies[i]][:count]))
    head, step = 24, CELL + PAD + 16
    sheet = Image.new("RGB", (COLUMNS * (CELL + PAD) + PAD, 2 * (head + rows * step)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for panel, (title, chosen) in enumerate(panels):
        top = panel * (head + rows * step)
        pen.text((PAD, top + 4), title, fill="black", font=font)
        for place, i in enumerate(chosen):
            x, y = PAD + place % COLUMNS * (CELL + PAD), top + head + place // COLUMNS * step
            sheet.paste(picture(train[i].numpy()).resize((CELL, CELL), Image.Resampling.NEAREST), (x, y))
            pen.text((x, y + CELL), f"{copies[i]}" if copies[i] else "", fill="black", font=font)
    return sheet
