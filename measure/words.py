"""What the numbers of measure/ say, in words: lines for people, out of the fields of memorize.json."""

SAID = 3.0   # deviations from which something is said: by chance one test in 370 has it


def beside(result):
    """Lines about those of held_out, quality, which and spurious that a result has."""
    parts = dict(held_out=of_control, quality=of_quality, which=of_which,
                 spurious=lambda found: of_spurious(found, result["threshold"]))
    return [line for name, say in parts.items() if name in result for line in say(result[name])]


def percent(found, name, interval):
    low, high = found[interval]
    return f"{found[name]:.2%} ({low:.2%} to {high:.2%})"


def of_control(found):
    low, high = found["threshold_interval_95"]
    lines = [f"control: {found['memorized']} of {found['images']} held-out images would count as memorized, "
             f"{percent(found, 'ratio', 'interval_95')}: the threshold's false positives",
             f"at {found['rate']:.0%} of false positives the threshold is {found['threshold']:.3f} "
             f"({low:.3f} to {high:.3f}), and the share of the samples under it "
             f"{percent(found, 'samples_under_threshold', 'samples_interval_95')}"]
    for name, value, deviation in (("Z_U", found["z_u"], 1.0), ("C_T", found["c_t"], found["c_t_deviation"])):
        if value is None:
            lines.append(f"{name}: no cell holds enough samples")
            continue
        z = value / deviation
        how = ("nearer to the training images than held-out images are: copying" if z < -SAID else
               "further from the training images than held-out images are: underfitting" if z > SAID else
               "as far from the training images as held-out images are, within chance")
        lines.append(f"{name} {value:+.1f}: samples are {how}")
    if found["training_copies"]:
        names = found["names_in_training"]
        more = ", ..." if len(names) < found["training_copies"] else ""
        lines.append(f"{found['training_copies']} held-out images equal a training image, and count among "
                     f"the false positives: {', '.join(names)}{more}; take them out")
    return lines


def of_quality(found):
    titles = dict(training="samples against training images", held_out="samples against held-out images",
                  held_out_against_training="held-out against training images")
    return [f"{titles[name]}: {of_scores(q)}" for name, q in found.items() if name in titles]


def of_scores(q):
    shares = (f"{name} {q[name]:.3f}" for name in ("precision", "recall", "density", "coverage"))
    return f"{', '.join(shares)}, Frechet distance {q['frechet']:.4g}"


def of_which(found):
    low, high = found["copied_if_uniform_95"]
    lines = [f"{found['copied']} training images copied, one of them {found['most_copies']} times; as many "
             f"uniform draws touch {found['copied_if_uniform']:.1f} ({low:.1f} to {high:.1f})"]
    for name, what in (("nearest", "the distance to its nearest training image"),
                       ("density", "the mean distance to its ten nearest")):
        rho, interval = found[f"copies_{name}_correlation"], found[f"copies_{name}_interval_95"]
        if rho is None:
            continue
        kind = ("isolated images are copied more" if interval[0] > 0 else
                "typical images are copied more" if interval[1] < 0 else "not told from none")
        lines.append(f"rank correlation of an image's copies with {what}: {rho:+.2f} "
                     f"({interval[0]:+.2f} to {interval[1]:+.2f}), {kind}")
    return lines


def of_spurious(found, threshold):
    return [f"{found['samples']} samples spurious, {percent(found, 'ratio', 'interval_95')}: not memorized, "
            f"and another sample is under {threshold} of the distance to the nearest training image"]


def of_snapshots(rows):
    """A line for each snapshot, against held-out images where there are any."""
    lines = []
    for row in rows:
        held = row.get("held_out")
        against = "held-out" if held else "training"
        under = held and f", {held['samples_under_threshold']:.2%} at {held['rate']:.0%} of false positives"
        lines.append(f"{row['file']}: {row['ratio']:.2%} memorized{under or ''}; against {against} images "
                     f"{of_scores(row['quality'][against.replace('-', '_')])}")
    return "\n".join(lines)
