import pytest

from detguard import DetguardError
from detguard.hardening.trackers import check_tracker


@pytest.mark.parametrize(("name", "message"), [("paper", "expected one of"), ("aim", "not installed; pip install aim")])
def test_trackers_that_are_not_there_are_refused(name, message):
    with pytest.raises(DetguardError, match=f"^`log` {name}: {message}"):
        check_tracker(name)
