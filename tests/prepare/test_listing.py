"""What a listing is: its identity, its order, and what travels to a task."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.prepare import listing, sources
from pipeline.prepare.listing import ITEMS, Item, SourceError
from tests.prepare import trees


def test_digest_follows_names_sizes_and_labels_only(tmp_path: Path) -> None:
    files = trees.folder_files(4)
    first = sources.scan(trees.write_folder(tmp_path / "a", files))
    moved = sources.scan(trees.write_folder(tmp_path / "b", files))
    longer = sources.scan(trees.write_folder(tmp_path / "c", files | {"cat/0000.png": files["cat/0000.png"] + b"x"}))
    renamed = sources.scan(trees.write_folder(tmp_path / "d", {n.replace("dog", "fox"): d for n, d in files.items()}))
    assert first.digest == moved.digest
    assert len({first.digest, longer.digest, renamed.digest}) == 3


_NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)


@given(st.lists(st.tuples(st.sampled_from(["train", "test"]), _NAMES, st.sampled_from(["a", "b"])), min_size=1))
def test_items_are_in_the_order_of_split_and_name(rows: list[tuple[str, str, str]]) -> None:
    items = [Item(split, name, label, name, 0, 1) for split, name, label in rows]
    source = listing.finish("folder", "here", items, (), ignored=0)
    assert source.items.schema == ITEMS
    pairs = list(zip(source.items["split"].to_pylist(), source.items["name"].to_pylist(), strict=True))
    assert pairs == sorted((split, name) for split, name, _ in rows)
    assert source.counts() == {
        split: sum(row[0] == split for row in rows) for split in sorted({row[0] for row in rows})
    }
    again = listing.finish("folder", "there", sorted(items, key=lambda item: item.name), (), ignored=3)
    assert sorted(rows) != sorted(set(rows)) or again.digest == source.digest


def test_what_travels_to_a_task_is_the_source_without_its_items(tmp_path: Path) -> None:
    source = sources.scan(trees.write_hub(tmp_path, {"train": 6}))
    bare = source.without_items()
    assert len(bare.items) == 0
    assert sources.read_item(bare, source.items.to_pylist()[5]) == trees.image_bytes(5)


def test_a_mixture_names_one_of_each() -> None:
    listing.refuse_mixture("u", ["a", "b"], [True, True], "there")
    listing.refuse_mixture("u", ["a", "b"], [False, False], "there")
    with pytest.raises(SourceError, match="source u is mixed: b lies there and a does not"):
        listing.refuse_mixture("u", ["a", "b"], [False, True], "there")
