from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detguard.data.batches import PhotoSet, batches, draw_frame, labels_of, read_photos
from detguard.data.stream import Labelled
from detguard.detections import Detections
from detguard.photos import PADDING_LEVEL, encode_png, read_photo


def labelled(boxes, classes=(), known=None, file="a.png"):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    classes = torch.tensor(classes or [0] * len(boxes))
    return Labelled(Path(file), Detections(boxes, torch.ones(len(boxes)), classes), known)


def marked(x1=20, y1=30, x2=60, y2=45):
    """A dark photo with a bright box, and its label."""
    photo = np.full((80, 100, 3), 10, np.uint8)
    photo[y1:y2, x1:x2] = 250
    return PhotoSet.of([encode_png(photo)], [1.0], [labelled([[x1, y1, x2, y2]])])


def draw_frames(source, count, size):
    return zip(*(draw_frame(source, size, np.random.default_rng(i)) for i in range(count)), strict=True)


def bright(frame):
    rows, columns = np.nonzero(frame.max(2) > 150)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_labels_follow_their_photos_into_frames(seed):
    source = marked()
    frame, drawn = draw_frame(source, 96, np.random.default_rng(seed))
    found = labels_of(drawn, source.labels).objects.boxes
    if len(drawn) == 1 and len(found) and (found[0, 2:] - found[0, :2]).min() > 3:
        assert np.abs(found[0].numpy() - bright(frame)).max() <= 2.5
    for box in found:
        assert box.min() >= 0
        assert box.max() <= 96


def test_every_tile_of_a_mosaic_is_labelled():
    source = marked(5, 5, 95, 75)
    frames, drawn = draw_frames(source, 40, 96)
    mosaics = [(frame, d) for frame, d in zip(frames, drawn, strict=True) if len(d) == 4]
    assert mosaics
    for frame, d in mosaics:
        for box in labels_of(d, source.labels).objects.boxes.round().int().tolist():
            x, y = (box[0] + box[2]) // 2, (box[1] + box[3]) // 2
            assert frame[y, x].max() > 150


def test_objects_of_which_little_is_left_are_not_labelled():
    source = marked()
    (one,) = next(d for d in list(draw_frames(source, 40, 96))[1] if len(d) == 1)
    for inside, expected in ((0.5, 1), (0.1, 0)):
        matrix = np.array([[1.0, 0, -20 - 40 * (1 - inside)], [0, 1, 0]])
        moved = type(one)(0, matrix, (0, 0, 96, 96))
        assert len(labels_of([moved], source.labels).objects) == expected


def test_plain_photos_are_shown_as_a_detector_sees_them(bus_file, bundled):
    source, _ = read_photos([([Labelled(bus_file, labelled([[100, 200, 300, 400]]).objects)], 1.0)], 320, plain=True)
    frames, drawn = draw_frames(source, 8, 320)
    letterbox = bundled.letterbox((1080, 810))
    plain = letterbox(read_photo(bus_file))
    wanted = letterbox.boxes_to_frame(torch.tensor([100.0, 200, 300, 400]))
    margin = (320 - plain.shape[1]) // 2
    seen = set()
    for frame, d in zip(frames, drawn, strict=True):
        inner, (box,) = frame[:, margin : 320 - margin], labels_of(d, source.labels).objects.boxes
        box = box - torch.tensor([margin, 0, margin, 0])
        mirrored = not np.array_equal(inner, plain)
        assert np.array_equal(inner[:, ::-1] if mirrored else inner, plain)
        box = torch.stack([plain.shape[1] - box[2], box[1], plain.shape[1] - box[0], box[3]]) if mirrored else box
        assert torch.allclose(box, wanted, atol=0.6)
        seen.add(mirrored)
    assert seen == {True, False}


def test_only_classes_that_all_photos_of_a_frame_are_labelled_for_are_known():
    source = marked()
    one = draw_frame(source, 96, np.random.default_rng(1))[1][0]
    other = type(one)(1, one.matrix, one.part)
    labels = [labelled([[1, 1, 9, 9]], known=(0, 2, 5)), labelled([[1, 1, 9, 9]], known=(2, 5, 7))]
    assert labels_of([one, other], labels).known == (2, 5)
    assert labels_of([one], labels).known == (0, 2, 5)
    assert labels_of([one], [labelled([])]).known is None


def test_objects_of_classes_that_a_frame_is_not_labelled_for_are_left_out():
    source = marked()
    one = draw_frame(source, 96, np.random.default_rng(1))[1][0]
    whole = type(one)(0, np.eye(2, 3), (0, 0, 96, 96))
    both = labelled([[1, 1, 9, 9], [20, 20, 40, 40]], classes=[0, 7], known=(7,))
    assert labels_of([whole], [both]).objects.classes.tolist() == [7]


def test_batches_carry_labels_where_photos_have_some():
    with_labels = next(batches(marked(), 3, 96, 0, 0, 1))
    assert len(with_labels.labels) == 3
    bare = replace(marked(), labels=())
    assert not next(batches(bare, 3, 96, 0, 0, 1)).labels


def test_hard_frames_show_the_kinds_asked_for():
    source = PhotoSet.of([encode_png(np.full((96, 96, 3), 100, np.uint8))], [1.0])
    shown = next(batches(source, 4, 96, 0, 0, 1, hard=4, kinds=("brightness",)))
    photo = ((shown.clean * 255).round() != PADDING_LEVEL).any(1, keepdim=True).expand_as(shown.clean)
    for change, where in zip(shown.shown - shown.clean, photo, strict=True):
        assert change[where].mean() > 0.05
        assert change[where].std() == pytest.approx(0, abs=0.12)


def test_padding_is_not_corrupted_for_corrupted_photos_are_padded_behind():
    source = PhotoSet.of([encode_png(np.full((24, 96, 3), 100, np.uint8))], [1.0])
    shown = next(batches(source, 4, 96, 0, 0, 1, hard=4, kinds=("gaussian_noise",)))
    padding = ((shown.clean * 255).round() == PADDING_LEVEL).all(1, keepdim=True)
    changed = (shown.shown != shown.clean).any(1, keepdim=True)
    assert 0.2 < padding.float().mean() < 0.9
    assert not changed[padding].any()
    assert changed[~padding].float().mean() > 0.9


@pytest.mark.parametrize("plain", [False, True])
def test_a_photo_that_is_all_but_a_line_keeps_a_pixel_of_its_width(tmp_path, plain):
    cv2.imwrite(str(tmp_path / "line.png"), np.full((5000, 8, 3), 200, np.uint8))
    source, broken = read_photos([([tmp_path / "line.png"], 1.0)], 64, plain=plain)
    assert not broken
    frames, _ = draw_frames(source, 8, 64)
    assert np.max(frames) > PADDING_LEVEL


def test_a_photo_too_wide_to_be_kept_is_named_and_the_rest_is_used(bus_file, tmp_path):
    (tmp_path / "strip.png").write_bytes(encode_png(np.zeros((8, 1_000_000, 3), np.uint8)))
    found, messages = read_photos([([tmp_path / "strip.png", bus_file], 1.0)], 64)
    assert len(found) == 1
    assert [message.startswith(str(tmp_path / "strip.png")) for message in messages] == [True]


def test_processes_that_are_no_forks_share_the_photos():
    source = PhotoSet.of([bytes(1_000_000)], [1.0])
    assert len(ForkingPickler.dumps(source)) < 10_000
