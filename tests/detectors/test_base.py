import copy

import pytest

from detguard import DetguardError


def test_a_name_that_two_classes_have_names_none(bundled):
    detector = copy.copy(bundled)
    detector.class_names = {0: "dog", 1: "cat", 2: "Dog "}
    assert detector.class_index(" CAT") == 1
    with pytest.raises(DetguardError, match="2 classes of that name"):
        detector.class_index("dog")
