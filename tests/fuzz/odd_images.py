"""Image files near to valid ones: of every format that is read, of some that are not, and made of odd parts."""

import io
import struct
import zlib

import cv2
import numpy as np
from hypothesis import strategies as st
from mutations import mutated
from PIL import Image

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.uint8))
OTHER = Image.new("RGB", PHOTO.size, "red")
CODED = [
    ("JPEG", "RGB", {}),
    ("JPEG", "L", {"progressive": True}),
    ("JPEG", "CMYK", {"progressive": True, "restart_marker_blocks": 1}),
    ("JPEG", "RGB", {"exif": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"}),
    ("MPO", "RGB", {"save_all": True, "append_images": [OTHER]}),
    ("PNG", "RGB", {}),
    ("PNG", "P", {"transparency": 3}),
    ("PNG", "I;16", {}),
    ("PNG", "RGBA", {"save_all": True, "append_images": [OTHER]}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGBA", {"lossless": True}),
    ("WEBP", "RGB", {"save_all": True, "append_images": [OTHER]}),
    ("BMP", "RGB", {}),
    ("BMP", "P", {}),
    ("GIF", "P", {}),
    ("GIF", "P", {"save_all": True, "append_images": [OTHER]}),
    *(("TIFF", "RGB", {"compression": c}) for c in ("raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits")),
    ("TIFF", "1", {"compression": "group4"}),
    ("TIFF", "I;16", {}),
    # Formats that are not for photos here, whatever they are called.
    *((kind, "RGB", {}) for kind in ("AVIF", "EPS", "PDF", "ICO", "ICNS", "TGA", "PPM", "JPEG2000", "DDS", "PCX")),
]  # fmt: skip


def coded(kind, mode, options):
    stream = io.BytesIO()
    PHOTO.convert("L" if mode == "I;16" else mode).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, interlaced, pixels, extra):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    rest = chunk(b"IDAT", zlib.compress(bytes(pixels))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + rest


def tiff(tags):
    """A TIFF of 64 bytes of pixels: tag -> (type, count, value)."""
    entries = b"".join(struct.pack("<HHII", tag, *value) for tag, value in sorted(tags.items()))
    end = struct.pack("<HI", len(tags), 72)
    return b"II*\0" + struct.pack("<I", 72) + bytes(64) + end[:2] + entries + struct.pack("<I", 0)


def bmp(width, height, bits, compression, colours, pixels):
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(pixels), 0, 0, colours, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54) + header + pixels


def jpeg(scans, repeated):
    """A progressive JPEG whose scan number `repeated` comes so many times more."""
    stream = io.BytesIO()
    Image.new("RGB", (600, 400), "red").save(stream, "JPEG", progressive=True)
    parts = stream.getvalue().split(b"\xff\xda")
    parts[1:] = [parts[1 + repeated % 9]] * scans + parts[1:]
    return b"\xff\xda".join(parts)


BOMB = zlib.compress(bytes(1 << 22))
TIFF_TAGS = (
    254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338, 339, 347, 34665,
)  # fmt: skip
PLAIN_TIFF = {256: (4, 1, 16), 257: (4, 1, 16), 258: (3, 1, 8), 262: (3, 1, 1), 273: (4, 1, 8), 279: (4, 1, 64)}
CHUNKS = (b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"IDAT", b"gAMA")
COMPRESSED = (b"a\0\0" + BOMB, b"a\0\1\0\0\0" + BOMB)
sides = st.sampled_from([0, 1, 8, 16, 64, 1000, 9999, 30000, 65535, 2**31 - 1, 2**32 - 1])
words = st.sampled_from(
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 24, 32, 64, 72, 259, 1000, 32773, 34712, 50000, 65535, 2**31, 2**32 - 1]
)
chunks = st.builds(chunk, st.sampled_from(CHUNKS), st.binary(max_size=30) | st.sampled_from(COMPRESSED))
headers = st.builds(
    chunk, st.just(b"IHDR"), st.builds(struct.pack, st.just(">IIBBBBB"), sides, sides, *[st.integers(0, 16)] * 5)
)
pngs = st.builds(
    png,
    *(sides, sides, st.sampled_from([1, 2, 4, 8, 16, 3]), st.sampled_from([0, 2, 3, 4, 6, 1]), st.integers(0, 2)),
    st.sampled_from([0, 100, 1 << 20]),
    st.lists(chunks | headers, max_size=3),
)
values = st.tuples(st.integers(0, 18), words, words)
tiffs = st.dictionaries(st.sampled_from(TIFF_TAGS), values).map(tiff)
likely = st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 3]), words)
changed = st.dictionaries(st.sampled_from(TIFF_TAGS), likely, max_size=4).map(lambda tags: tiff(PLAIN_TIFF | tags))
bmps = st.builds(
    bmp,
    sides.filter(lambda side: side < 2**31),
    st.integers(-(2**31), 2**31 - 1) | st.sampled_from([16, -16, 9999]),
    *(st.sampled_from([1, 4, 8, 16, 24, 32, 0]), st.integers(0, 6), words),
    st.binary(max_size=40) | st.just(bytes(20)),
)
jpegs = st.builds(jpeg, st.integers(0, 3000), st.integers(0, 9))


def odd_images() -> st.SearchStrategy[bytes]:
    """Files that may be images."""
    pages = cv2.imencodemulti(".tif", [np.asarray(PHOTO), np.asarray(OTHER)])[1].tobytes()
    return mutated([pages, *(coded(*options) for options in CODED)]) | pngs | tiffs | changed | bmps | jpegs
