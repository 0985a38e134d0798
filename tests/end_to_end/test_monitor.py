"""`detguard monitor` as a user runs it: a stream that turns dark, as JSON lines and as a COCO json."""

import json
import re
import signal

import av
import cv2
import numpy as np
import pytest
from program import Started, detguard, refusal

OPTIONS = ("--imgsz", 160, "--window", 8)


@pytest.fixture(scope="module")
def stream(tmp_path_factory, bundled, bus_file):
    """Folder and JSON lines of 24 photos of one bus, then 24 that are all but black, with the same labels."""
    folder = tmp_path_factory.mktemp("stream")
    photo = cv2.resize(cv2.imread(str(bus_file)), None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    found = bundled.detect([photo[..., ::-1].copy()], 0.4)[0].records(bundled.class_names)
    lines = []
    for number in range(48):
        shown = photo if number < 24 else (photo * 0.02).astype(np.uint8)
        cv2.imwrite(str(folder / f"{number:02d}.png"), shown)
        lines.append({"photo": f"{number:02d}.png", "objects": found, "time": f"2026-03-01 07:{number:02d}"})
    (folder / "stream.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_drop_is_told_with_its_photos(stream):
    result = detguard(
        "monitor", "--stream", "-", *OPTIONS, "--out", "run", cwd=stream, stdin=(stream / "stream.jsonl").read_text()
    )
    assert result.returncode == 1, result.stderr
    assert "accuracy has dropped since photo 25 (2026-03-01 07:24)" in result.stdout
    dropped = [json.loads(line) for line in (stream / "run/dropped.jsonl").read_text().splitlines()]
    given = [json.loads(line) for line in (stream / "stream.jsonl").read_text().splitlines()]
    assert [entry["photo"] for entry in dropped] == [entry["photo"] for entry in given[24 : 24 + len(dropped)]]
    assert len(dropped) <= 16
    assert [o["box"] for o in dropped[0]["objects"]] == [o["box"] for o in given[24]["objects"]]
    records = [json.loads(line) for line in (stream / "run/results.jsonl").read_text().splitlines()]
    assert [r["number"] for r in records] == list(range(1, 49))
    assert records[7]["AP50"] > 0.5 > records[-1]["AP50"]
    page = (stream / "run/report.html").read_text()
    assert "Accuracy over the stream" in page
    assert "since about photo 25 (2026-03-01 07:24), detected at photo" in page
    assert ">24.png</td>" in page
    assert page.count('class="card item"') == min(12, len(dropped))
    assert "1 to 8" in page


def test_a_stream_that_stays_alike_is_no_drop(stream):
    lines = (stream / "stream.jsonl").read_text().splitlines(keepends=True)[:9]
    result = detguard("monitor", "--stream", "-", *OPTIONS, "--out", "alike", cwd=stream, stdin="".join(lines))
    assert result.returncode == 0, result.stderr
    assert "no drop; 9 of 9 photos" in result.stdout


def test_a_stopped_run_goes_on_to_the_same_records(tiny_data, tmp_path):
    command = ("monitor", "--stream", tiny_data, "--imgsz", 160, "--iou", 0.6, "--out", "run")
    whole = detguard(*command, cwd=tmp_path)
    assert whole.returncode == 3, whole.stderr  # too few to judge
    assert "  iou: 0.6\n" in (tmp_path / "run/config.yaml").read_text()
    file = tmp_path / "run/results.jsonl"
    records = file.read_text()
    assert len(records.splitlines()) == 4
    file.write_text("".join(records.splitlines(keepends=True)[:2]) + '{"number": 3, "cut short by the k')
    resumed = detguard("monitor", "--resume", "run", "--json", cwd=tmp_path)
    assert resumed.returncode == 3, resumed.stderr
    assert file.read_text() == records
    assert [json.loads(line)["number"] for line in resumed.stdout.splitlines()] == [1, 2, 3, 4]


def test_a_live_stream_goes_on_behind_a_line_that_a_kill_cut_short(stream):
    lines = (stream / "stream.jsonl").read_text().splitlines(keepends=True)
    live = ("monitor", "--stream", "-", *OPTIONS, "--out", "torn")
    assert detguard(*live, cwd=stream, stdin="".join(lines[:2])).returncode == 3
    results = stream / "torn/results.jsonl"
    results.write_text(results.read_text()[:-9])
    resumed = detguard("monitor", "--resume", "torn", cwd=stream, stdin="".join(lines[1:3]))
    assert resumed.returncode == 3, resumed.stderr
    assert [json.loads(line)["number"] for line in results.read_text().splitlines()] == [1, 2, 3]


def test_a_drop_has_its_photos_and_its_page_before_the_stream_ends_and_a_service_may_be_stopped(stream):
    process = Started("monitor", "--stream", "-", *OPTIONS, "--out", "cut", cwd=stream, stdin="-")
    process.write((stream / "stream.jsonl").read_text() + "no photo\n")
    process.wait_for(lambda: "line 49" in process.told)
    assert (stream / "cut/dropped.jsonl").read_text().count("photo") >= 3
    page = stream / "cut/report.html"
    assert "49 photos, 1 alarm;" not in page.read_text()
    process.stop(signal.SIGTERM)
    stopped = process.ended()
    assert stopped.returncode == 130
    assert "stopped; go on with: ... | detguard monitor --resume cut" in stopped.stderr
    assert "49 photos, 1 alarm;" in page.read_text()


def test_where_no_drop_could_show_it_is_not_said_that_there_was_none(stream):
    """Half of the photos are all but black from the beginning."""
    lines = (stream / "stream.jsonl").read_text().splitlines(keepends=True)
    mixed = "".join(line for pair in zip(lines[:12], lines[24:36], strict=True) for line in pair)
    result = detguard("monitor", "--stream", "-", *OPTIONS, "--out", "mixed", cwd=stream, stdin=mixed)
    assert result.returncode == 3, result.stdout
    assert "of 24 photos with known objects is too low for a drop to show for certain" in result.stdout


def test_labels_of_another_resolution_are_told_once(stream):
    lines = [json.loads(line) for line in (stream / "stream.jsonl").read_text().splitlines()[:4]]
    for line in lines[1:]:
        line["objects"] = [one | {"box": [4 * value for value in one["box"]]} for one in line["objects"]]
    given = "".join(json.dumps(line) + "\n" for line in lines)
    result = detguard("monitor", "--stream", "-", *OPTIONS, "--out", "large", cwd=stream, stdin=given)
    assert result.stderr.count("labelled boxes reach out of it; were they made at another resolution?") == 1
    records = [json.loads(line) for line in (stream / "large/results.jsonl").read_text().splitlines()]
    assert ["outside" in record for record in records] == [False, True, True, True]
    again = detguard("monitor", "--resume", "large", cwd=stream, stdin="")
    assert again.returncode == 3, again.stderr


def test_lines_that_are_no_photos_are_not_counted_as_some(stream):
    line = (stream / "stream.jsonl").read_text().splitlines(keepends=True)[0]
    given = ["no json\n", "[1]\n", line, json.dumps({"id": "x", "photo": "nowhere.png"}) + "\n"]
    result = detguard("monitor", "--stream", "-", *OPTIONS, "--out", "counted", cwd=stream, stdin="".join(given))
    assert result.returncode == 2
    assert "1 of 2 photos have objects" in " ".join(result.stdout.split())
    assert "no labels yet" not in result.stdout
    assert "(no JSON)" in result.stderr
    assert "(no object)" in result.stderr


def test_an_unreadable_photo_is_named_and_the_rest_is_watched(stream):
    lines = (stream / "stream.jsonl").read_text().splitlines(keepends=True)[:3]
    lines[1] = lines[1].replace('"person"', '"pedestrian"')
    lines[2] = lines[2].replace('"person"', '"persn"')
    (stream / "broken.png").write_bytes(b"no photo")
    lines.insert(1, json.dumps({"photo": "broken.png", "objects": []}) + "\n")
    options = (*OPTIONS, "--map", "pedestrian=person", "--out", "broken")
    result = detguard("monitor", "--stream", "-", *options, cwd=stream, stdin="".join(lines))
    assert result.returncode == 2
    assert "broken.png" in result.stderr
    records = [json.loads(line) for line in (stream / "broken/results.jsonl").read_text().splitlines()]
    assert [record.get("f1") == records[0]["f1"] for record in records] == [True, False, True, False]
    assert re.search(r"boxes of classes that the detector does not know, left out: persn \(\d\); ", result.stderr)
    assert "say so: --map persn=person" in result.stderr
    (stream / "few.jsonl").write_text("".join(lines))  # of which it is known before
    listed = detguard("monitor", "--stream", "few.jsonl", *options[:-1], "listed", cwd=stream)
    assert listed.stderr.count("left out: persn") == 1


def test_odd_lines_are_told_and_the_watch_goes_on(stream):
    first, second = (stream / "stream.jsonl").read_bytes().splitlines(keepends=True)[:2]
    odd = [b'{"photo": "caf\xe9.png", "objects": []}\n', b"{}\n", b'{"photo": "' + b"x" * 5000 + b'", "objects": []}\n']
    lines = b"".join([first, *odd, second])
    result = detguard("monitor", "--stream", "-", *OPTIONS, "--out", "odd", cwd=stream, stdin=lines)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    records = [json.loads(line) for line in (stream / "odd/results.jsonl").read_text().splitlines()]
    assert ["error" in record for record in records] == [False, True, True, True, False]
    assert all(f"line {number}" in result.stderr for number in (2, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--stream"),
        (("--stream", "nowhere.json"), "nowhere.json"),
        (("--resume", "nowhere"), "nowhere"),
    ],
)
def test_wrong_use_is_one_line_that_names_the_option(tmp_path, arguments, message):
    result = refusal("monitor", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_wrong_line_is_one_line_that_names_it(tmp_path):
    result = detguard("monitor", "--stream", "-", *OPTIONS, "--out", "run", cwd=tmp_path, stdin="{}\n")
    assert result.returncode == 2
    assert "line 1" in result.stderr


def test_frames_of_a_video_give_hints_and_are_gone_on_with(stream, tmp_path):
    with av.open(str(tmp_path / "drive.mp4"), "w") as made:
        film = made.add_stream("mpeg4", rate=10)
        film.width, film.height = 202, 270
        for number in (*range(24), *range(40, 48)):
            picture = cv2.imread(str(stream / f"{number:02d}.png"))[:, :, ::-1]
            for packet in film.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")):
                made.mux(packet)
        for packet in film.encode():
            made.mux(packet)
    watched = detguard("monitor", "--stream", "drive.mp4", *OPTIONS, "--every", 2, "--out", "run", cwd=tmp_path)
    assert watched.returncode == 3, watched.stderr
    file = tmp_path / "run/results.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["number"] for r in records] == list(range(1, 17))
    assert not any(r["labelled"] for r in records)
    assert "a hint, without labels: confidence has dropped since photo 13" in watched.stdout
    before = file.read_text()
    file.write_text("".join(before.splitlines(keepends=True)[:11]))
    assert detguard("monitor", "--resume", "run", cwd=tmp_path).returncode == 3
    assert file.read_text() == before
