import av
import numpy as np
import pytest

from detguard import DetguardError
from detguard.data import video
from detguard.data.video import read_frames, with_frames
from detguard.photos import read_photo


def write(file, frames, size=64):
    """A video of grey frames, each lighter than the one before."""
    with av.open(str(file), "w") as made:
        stream = made.add_stream("mpeg4", rate=10)
        stream.width = stream.height = size
        for number in range(frames):
            picture = np.full((size, size, 3), 40 * number + 20, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                made.mux(packet)
        for packet in stream.encode():
            made.mux(packet)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".MOV"])
def test_frames_of_a_video_become_photos_among_the_others(tmp_path, suffix):
    file = tmp_path / f"drive{suffix}"
    write(file, 5)
    found = with_frames([tmp_path / "a.jpg", file], tmp_path / "frames", every=2)
    assert [one.name for one in found] == ["a.jpg", "drive-000001.png", "drive-000003.png", "drive-000005.png"]
    assert [round(read_photo(one).mean() / 40, 1) for one in found[1:]] == pytest.approx([0.5, 2.5, 4.5], abs=0.1)


def test_a_playlist_called_a_video_reads_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "secret.mp4", 2)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    with pytest.raises(DetguardError, match="no video that can be read"):
        list(read_frames(tmp_path / "list.mp4"))


def test_too_many_and_too_large_frames_are_refused(tmp_path, monkeypatch):
    write(tmp_path / "a.mp4", 5)
    monkeypatch.setattr(video, "MOST_FRAMES", 3)
    assert len(list(read_frames(tmp_path / "a.mp4", every=2))) == 3
    with pytest.raises(DetguardError, match="over 3 frames; take fewer by `every`"):
        list(read_frames(tmp_path / "a.mp4"))
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(DetguardError, match="frames of 64 x 64 px"):
        list(read_frames(tmp_path / "a.mp4"))
