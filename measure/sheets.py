"""Sheets of images, as PNG: samples; samples beside their nearest; training images by their copies."""
from PIL import Image, ImageDraw, ImageFont

import disk
from images import picture
from measure.neighbours import distance_ratio

CELL = 96                 # pixels a side of an image
PAD = 8
COLUMNS = 12
HEAD, CAPTION = 24, 16    # pixels of a title above, of a line below an image


def sheet(panels):
    """One panel of images below the other, as a PIL image; panels {title: [(uint8 [C, H, W], caption)]}."""
    step = CELL + PAD + CAPTION
    heights = [HEAD + -(-len(cells) // COLUMNS) * step for cells in panels.values()]
    out = Image.new("RGB", (COLUMNS * (CELL + PAD) + PAD, sum(heights)), "white")
    pen, font = ImageDraw.Draw(out), ImageFont.load_default(13)
    for i, (title, cells) in enumerate(panels.items()):
        top = sum(heights[:i])
        pen.text((PAD, top + 4), title, fill="black", font=font)
        for place, (image, caption) in enumerate(cells):
            x, y = PAD + place % COLUMNS * (CELL + PAD), top + HEAD + place // COLUMNS * step
            cell = fitted(picture(image.numpy()))
            out.paste(cell, (x + (CELL - cell.width) // 2, y + (CELL - cell.height) // 2))
            pen.text((x, y + CELL), caption, fill="black", font=font)
    return out


def fitted(image):
    """A picture that fits into a cell: small ones are enlarged by a whole number, for pixels alike."""
    times = CELL // max(image.size)
    if times:
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return image


def save(sheet, path):
    with disk.whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")


def sample_sheet(samples, seeds, rows=8):
    """The first samples [N, C, H, W], each with its seed."""
    return sheet({"samples, by their seeds": [
        (x, str(seed)) for x, seed in zip(samples[:rows * COLUMNS], seeds)]})


def pair_sheet(samples, train, squares, index, neighbours=0, rows=2):
    """The most and the least memorized samples, each with its nearest and second nearest training image."""
    d, ratio = squares.double().sqrt(), distance_ratio(squares, neighbours)
    order, count = ratio.argsort(stable=True).tolist(), rows * COLUMNS // 3

    def triples(chosen):
        return [cell for i in chosen for cell in ((samples[i], f"quotient {ratio[i]:.3f}"),
                                                  (train[index[i, 0]], f"nearest {d[i, 0]:.4g}"),
                                                  (train[index[i, 1]], f"second {d[i, 1]:.4g}"))]
    return sheet({"most memorized": triples(order[:count]), "least memorized": triples(order[::-1][:count])})


def copied_sheet(train, copies, rows=2):
    """The training images [N, C, H, W] with the most copies [N], and the first of those without any."""
    order, count = copies.argsort(descending=True, stable=True).tolist(), COLUMNS * rows
    most = [(train[i], f"{copies[i]}") for i in order if copies[i]]
    never = [(train[i], "") for i in order if not copies[i]]
    return sheet({"most copied, and how often": most[:count], "never copied (the first)": never[:count]})
