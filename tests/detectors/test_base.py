import copy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detguard import DetguardError


def test_a_name_that_two_classes_have_names_none(bundled):
    detector = copy.copy(bundled)
    detector.class_names = {0: "dog", 1: "cat", 2: "Dog "}
    assert detector.class_index(" CAT") == 1
    with pytest.raises(DetguardError, match="2 classes of that name"):
        detector.class_index("dog")


def test_a_name_that_is_not_known_is_answered_by_what_it_means_or_by_all(bundled):
    detector = copy.copy(bundled)
    detector.class_names = {0: "person", 1: "train", 2: "motorcycle"}
    for name, hint in (("pedestrian", "mean 'person'"), ("Motorbike", "mean 'motorcycle'"), ("trian", "mean 'train'")):
        with pytest.raises(DetguardError, match=hint):
            detector.class_index(name)
    with pytest.raises(DetguardError, match="it knows: person, train, motorcycle"):
        detector.class_index("zebra")


def test_what_counts_as_found_is_the_detectors_own_where_nothing_is_said(bundled, bus):
    detector = copy.copy(bundled)
    detector.conf = 0.4
    (found,), (asked,) = detector.detect([bus]), bundled.detect([bus], 0.4)
    assert 0 < len(found) < len(bundled.detect([bus], 0.25)[0])
    assert found.scores.tolist() == asked.scores.tolist()


@pytest.mark.parametrize("kind", [str, Path, np.asarray, Image.open], ids=["str", "Path", "array", "image"])
def test_a_single_photo_is_not_taken_for_many(bundled, bus_file, bus, kind):
    with pytest.raises(DetguardError, match=r"^photos.*: a single one; give a list of photos$"):
        bundled.detect(kind(bus if kind is np.asarray else bus_file))
