from odd_images import odd_images

from detguard.photos import photo_size, read_photo


def test_photos(tmp_path, fuzz):
    file = tmp_path / "a.png"

    def read(data):
        file.write_bytes(data)
        assert read_photo(file).shape[1::-1] == photo_size(file)

    fuzz(odd_images(), read)
