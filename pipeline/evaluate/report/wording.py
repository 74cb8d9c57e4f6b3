"""The report's words: what its names mean to a reader, and numbers as the page writes them."""

import math
from dataclasses import dataclass

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MOST_DECIMALS = 6


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a reader must know of one metric."""

    name: str
    """Its short name."""
    asks: str
    """What it answers, in a few words."""
    how: str
    """How to read it, in a sentence or two."""
    scale: str
    """Of its axis: "bent" for sizes from 0 to hundreds, "share" of 0 to 1, "even" for anything else."""
    lower_is_better: bool = False


METRICS = {
    "fid": Metric(
        name="FID",
        asks="how far apart are the two sets?",
        how="Distance between all synthetic images and real ones that nothing was trained on. Lower is better; that of "
        "real images is the best one can hope for.",
        scale="bent",
        lower_is_better=True,
    ),
    "kid": Metric(
        name="KID",
        asks="the same, fair to small sets",
        how="Another distance between the two sets, which does not grow when images are few. Lower is better; about 0, "
        "or a little below, means that no difference was found.",
        scale="bent",
        lower_is_better=True,
    ),
    "precision": Metric(
        name="Precision",
        asks="does each image look real?",
        how="Share of synthetic images that lie where real ones do. Higher is better.",
        scale="share",
    ),
    "recall": Metric(
        name="Recall",
        asks="is every kind of image there?",
        how="Share of real images that lie where synthetic ones do. Higher is better; low means that kinds are gone.",
        scale="share",
    ),
    "density": Metric(
        name="Density",
        asks="how close to real ones?",
        how="As precision, and counting how many real images each synthetic one is close to. Higher is better; real "
        "images have about 1, and it can be more.",
        scale="even",
    ),
    "coverage": Metric(
        name="Coverage",
        asks="how many real ones have a like?",
        how="Share of real images with a synthetic one close to them. Higher is better.",
        scale="share",
    ),
    "inception_score": Metric(
        name="Inception Score",
        asks="are images clear, and of many kinds?",
        how="How sure the classifier is of each image, and how evenly its answers spread over classes; real images are "
        "not compared. Higher is better.",
        scale="even",
    ),
}
ANCHORS = {
    "real": "Real",
    "blurred": "Real, blurred",
    "noisy": "Real, noisy",
    "one class missing": "Real, one class missing",
    "ten images repeated": "Real, ten repeated",
}
ARMS = {"real": "Real", "real + flips": "Real, some mirrored", "synthetic": "Synthetic", "both": "Real and synthetic"}
GATES = {"utility": "Usefulness to a classifier", "copies_p_value": "Copies of training images (p-value)"}


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A number as the page shows it."""

    text: str
    """Rounded."""
    exact: str = ""
    """As it is; empty where there is none."""
    margin: str = ""
    """How far it may be off, either way, rounded; empty: nothing is known of that."""
    exact_margin: str = ""
    """The same as it is."""


def metric(name: str) -> Metric:
    """What to know of a metric; of an unknown one, its name."""
    return METRICS.get(name, Metric(name=name, asks="", how="", scale="even"))


def gate(name: str) -> str:
    """A gate's name in a table."""
    return GATES.get(name, metric(name).name)


def number(value: float, digits: int = 3) -> str:
    """To so many digits, or to the unit where that takes more; integers as they are."""
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    size = math.floor(math.log10(abs(value)))
    if size < -4:
        digit, _, power = f"{value:.{digits - 1}e}".partition("e")
        text = f"{_trimmed(digit)} × 10{str(int(power)).translate(_SUPERSCRIPT)}"
    else:
        text = _trimmed(f"{value:,.{max(0, digits - 1 - size)}f}")
    return text.replace("-", "−")


def apart(value: float, limit: float) -> tuple[str, str]:
    """Two numbers with as many digits as it takes to see that they differ."""
    for digits in range(3, 17):
        both = number(value, digits), number(limit, digits)
        if value == limit or both[0] != both[1]:
            return both
    return repr(value), repr(limit)


def judged(name: str, value: float, limit: float, at: str, passed: bool) -> str:
    """What a gate says, as a part of a sentence."""
    if name == "utility":
        value, limit = 100 * value, 100 * limit
    found, bound = apart(value, limit)
    if name == "utility":
        only = "" if passed else "only "
        return f"they teach a classifier {only}{found} % of what real images teach it (at {at} {bound} %)"
    if name == "copies_p_value":
        copies = (
            "no more of them lie near to training images than held-out ones do"
            if passed
            else "more of them lie near to training images than held-out ones do: look at the pairs, for they are "
            "copies, or images that are more alike than real ones"
        )
        return f"{copies} (p-value {found}, at {at} {bound})"
    return f"{metric(name).name} is {found} (at {at} {bound})"


def shown(value: float | None, digits: int = 3, scale: float = 1.0) -> Shown:
    """A number alone, shown times `scale`; a dash for none."""
    if value is None:
        return Shown(text="–")
    return Shown(text=number(value if scale == 1.0 else value * scale, digits), exact=repr(value))


def percent(share: float | None) -> Shown:
    """A share in percent, each with as many digits as the next."""
    return Shown(text=f"{100 * share:.1f}", exact=repr(share)) if share is not None else Shown(text="–")


def with_margin(value: float, error: float, scale: float = 1.0) -> Shown:
    """A number and twice its standard error, to the digits that the error leaves; both shown times `scale`."""
    margin = 2 * error * scale
    if not margin > 0:
        return shown(value, 4, scale)
    leading = f"{margin:.1e}"[0]  # a 1 alone would be coarse: 0.14 and 0.06 are as fine as each other
    decimals = (1 if leading == "1" else 0) - math.floor(math.log10(margin))
    decimals = min(max(0, decimals), _MOST_DECIMALS)
    text = f"{value * scale:,.{decimals}f}".replace("-", "−")
    return Shown(text=text, exact=repr(value), margin=f"{margin:,.{decimals}f}", exact_margin=repr(2 * error))


def _trimmed(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text
