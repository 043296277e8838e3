"""Files: what is there and is no regular file is never replaced; tables are read as written."""

import os
import stat

import pytest

from crt_lib import InputError
from crt_lib.files import read_rows, write_rows, write_text


def test_what_is_no_regular_file_is_left_alone(tmp_path):
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    (tmp_path / "link").symlink_to(pipe)
    for name in ("pipe", "folder", "link"):
        with pytest.raises(InputError, match=f"{name} is not a regular file") as said:
            write_text(tmp_path / name, "x")
        assert "\n" not in str(said.value)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and folder.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "pipe"]


def test_a_link_to_a_regular_file_is_replaced_and_its_file_is_not(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("before")
    link.symlink_to(file)
    write_text(link, "after")
    assert (file.read_text(), link.read_text()) == ("before", "after")


def test_tables_come_back_as_they_were(tmp_path):
    rows = [{"a": 1, "b": 0.5, "c": "x"}, {"a": None, "b": float("inf"), "c": None}]
    write_rows(tmp_path / "t.csv", rows)
    assert read_rows(tmp_path / "t.csv") == rows
    write_rows(tmp_path / "more.csv", [{"a": 1}, {"b": 2}])
    assert read_rows(tmp_path / "more.csv") == [{"a": 1, "b": None}, {"a": None, "b": 2}]
    (tmp_path / "short.csv").write_text("a,b\n1\n")
    assert read_rows(tmp_path / "short.csv") == [{"a": 1, "b": None}]


@pytest.mark.parametrize("damaged", [b"\xff\xfe", b'"' + b"x" * 200_000], ids=["bytes", "long"])
def test_a_damaged_table_is_one_line_with_its_name(damaged, tmp_path):
    path = tmp_path / "table.csv"
    write_rows(path, [{"a": 1, "b": "x"}])
    path.write_bytes(path.read_bytes() + damaged)
    with pytest.raises(InputError, match=r"table\.csv is damaged .* make it again"):
        read_rows(path)
