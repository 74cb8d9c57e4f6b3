"""The class of a sample: where foreign WebDataset shards say it, and how what they say becomes a number."""

import json
import re
from collections.abc import Callable, Iterable, Sequence

from pipeline.dataset import tar
from pipeline.errors import InputError

MAX_CLASSES = 100_000
_NAMES_SHOWN = 20


class LabelError(InputError):
    """A label that cannot be read, or that no class name is given for."""


def sample_label(
    sample: tar.Sample, read: Callable[[tar.Member], bytes], label_field: str, where: str
) -> int | str | None:
    """A sample's class: a number, a name, or None where it says nothing.

    `label_field` is cls (the text of that member), json:KEY (a value in the .json member) or folder (the last folder of
    the key). `read` fetches a member's bytes, and only the member that is asked for; `where` names the tar in the
    message. Raises LabelError for what is neither a number nor a name.
    """
    if label_field == "folder":
        return sample.key.rpartition("/")[0].rpartition("/")[2] or None
    kind, _, key = label_field.partition(":")
    member = sample.members.get(kind)
    if member is None:
        return None
    text = read(member)
    try:
        value = json.loads(text).get(key) if kind == "json" else text.decode().strip()
    except (ValueError, AttributeError, RecursionError) as error:
        raise LabelError(f"{where}: the .{kind} of {sample.key} cannot be read ({error})") from error
    return parse_label(value, f"{where}: the label of {sample.key}")


def parse_label(value: object, what: str) -> int | str | None:
    """A label as a file holds it → a number (digits count as one), a name or None; LabelError for anything else.

    `what` begins the message, e.g. "a.tar: the label of s17".
    """
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value):
        return int(value)
    # JSON can spell half a surrogate pair, which no UTF-8 file of ours could hold.
    if isinstance(value, str) and value.encode(errors="replace").decode() == value:
        return value
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise LabelError(f"{what} is {value!r}, neither a number nor a name")


def number_classes(
    labels: Iterable[int | str | None], class_names: Sequence[str], where: str
) -> tuple[Callable[[int | str], int], tuple[str, ...]]:
    """How a label becomes a number, and the classes' names; `labels` are all of them or the distinct ones.

    Numbers stay what they are, and `class_names` names them (else "0", "1", …); names are numbered in the order of
    `class_names`, else of the alphabet. No labels: no classes. `where` begins the message, e.g. "source /data/pets".
    Raises LabelError for numbers out of range and for class names that are not those of the labels.
    """
    distinct = sorted({label for label in labels if label is not None}, key=lambda label: (str(type(label)), label))
    if not distinct:
        return int, ()
    numbers = [label for label in distinct if isinstance(label, int)]
    if len(numbers) == len(distinct):
        allowed = len(class_names) or MAX_CLASSES
        if min(numbers) < 0 or max(numbers) >= allowed:
            raise LabelError(
                f"{where} has labels {min(numbers)} … {max(numbers)}, and {allowed} class "
                "names are allowed for; see --class-names"
            )
        return int, tuple(class_names) or tuple(map(str, range(max(numbers) + 1)))
    names = list(map(str, distinct))
    if class_names and set(class_names) != set(names):
        shown = ", ".join(names[:_NAMES_SHOWN])
        raise LabelError(f"{where} has classes {shown}; --class-names must hold the same names")
    ordered = tuple(class_names) or tuple(names)
    position = {name: number for number, name in enumerate(ordered)}
    return (lambda label: position[str(label)]), ordered
