import json
import os
import re
import resource

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from detguard import DetguardError, files
from detguard.files import MAX_DEPTH, FileError, parse_json, printable, read_file, read_json, read_yaml, write_file


def read_text_as_yaml(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text, "utf-8", newline="")
    return read_yaml(tmp_path / "a.yaml")


def test_a_pipe_is_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(FileError, match=r"pipe\.jpg: not a regular file"):
        read_file(tmp_path / "pipe.jpg")


def test_a_device_behind_a_link_is_refused(tmp_path):
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    with pytest.raises(FileError, match="not a regular file"):
        read_file(tmp_path / "zero.yaml")


def test_a_file_over_its_limit_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(bytes(101))
    assert read_file(tmp_path / "a", 101) == bytes(101)
    with pytest.raises(FileError, match="over the limit"):
        read_file(tmp_path / "a", 100)


@pytest.mark.parametrize("name", ["gone", "x" * 300, "a\0b", "\ud800", ""])
def test_names_that_no_file_has_are_errors(tmp_path, name):
    with pytest.raises(FileError, match=r"cannot be read|not a regular file"):
        read_file(tmp_path / name)


@pytest.mark.parametrize("length", [3, 245, 255])
def test_a_file_of_any_name_is_written_whole(tmp_path, length):
    file = tmp_path / ("x" * length)
    write_file(file, b"data")
    assert file.read_bytes() == b"data"
    assert list(tmp_path.iterdir()) == [file]


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a.safetensors", b"data")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["x" * 256, "a\0b"])
def test_a_name_that_cannot_be_written_is_an_error(tmp_path, name):
    with pytest.raises(FileError, match="cannot be written"):
        write_file(tmp_path / name, b"data")
    assert not list(tmp_path.iterdir())


def test_a_file_where_a_folder_should_be_is_named_as_the_reason(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(FileError, match=r"b: cannot be written \(.*a is not a folder\)"):
        write_file(tmp_path / "a" / "b", b"data")


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(FileError, match="cannot be written"):
            write_file(file, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ('{"a":', "}")])
def test_json_is_nested_as_deep_as_yaml_and_no_deeper(begin, end):
    assert parse_json(begin * MAX_DEPTH + "1" + end * MAX_DEPTH)
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json(begin * (MAX_DEPTH + 1) + "1" + end * (MAX_DEPTH + 1))


def test_json_nested_too_deep_is_an_error(tmp_path):
    (tmp_path / "a.json").write_text("[" * 200_000)
    with pytest.raises(FileError, match="nested too deep"):
        read_json(tmp_path / "a.json")


def test_json_numbers_of_thousands_of_digits_are_an_error():
    with pytest.raises(ValueError, match="digits"):
        parse_json("1" * 5000)


def test_yaml_is_read_as_plain_data(tmp_path):
    text = "a: 1\nb: [.5, -2, 1.0e+3, true, null, ~]\nc: {0: person, 1: 'no'}\nd: &x [1]\ne: *x\n"
    assert read_text_as_yaml(tmp_path, text) == {
        "a": 1, "b": [0.5, -2, 1000.0, True, None, None], "c": {0: "person", 1: "no"}, "d": [1], "e": [1],
    }  # fmt: skip


@pytest.mark.parametrize(
    "text", ["no", "12:30", "2024-01-01", "0x_", "1__0", "0b", "1.2.3", "089", "1e5", "0x1f", "=", "<<", "1" * 20]
)
def test_what_only_old_yaml_takes_for_something_is_text(tmp_path, text):
    assert read_text_as_yaml(tmp_path, f"[{text}]") == [text]


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system [x]",
        "!!timestamp x",
        "!!int x",
        "a: *b",
        "&a [*a]",
        "{[]: 1}",
        "a: [",
        "a: \t- b",
        "\x01",
    ],
)
def test_yaml_that_is_more_than_data_is_an_error(tmp_path, text):
    with pytest.raises(FileError, match="not a readable yaml"):
        read_text_as_yaml(tmp_path, text)


def test_yaml_that_grows_by_its_aliases_is_refused_before_it_grows(tmp_path):
    bomb = "a0: &a0 [1,1,1,1,1,1,1,1,1]\n"
    bomb += "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    with pytest.raises(FileError, match="aliases"):
        read_text_as_yaml(tmp_path, bomb)


@pytest.mark.parametrize("text", ["[" * 5000, "- " * 5000 + "x", "{a: " * 500 + "}" * 500])
def test_yaml_nested_too_deep_is_an_error(tmp_path, text):
    with pytest.raises(FileError, match="not a readable yaml"):
        read_text_as_yaml(tmp_path, text)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**19) + 1, 10**19 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")) | st.from_regex(r"[-+0-9._eEx:~]{1,8}", fullmatch=True),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=3) | st.integers(0, 99), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(deadline=None)
@given(plain)
@example("-.0")
def test_what_is_dumped_is_read_back(tmp_path_factory, value):
    # PyYAML writes some ends of lines as they are, and reads them as spaces.
    assume(not re.search("[\x85\u2028\u2029]", json.dumps(value, ensure_ascii=False)))
    text = yaml.safe_dump([value, value], allow_unicode=True)
    assert read_text_as_yaml(tmp_path_factory.getbasetemp(), text) == [value, value]


def test_what_a_terminal_would_obey_is_shown():
    assert printable("é\x1b[31m\u202eb\ud800\x00\n") == "é\\x1b[31m\\u202eb\\ud800\\x00\\n"


def test_a_yaml_of_more_parts_than_memory_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_EVENTS", 1000)
    with pytest.raises(DetguardError, match="over 1000 parts"):
        read_text_as_yaml(tmp_path, "- a\n" * 1000)
