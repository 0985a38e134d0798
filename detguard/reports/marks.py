"""What was found on a labelled photo, as right, wrong and missed."""

import torch

from detguard.detections import Detections, Found
from detguard.evaluation.coco import matched


def of_labels(objects: Detections, names: dict[int, str]) -> list[Found]:
    """Records of labelled objects, which have no confidence to be shown."""
    return [record | {"kind": "labelled"} for record in objects.records(names)]


def marked(objects: Detections, found: Detections, names: dict[int, str]) -> list[Found]:
    """Records of what was found, each right (found) or wrong (false), and of the objects that were missed."""
    of = matched(objects, found)
    missed = torch.ones(len(objects), dtype=torch.bool)
    missed[of[of >= 0]] = False
    kinds = ["found" if one >= 0 else "false" for one in of.tolist()]
    records = [record | {"kind": kind} for record, kind in zip(found.records(names), kinds, strict=True)]
    return records + [record | {"kind": "missed"} for record in objects[missed].records(names)]
