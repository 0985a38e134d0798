import http.server
import struct
import threading
import tracemalloc
from functools import partial

import av
import cv2
import numpy as np
import pytest

from detguard import DetguardError
from detguard.data import inputs
from detguard.data.inputs import as_photos, camera_frames, find_inputs, is_camera, read_frames
from detguard.photos import read_photo


def write(file, frames, size=(64, 64), right=0):
    """A video of grey frames, each lighter than the one before; size: width, height; right: by how much its half is."""
    with av.open(str(file), "w") as made:
        stream = made.add_stream("mpeg4", rate=10)
        stream.width, stream.height = size
        for number in range(frames):
            picture = np.full((size[1], size[0], 3), 40 * number + 20, np.uint8)
            picture[:, size[0] // 2 :] += right
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                made.mux(packet)
        for packet in stream.encode():
            made.mux(packet)


def test_of_a_video_that_is_left_out_no_frame_stays(tmp_path, monkeypatch):
    write(tmp_path / "a.mp4", 2)
    write(tmp_path / "b.mp4", 1)
    frames = read_frames

    def breaks_off(file, *options):
        yield from frames(file, *options)
        if file.stem == "a":
            raise DetguardError(f"{file}: breaks off")

    monkeypatch.setattr(inputs, "read_frames", breaks_off)
    sources, why = [str(tmp_path / name) for name in ("a.mp4", "b.mp4")], list[str]()
    made = list(as_photos(sources, tmp_path / "frames", on_error=why.append))
    assert made == [tmp_path / "frames/b-000001.png"] == list((tmp_path / "frames").iterdir())
    assert why == [f"{tmp_path / 'a.mp4'}: breaks off"]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".MOV"])
def test_frames_of_a_video_become_photos_among_the_others(tmp_path, suffix):
    file = tmp_path / f"drive{suffix}"
    write(file, 5)
    found = list(as_photos([str(tmp_path / "a.jpg"), str(file)], tmp_path / "frames", every=2))
    assert [one.name for one in found] == ["a.jpg", "drive-000001.png", "drive-000003.png", "drive-000005.png"]
    assert [round(read_photo(one).mean() / 40, 1) for one in found[1:]] == pytest.approx([0.5, 2.5, 4.5], abs=0.1)


def test_frames_of_a_phone_held_upright_are_turned(tmp_path):
    file = tmp_path / "phone.mp4"
    write(file, 1, (128, 64), right=100)
    data = bytearray(file.read_bytes())
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30)
    file.write_bytes(data)
    ((_, frame),) = read_frames(file)
    shown, as_opencv = cv2.VideoCapture(str(file)).read()
    assert shown
    assert np.array_equal(frame, as_opencv[..., ::-1])
    assert frame.shape == (128, 64, 3)
    assert frame[:32].mean() + 50 < frame[-32:].mean()


def test_a_playlist_called_a_video_reads_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "secret.mp4", 2)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    with pytest.raises(DetguardError, match="no video that can be read"):
        list(read_frames(tmp_path / "list.mp4"))


def test_too_many_and_too_large_frames_are_refused(tmp_path, monkeypatch):
    write(tmp_path / "a.mp4", 5)
    monkeypatch.setattr(inputs, "MOST_FRAMES", 3)
    assert len(list(read_frames(tmp_path / "a.mp4", every=2))) == 3
    with pytest.raises(DetguardError, match="over 3 frames; take fewer by `every`"):
        next(read_frames(tmp_path / "a.mp4"))  # not after hours
    monkeypatch.setattr(inputs, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(DetguardError, match="frames of 64 x 64 px"):
        list(read_frames(tmp_path / "a.mp4", every=2))


def test_a_camera_shows_frames_as_opencv_opens_it(tmp_path):
    write(tmp_path / "a.mp4", 5)
    frames = list(camera_frames(cv2.VideoCapture(str(tmp_path / "a.mp4")), every=2))
    assert [number for number, _ in frames] == [1, 3, 5]
    assert [round(frame.mean() / 40, 1) for _, frame in frames] == pytest.approx([0.5, 2.5, 4.5], abs=0.1)
    with pytest.raises(DetguardError, match="gives no frames"):
        list(camera_frames(cv2.VideoCapture(str(tmp_path / "none.mp4"))))


def test_of_a_camera_that_is_not_there_opencv_logs_nothing(tmp_path, capfd):
    before = cv2.utils.logging.getLogLevel()
    with pytest.raises(DetguardError, match="gives no frames"):
        list(as_photos(["99"], tmp_path))
    assert capfd.readouterr().err == ""
    assert cv2.utils.logging.getLogLevel() == before


def test_a_number_is_a_camera_unless_a_file_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_camera("0")
    assert find_inputs(["1"]) == ["1"]
    (tmp_path / "0").write_bytes(b"")
    assert not is_camera("0")
    assert not is_camera("0.jpg")


@pytest.fixture
def site(tmp_path):
    """The address of a folder that is served, and the folder."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    folder = tmp_path / "site"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


def test_addresses_are_downloaded_under_names_of_their_own(tmp_path, site, bus_file):
    address, folder = site
    (folder / "bus.jpg").write_bytes(bus_file.read_bytes())
    write(folder / "drive.mp4", 3)
    sources = find_inputs([str(bus_file), f"{address}/bus.jpg", f"{address}/bus.jpg?again", f"{address}/drive.mp4"])
    found = list(as_photos(sources, tmp_path / "run", every=2))
    names = ["bus.jpg", "bus-1.jpg", "drive-000001.png", "drive-000003.png"]
    assert found == [bus_file, *(tmp_path / "run" / name for name in names)]
    assert np.array_equal(read_photo(found[1]), read_photo(bus_file))


@pytest.mark.parametrize("path", ["none.jpg", "../../etc/passwd"])
def test_what_the_web_does_not_give_is_told_of(tmp_path, site, path):
    with pytest.raises(DetguardError, match=r"cannot be downloaded \(HTTP Error 404"):
        list(as_photos([f"{site[0]}/{path}"], tmp_path / "run"))


def test_a_download_is_bounded_and_stays_in_its_folder(tmp_path, site, monkeypatch):
    address, folder = site
    (folder / "..%2Fx.jpg").write_bytes(b"1234")
    (folder / "a.jpg").write_bytes(b"1234")
    (made,) = as_photos([f"{address}/a.jpg/../..%252Fx.jpg"], tmp_path / "run")
    assert made.resolve().parent == tmp_path / "run"
    with (folder / "large.bin").open("wb") as large:
        large.truncate(32 << 20)
    tracemalloc.start()
    list(as_photos([f"{address}/large.bin"], tmp_path / "large"))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20  # never all of it
    tracemalloc.stop()
    assert (tmp_path / "large/large.bin").stat().st_size == 32 << 20
    monkeypatch.setattr(inputs, "MOST_BYTES", (32 << 20) - 1)
    with pytest.raises(DetguardError, match="over 0 GiB"):
        list(as_photos([f"{address}/large.bin"], tmp_path / "run"))
    assert list((tmp_path / "run").iterdir()) == [made]


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_damaged_parts_of_a_video_are_left_out_and_told_of(tmp_path, suffix):
    file, told = tmp_path / f"drive{suffix}", []
    write(file, 6)
    with av.open(str(file)) as video:
        places = [(packet.pos, packet.size) for packet in video.demux(video.streams.video[0]) if packet.size]
    data = bytearray(file.read_bytes())
    at, size = places[2]
    data[at : at + size] = bytes([0xFF]) * size
    file.write_bytes(data)
    assert 3 <= len(list(read_frames(file, on_warning=told.append))) < 6
    assert [one.startswith(f"{file}: ") and "left out" in one for one in told] == [True]


def test_a_download_that_is_cut_short_is_no_photo(tmp_path):
    class Short(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Short)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(DetguardError, match="cut short, 10 of 1000 bytes"):
        list(as_photos([f"http://127.0.0.1:{server.server_port}/a.jpg"], tmp_path))
    server.shutdown()
