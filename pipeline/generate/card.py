"""What a person or a catalogue wants to know of a generated dataset: README.md, samples.png, croissant.json.

Each follows from what is stored, so that every driver of a plan writes the same bytes.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline import images, storage
from pipeline.dataset import croissant, record, sheet
from pipeline.dataset.record import DatasetRecord
from pipeline.generate.plan import GenerateConfig, GeneratePlan
from pipeline.generate.shard_writer import SPLIT

_COLUMNS, _ROWS, _ROWS_UNLABELLED = 10, 20, 1


def write(out_url: str, plan: GeneratePlan, dataset: DatasetRecord) -> None:
    """Put the three files at a dataset whose parts are all there; what is there stays, an earlier version's too."""
    grid = sheet.class_rows(out_url, dataset, SPLIT, _COLUMNS, _ROWS if dataset.classes else _ROWS_UNLABELLED)
    name = f"synthetic-{plan.snapshot_digest[:12]}"
    description = f"{dataset.num_samples(SPLIT):,} images of {plan.resolution}² pixels, made by a GAN."
    files = {
        "samples.png": images.encode(grid, "png", 100),
        "croissant.json": croissant.describe(dataset, name, description),
        "README.md": readme(plan, dataset, name).encode(),
    }
    assert set(files) == set(record.DESCRIPTIONS)
    for file, data in files.items():
        storage.put_if_absent(storage.join(out_url, file), data)


def readme(plan: GeneratePlan, dataset: DatasetRecord, name: str) -> str:
    """The dataset card, in Markdown."""
    return "\n".join(_lines(plan, dataset, name)) + "\n"


def _lines(plan: GeneratePlan, dataset: DatasetRecord, name: str) -> Iterator[str]:
    config = plan.config
    colour = "grey" if plan.channels == 1 else "RGB"
    yield from (f"# {name}", "", "![samples, a row a class](samples.png)", "")
    yield f"{config.num_images:,} synthetic images: {plan.resolution}² {colour}, {config.image_format}, in"
    yield f"{plan.num_shards:,} WebDataset shards of {config.shard_size:,}."
    yield from ("", "| | |", "|---|---|")
    yield from (f"| {name} | {value} |" for name, value in _settings(plan, dataset.lineage).items())
    if plan.classes:
        yield from ("", "| label | class | images |", "|---|---|---|")
        counted = zip(plan.classes, plan.class_counts, strict=True)
        yield from (f"| {label} | {one} | {count:,} |" for label, (one, count) in enumerate(counted))
    yield from ("", "To read it:", "", "```python", "import webdataset")
    yield f'shards = "{SPLIT}/shard-{{000000..{plan.num_shards - 1:06d}}}.tar"'
    yield 'for sample in webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"):'
    yield from ('    print(sample["__key__"])', "```", "")
    yield "`dataset.json` names the parts of the index and their digests; `croissant.json` describes it to other tools;"
    yield "`ganymede verify` reads it all again. Image i depends on the snapshot, the seed and i alone."


def _settings(plan: GeneratePlan, lineage: Mapping[str, Any]) -> Mapping[str, str]:
    config = plan.config
    training = lineage.get("training", {})
    shown = {
        "snapshot": plan.snapshot_digest,
        "seed": str(config.seed),
        "classes": _how_chosen(config) if plan.classes else "none",
        "truncation": f"{config.truncation:g}",
        "tried again": f"the {config.reject_share:.0%} that D likes least" if config.reject_share else "none",
        "trained on dataset": training.get("dataset_digest", "unknown"),
        "training run": training.get("training_run", "unknown"),
        "images seen in training": f"{lineage['cur_nimg']:,}" if "cur_nimg" in lineage else "unknown",
        "made by": f"ganymede {lineage.get('code_version', '')}".rstrip(),
        "settings": f"`{json.dumps(plan.to_dict()['config'], sort_keys=True)}`",
    }
    return shown


def _how_chosen(config: GenerateConfig) -> str:
    """How images were given their classes, in words; the table of classes has the numbers."""
    if config.labels == "as-dataset":
        return "in the proportions of the dataset trained on"
    return f"{', '.join(map(str, config.class_counts))} of each" if config.class_counts else "in turn"
