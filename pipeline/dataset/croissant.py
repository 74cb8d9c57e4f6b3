"""A dataset as Croissant 1.0 JSON-LD, the format in which catalogues and loaders describe datasets to each other.

https://docs.mlcommons.org/croissant/docs/croissant-spec.html. A record is a row of the index; the images lie in the
shards that it names. Only what the dataset itself says is in it: no time, no place.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.dataset.record import DatasetRecord, encode_json

_CONTEXT: Mapping[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "dct": "http://purl.org/dc/terms/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{
        name: f"cr:{name}"
        for name in (
            *("citeAs", "column", "equivalentProperty", "extract", "field", "fileObject", "fileProperty", "fileSet"),
            *("format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet"),
            *("references", "regex", "repeated", "replace", "samplingRate", "separator", "source", "subField"),
            "transform",
        )
    },
    "rai": "http://mlcommons.org/croissant/RAI/",
}
_TYPES: Mapping[str, str] = {
    "key": "sc:Text",
    "label": "sc:Integer",
    "shard": "sc:Text",
    "offset": "sc:Integer",
    "size": "sc:Integer",
}
_MEANINGS: Mapping[str, str] = {
    "key": "Name of the sample in its shard.",
    "label": "Number of its class.",
    "shard": "The tar that holds it, below the folder of the split.",
    "offset": "Where the image file begins in the shard, in bytes.",
    "size": "Size of the image file in bytes.",
}


def describe(dataset: DatasetRecord, name: str, description: str) -> bytes:
    """The bytes of croissant.json: the files of each split, the columns of its index, the names of the classes."""
    splits = sorted(dataset.splits)
    body: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": name,
        "description": description,
        "version": "1.0.0",
        "distribution": [one for split in splits for one in _files(split)],
        "recordSet": [*_classes(dataset.classes), *(_samples(split, dataset) for split in splits)],
    }
    return encode_json(body)


def _files(split: str) -> list[dict[str, str]]:
    kinds = (
        ("index", "application/x-parquet", f"{split}/index/*.parquet", "A row a sample: where it lies in which shard."),
        (
            "shards",
            "application/x-tar",
            f"{split}/*.tar",
            "WebDataset: of each sample an image and its class.",
        ),
    )
    return [
        {
            "@type": "cr:FileSet",
            "@id": f"{split}/{name}",
            "name": f"{split}/{name}",
            "description": description,
            "encodingFormat": encoding,
            "includes": includes,
        }
        for name, encoding, includes, description in kinds
    ]


def _classes(classes: Sequence[str]) -> list[dict[str, Any]]:
    """An enumeration of the classes, or nothing."""
    if not classes:
        return []
    fields = [("label", "sc:Integer", "Number of a class."), ("name", "sc:Text", "Its name.")]
    return [
        {
            "@type": "cr:RecordSet",
            "@id": "classes",
            "name": "classes",
            "description": "The classes by number.",
            "dataType": "sc:Enumeration",
            "key": {"@id": "classes/label"},
            "field": [_field("classes", *field) for field in fields],
            "data": [{"classes/label": label, "classes/name": name} for label, name in enumerate(classes)],
        }
    ]


def _samples(split: str, dataset: DatasetRecord) -> dict[str, Any]:
    fields = []
    for column, kind in _TYPES.items():
        if column == "label" and not dataset.classes:
            continue
        field = _field(split, column, kind, _MEANINGS[column])
        field["source"] = {"fileSet": {"@id": f"{split}/index"}, "extract": {"column": column}}
        if column == "label":
            field["references"] = {"field": {"@id": "classes/label"}}
        fields.append(field)
    return {
        "@type": "cr:RecordSet",
        "@id": split,
        "name": split,
        "description": f"{dataset.num_samples(split)} samples.",
        "key": {"@id": f"{split}/key"},
        "field": fields,
    }


def _field(record_set: str, name: str, kind: str, description: str) -> dict[str, Any]:
    place = f"{record_set}/{name}"
    return {"@type": "cr:Field", "@id": place, "name": place, "dataType": kind, "description": description}
