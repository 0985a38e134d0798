import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate

from detguard.files import MAX_PHOTO
from detguard.photos import (
    HEIC,
    PADDING_LEVEL,
    READERS,
    Letterbox,
    PhotoError,
    as_photo,
    encode_png,
    find_photos,
    largest_difference,
    photo_size,
    read_photo,
    resize_adjoint,
)


def save(tmp_path, name, image, **options):
    file = tmp_path / name
    image.save(file, **options)
    return file


@pytest.fixture
def gradient_image():
    y, x = np.mgrid[0:48, 0:64]
    return Image.fromarray(np.stack([x * 3, y * 4, x + y], -1).astype(np.uint8))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_lossless_files_read_as_their_pixels(tmp_path, gradient_image, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    photo = read_photo(save(tmp_path, f"a.{suffix}", gradient_image, **options))
    assert np.array_equal(photo, np.asarray(gradient_image))


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "1", "CMYK"])
def test_any_mode_reads_as_rgb(tmp_path, gradient_image, mode):
    image = gradient_image.convert(mode)
    photo = read_photo(save(tmp_path, "a.jpg" if mode == "CMYK" else "a.png", image))
    assert photo.shape == (48, 64, 3)
    assert photo.dtype == np.uint8
    if mode in ("L", "P", "RGBA"):
        assert np.array_equal(photo, np.asarray(image.convert("RGB")))
    if mode == "CMYK":
        assert np.abs(photo.astype(int) - np.asarray(gradient_image)).mean() < 8


def test_sixteen_bits_keep_their_high_byte(tmp_path):
    levels = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    photo = read_photo(save(tmp_path, "a.png", Image.fromarray(levels)))
    assert np.abs(photo[..., 0].astype(int) - (levels >> 8)).max() <= 1


def test_exif_orientation_is_applied(tmp_path, gradient_image):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = read_photo(save(tmp_path, "a.jpg", gradient_image, exif=exif, quality=95))
    assert photo.shape == (64, 48, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.avif"])
def test_the_size_in_the_header_is_that_of_the_photo(tmp_path, gradient_image, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = save(tmp_path, name, gradient_image, exif=exif)
    assert photo_size(file) == read_photo(file).shape[1::-1]


def exif_bytes(order, kind, count=1, orientation=6):
    """EXIF of one entry, the orientation, of a type that may not be that of the specification."""
    end = "<" if order == "II" else ">"
    value = struct.pack(end + {1: "Bxxx", 3: "Hxx", 4: "I"}[kind], orientation)
    entry = struct.pack(end + "HHI", 0x0112, kind, count) + value
    return (b"II*\0" if order == "II" else b"MM\0*") + struct.pack(end + "IH", 8, 1) + entry + bytes(4)


@pytest.mark.parametrize("kind", [1, 3, 4])
@pytest.mark.parametrize("order", ["II", "MM"])
@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("place", ["jpg", "webp", "png", "png, behind the pixels"])
def test_where_readers_disagree_on_a_header_the_size_is_that_of_the_photo(
    tmp_path, gradient_image, order, kind, count, place
):
    exif, stream = exif_bytes(order, kind, count), io.BytesIO()
    if place == "png, behind the pixels":  # as ImageMagick writes it
        gradient_image.save(stream, "PNG")
        data, chunk = stream.getvalue(), b"eXIf" + exif
        end = data.rindex(b"IEND") - 4
        chunk = struct.pack(">I", len(exif)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        data = data[:end] + chunk + data[end:]
    else:
        gradient_image.save(stream, {"jpg": "JPEG"}.get(place, place.upper()), exif=b"Exif\0\0" + exif)
        data = stream.getvalue()
    file = tmp_path / f"a.{place[:4].rstrip(',')}"
    file.write_bytes(data)
    assert photo_size(file) == read_photo(file).shape[1::-1]


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_avif_files_are_read_upright(tmp_path, gradient_image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = save(tmp_path, "a.avif", gradient_image, exif=exif, quality=100, subsampling="4:4:4")
    turned = {1: gradient_image, 3: gradient_image.rotate(180), 6: gradient_image.rotate(-90, expand=True)}
    assert np.abs(read_photo(file).astype(int) - np.asarray(turned[orientation])).max() <= 4
    assert find_photos([tmp_path]) == [file]


@pytest.fixture
def heic():
    """Bytes of a HEIC."""
    pytest.importorskip("pillow_heif", reason="needs pillow-heif (pip install detguard[heic])").register_heif_opener()

    def made(image, **options):
        stream = io.BytesIO()
        image.save(stream, "HEIF", **options)
        return stream.getvalue()

    return made


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_heic_files_are_read_upright(tmp_path, heic, gradient_image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "a.HEIC"
    file.write_bytes(heic(gradient_image, exif=exif.tobytes(), quality=100, chroma=444))
    turned = {1: gradient_image, 3: gradient_image.rotate(180), 6: gradient_image.rotate(-90, expand=True)}
    photo = read_photo(file)
    assert np.abs(photo.astype(int) - np.asarray(turned[orientation])).max() <= 6
    assert photo_size(file) == photo.shape[1::-1]
    assert find_photos([tmp_path]) == [file]


@pytest.mark.parametrize(
    "options",
    [
        {"tile_size": 64},
        {"save_all": True, "primary_index": 1, "append_images": [Image.new("RGB", (300, 200), "red")]},
    ],
    ids=["tiles", "primary"],
)
def test_of_a_heic_the_whole_primary_image_is_read(tmp_path, heic, options):
    first = Image.new("RGB", (300, 200), "red" if "tile_size" in options else "blue")
    (tmp_path / "a.heic").write_bytes(heic(first, **options))
    assert np.abs(read_photo(tmp_path / "a.heic").astype(int) - (255, 0, 0)).max() <= 6


def test_a_heic_that_a_decoder_must_not_see_or_fails_at_is_one_line(tmp_path, heic):
    plain = heic(Image.new("RGB", (640, 480), "red"))
    size = struct.pack(">II", 640, 480)
    tiled = heic(Image.new("RGB", (2048, 1536), "red"), tile_size=512)

    def holding(boxes):
        return plain + struct.pack(">I", len(boxes) + 8) + b"free" + boxes

    (tmp_path / "a.heic").write_bytes(holding(b"infe\2\0\0\0\0\7\0\0griddimg\0\7\0\2\0\1\0\1"))
    assert read_photo(tmp_path / "a.heic").shape == (480, 640, 3)
    bad = {
        "damaged": (plain[:-20], plain.replace(size, struct.pack(">II", 64, 64))),
        "megapixels": (plain.replace(size, struct.pack(">II", 30000, 30000)),),
        "too long to decode": (
            tiled.replace(struct.pack(">II", 512, 512), struct.pack(">II", 16000, 16000)),
            holding(b"infe\2\0\0\0\0\1\0\0iovl"),
            holding(b"infe\2\0\0\0\0\7\0\0griddimg\0\7\0\2\0\1\0\7"),
            holding(b"iref\1"),
        ),
    }
    for reason, files in bad.items():
        for data in files:
            (tmp_path / "a.heic").write_bytes(data)
            with pytest.raises(PhotoError, match=rf"a\.heic: .*{reason}") as caught:
                read_photo(tmp_path / "a.heic")
            assert "\n" not in str(caught.value)


def test_where_pillow_heif_is_missing_a_heic_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delitem(READERS, HEIC, raising=False)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf")
    with pytest.raises(PhotoError, match=r"a\.heic: a HEIC needs pillow-heif; pip install 'detguard\[heic\]'"):
        read_photo(tmp_path / "a.heic")


def test_the_size_of_a_file_of_any_length_is_not_read_to_its_end(tmp_path):
    (tmp_path / "a.avif").write_bytes(coded("AVIF"))
    os.truncate(tmp_path / "a.avif", MAX_PHOTO + 1)
    for read in (read_photo, photo_size):
        with pytest.raises(PhotoError, match="over the limit of 512 MiB"):
            read(tmp_path / "a.avif")


def bad_files(tmp_path):
    jpeg = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    Image.fromarray(noise).save(jpeg, "JPEG")
    bomb = bytearray(encode_png(np.zeros((16, 16, 3), np.uint8)))
    bomb[16:24] = (20000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    frames = [Image.new("L", (20, 20), level) for level in (0, 100, 200)]
    animated = io.BytesIO()
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    moving = io.BytesIO()
    frames[0].save(moving, "AVIF", save_all=True, append_images=frames[1:])
    one = io.BytesIO()
    Image.new("RGB", (1, 1)).save(one, "PNG")
    return {
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"not an image at all", "not an image"),
        "truncated.jpg": (jpeg.getvalue()[:3000], "damaged or cut short"),
        "bomb.png": (bytes(bomb), "megapixels"),
        "animated.gif": (animated.getvalue(), "animated"),
        "animated.avif": (moving.getvalue(), "animated"),
        "one.png": (one.getvalue(), "too small"),
    }


@pytest.mark.parametrize(
    "name", ["empty.jpg", "text.jpg", "truncated.jpg", "bomb.png", "animated.gif", "animated.avif", "one.png"]
)
def test_bad_files_are_errors_that_name_them(tmp_path, name):
    data, reason = bad_files(tmp_path)[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PhotoError, match=reason) as caught:
        read_photo(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def coded(kind, **options):
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(stream, kind, **options)
    return stream.getvalue()


def progressive(scans, size=(40, 30)):
    """A JPEG whose last scan comes so many times more."""
    stream = io.BytesIO()
    Image.new("RGB", size, "red").save(stream, "JPEG", progressive=True)
    whole = stream.getvalue()
    last = whole[whole.rfind(b"\xff\xda") : -2]
    return whole[:-2] + last * scans + b"\xff\xd9"


def run_lengths(side):
    """A BMP of 8-bit run lengths, one for each 255 pixels of a row."""
    rows = (b"\xff\x01" * (side // 255) + bytes([side % 255, 1, 0, 0])) * side
    sizes = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(rows), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(rows), 0, 0, 1078) + sizes + bytes(1024) + rows


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (coded("EPS"), "not an image"),
        (coded("PDF"), "not an image"),
        (coded("TGA"), "not an image"),
        (coded("AVIF")[:200], "damaged"),
        (b"II*\0\x08\0\0\0" + bytes(6), "damaged"),  # a TIFF without dimensions
        (b"MM\0*" + b"\xff" * 30, "damaged"),
        (coded("WEBP")[:60], "damaged"),
        (progressive(2000, (2000, 1000)), "too long to decode"),
        (run_lengths(4000), "too long to decode"),
    ],
    ids=["eps", "pdf", "tga", "avif", "tiff", "tiff-2", "webp", "jpeg-scans", "bmp-runs"],
)
def test_what_a_decoder_must_not_see_or_fails_at_is_one_line(tmp_path, data, reason):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(PhotoError, match=rf"a\.png: .*{reason}") as caught:
        read_photo(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [progressive(0), progressive(2000), run_lengths(300)], ids=["10", "2000", "runs"])
def test_a_small_photo_may_be_coded_as_it_likes(tmp_path, data):
    (tmp_path / "a.jpg").write_bytes(data)
    assert read_photo(tmp_path / "a.jpg").ndim == 3


def test_scans_of_a_thumbnail_or_behind_the_end_are_not_counted(tmp_path):
    scans = b"\xff\xda\0\2" * 15_000
    plain = progressive(0, (2000, 1000))
    (tmp_path / "a.jpg").write_bytes(plain[:2] + b"\xff\xe5" + (len(scans) + 2).to_bytes(2, "big") + scans + plain[2:])
    (tmp_path / "b.jpg").write_bytes(plain + bytes(2) + scans)
    assert read_photo(tmp_path / "a.jpg").shape == read_photo(tmp_path / "b.jpg").shape


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800", "pipe", "zero"])
def test_what_is_no_file_is_one_line_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for read in (read_photo, photo_size):
        with pytest.raises(PhotoError, match=r"cannot be read|not a regular file|not UTF-8"):
            read(tmp_path / name)


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(PhotoError, match="No such file"):
        read_photo(tmp_path / "gone.jpg")


def test_find_photos_expands_folders_and_patterns_once(tmp_path):
    for name in ("b.jpg", "a.PNG", "notes.txt"):
        (tmp_path / name).touch()
    found = find_photos([tmp_path, tmp_path / "b.jpg", str(tmp_path / "*.jpg")])
    assert [f.name for f in found] == ["a.PNG", "b.jpg"]


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "*", "a\0*", "a\0", "\ud800*", "[" * 300])
def test_odd_names_and_patterns_do_not_stop_the_others(tmp_path, name):
    (tmp_path / "a.jpg").touch()
    assert [f.name for f in find_photos([tmp_path / name, tmp_path / "a.jpg"])] == [name, "a.jpg"]


def test_a_name_that_is_not_utf8_is_found_and_refused_in_its_turn(tmp_path, gradient_image):
    file = os.fsencode(tmp_path) + b"/caf\xe9.png"
    gradient_image.save(file, "PNG")
    for source in (tmp_path, tmp_path / "caf*"):
        (found,) = find_photos([source])
        with pytest.raises(PhotoError, match="name is not UTF-8; rename it"):
            read_photo(found)


def test_find_photos_looks_into_folders_of_folders_when_it_is_to(tmp_path):
    for name in ("a.jpg", "in/b.png", "in/deep/c.webp", "in/no.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [f.name for f in find_photos([tmp_path])] == ["a.jpg"]
    assert [f.name for f in find_photos([tmp_path], recursive=True)] == ["a.jpg", "b.png", "c.webp"]


def test_folders_are_listed_with_what_is_linked_once_and_without_what_is_hidden(tmp_path):
    folder = tmp_path / "mine"
    for name in ("mine/a.jpg", "mine/._a.jpg", "mine/z/b.jpg", "mine/.ipynb_checkpoints/b.jpg", "other/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name, target in (("linked", "other"), ("again", "mine/z"), ("other/loop", "mine")):
        (folder / name if "/" not in name else tmp_path / name).symlink_to(tmp_path / target)
    assert find_photos([folder]) == [folder / "a.jpg"]
    assert find_photos([folder], recursive=True) == [folder / one for one in ("a.jpg", "linked/c.jpg", "z/b.jpg")]
    hidden = [folder / "._a.jpg", folder / ".ipynb_checkpoints/b.jpg"]
    assert find_photos([hidden[0], hidden[1].parent]) == hidden  # as the user names them


def test_find_photos_says_when_there_is_nothing_at_all(tmp_path):
    with pytest.raises(PhotoError, match="no photos here"):
        find_photos([tmp_path, str(tmp_path / "*.jpg")])


def test_a_path_that_does_not_exist_is_not_called_a_place_without_photos(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(PhotoError, match=r"gone: no such file or folder$"):
        find_photos([tmp_path / "empty", tmp_path / "gone"])


@pytest.mark.parametrize(
    ("options", "end"),
    [({}, "name that$"), ({"recursive": False}, "name that, or give `recursive`$"), ({"recursive": True}, None)],
)
def test_a_folder_whose_photos_lie_in_another_one_says_in_which(tmp_path, options, end):
    for name in (".hidden/a.jpg", "images/train/b.JPG"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    if end is None:
        assert [one.name for one in find_photos([tmp_path], **options)] == ["b.JPG"]
        return
    with pytest.raises(PhotoError, match=rf"no photos here .*; there are some in {tmp_path}/images/train/: {end}"):
        find_photos([tmp_path], **options)


def test_a_source_without_photos_does_not_stop_the_others(tmp_path):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "empty").mkdir()
    found = find_photos([tmp_path / "empty", tmp_path / "a.jpg", tmp_path / "gone.jpg"])
    assert [f.name for f in found] == ["empty", "a.jpg", "gone.jpg"]
    with pytest.raises(PhotoError, match="holds no photos"):
        read_photo(found[0])


def test_png_is_lossless(tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (31, 17, 3), np.uint8)
    (tmp_path / "a.png").write_bytes(encode_png(photo))
    assert np.array_equal(read_photo(tmp_path / "a.png"), photo)


sides = st.integers(8, 900)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.sampled_from([320, 640]), st.booleans())
def test_boxes_survive_the_way_to_the_frame_and_back(height, width, size, stretch):
    letterbox = Letterbox.fit((height, width), size, stretch=stretch)
    box = torch.tensor([[width * 0.1, height * 0.2, width * 0.7, height * 0.9]])
    assert torch.allclose(letterbox.boxes_to_photo(letterbox.boxes_to_frame(box)), box, atol=1e-2)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.sampled_from([320, 640]))
def test_letterbox_pads_to_whole_strides_with_grey(height, width, size):
    letterbox = Letterbox.fit((height, width), size)
    frame = letterbox(np.zeros((height, width, 3), np.uint8))
    assert frame.shape == (*letterbox.frame, 3)
    assert letterbox.frame[0] % 32 == 0
    assert letterbox.frame[1] % 32 == 0
    assert max(letterbox.frame) == size
    assert (frame == PADDING_LEVEL).sum() == 3 * (np.prod(letterbox.frame) - np.prod(letterbox.resized))


@settings(max_examples=25, deadline=None)
@given(st.integers(8, 90), st.integers(8, 90), st.integers(0, 2**31))
def test_letterbox_pull_back_is_the_adjoint_of_its_linear_map(height, width, seed):
    letterbox = Letterbox.fit((height, width), 64)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, height, width, generator=generator, dtype=torch.float64)
    g = torch.rand(3, *letterbox.frame, generator=generator, dtype=torch.float64)
    (top, left), (h, w) = letterbox.offset, letterbox.resized
    forward = interpolate(x[None], (h, w), mode="bilinear", align_corners=False)[0]
    inner = (forward * g[:, top : top + h, left : left + w]).sum()
    assert torch.isclose(inner, (x * letterbox.pull_back(g)).sum(), rtol=1e-9)


def test_a_spread_gradient_reaches_the_pixels_that_the_letterbox_does_not_read():
    letterbox = Letterbox.fit((320, 320), 64)
    gradient = torch.rand(3, 64, 64) + 0.1
    exact, spread = letterbox.pull_back(gradient), letterbox.pull_back(gradient, spread=True)
    assert (exact == 0).float().mean() > 0.5
    assert (spread > 0).all()
    assert torch.isclose(spread.sum(), exact.sum(), rtol=1e-2)
    enlarged = interpolate(gradient[None], (320, 320), mode="bilinear")[0] / 25
    assert torch.allclose(spread, enlarged, atol=1e-5)


def test_the_frame_is_the_bilinear_resize_that_pull_back_assumes(bus):
    letterbox = Letterbox.fit(bus.shape[:2], 640)
    x = torch.from_numpy(bus).float().permute(2, 0, 1)[None]
    wanted = interpolate(x, letterbox.resized, mode="bilinear", align_corners=False)[0]
    got = torch.from_numpy(letterbox(bus)).permute(2, 0, 1)
    assert (wanted - got).abs().max() <= 1.0


def test_padding_gets_no_gradient():
    letterbox = Letterbox.fit((64, 40), 64)
    gradient = torch.zeros(3, *letterbox.frame)
    left, width = letterbox.offset[1], letterbox.resized[1]
    gradient[:, :, :left] = 1
    gradient[:, :, left + width :] = 1
    assert letterbox.frame[1] > width
    assert letterbox.pull_back(gradient).abs().sum() == 0


def test_resize_adjoint_conserves_the_sum_when_rows_of_weights_add_to_one():
    gradient = torch.rand(3, 10, 12)
    assert torch.isclose(resize_adjoint(gradient, (31, 7)).sum(), gradient.sum(), rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_resize_adjoint_to_twice_the_sides_is_that_of_torch_to_the_bit(height, width, seed):
    frames = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed)) - 0.5
    photo = torch.zeros(1, 3, 2 * height, 2 * width, requires_grad=True)
    interpolate(photo, (height, width), mode="bilinear").backward(frames)
    adjoint = resize_adjoint(frames.contiguous(memory_format=torch.channels_last)[0], (2 * height, 2 * width))
    assert torch.equal(adjoint, photo.grad[0])


def test_the_largest_difference_counts_both_ways():
    low, high = np.full((2, 2, 3), 3, np.uint8), np.full((2, 2, 3), 250, np.uint8)
    assert largest_difference(low, high) == largest_difference(high, low) == 247


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
def test_an_orientation_that_xmp_alone_names_turns_neither_photo_nor_size(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    exif = Image.Exif()
    exif[0x0131] = "a program"
    for options in ({}, {"exif": exif}):
        Image.new("RGB", (40, 20)).save(file, xmp=xmp, **options)
        assert photo_size(file) == (40, 20)
        assert read_photo(file).shape == (20, 40, 3)


def test_an_image_of_pillow_lies_as_its_file_does(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    levels = np.arange(40 * 20, dtype=np.uint16).reshape(20, 40) * 80
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    Image.fromarray(levels).save(tmp_path / "deep.png", exif=exif)
    Image.fromarray((levels // 256).astype(np.uint8)).convert("RGB").save(tmp_path / "turned.png", exif=exif)
    Image.new("RGB", (40, 20)).save(tmp_path / "xmp.jpg", xmp=xmp)
    for name, shape in (("deep.png", (40, 20, 3)), ("turned.png", (40, 20, 3)), ("xmp.jpg", (20, 40, 3))):
        with Image.open(tmp_path / name) as image:
            assert as_photo(image).shape == shape
            assert np.array_equal(as_photo(image), read_photo(tmp_path / name))
