from odd_images import odd_images

from detguard.photos import photo_size, read_photo


def test_photos(tmp_path, fuzz):
    file = tmp_path / "a.png"

    def read(data):
        file.write_bytes(data)
        height, width = read_photo(file).shape[:2]
        assert photo_size(file) in ((width, height), (height, width))

    fuzz(odd_images(), read)
