"""A folder is written to only if it is new, empty, or marked by an earlier start."""

from pathlib import Path

import pytest

from checkpoints.files import write_file, writing
from checkpoints.owned import MARK, marked, own
from config import UserError


def test_new_and_empty_folders_become_ours(tmp_path):
    """A folder that is not there is made; an empty one is marked; a second start finds the mark."""
    for folder in (tmp_path / "a" / "b", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        own(folder, "run")
        assert marked(folder) == "run"
        (folder / "log.jsonl").write_text("")
        own(folder, "run")


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoints/mine", ".git/config", "x\ny"])
def test_a_folder_with_other_things_is_refused(tmp_path, name):
    """Whatever the name of somebody's file, it is still there, with its content."""
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("precious")
    with pytest.raises(UserError, match="did not write; fix: name a new or an empty folder"):
        own(tmp_path, "run")
    assert file.read_text() == "precious"
    assert not (tmp_path / MARK).exists()


def test_each_kind_has_its_own_folder(tmp_path):
    """A run does not write into an export's folder."""
    own(tmp_path, "export")
    with pytest.raises(UserError, match="holds export, which is not run"):
        own(tmp_path, "run")


def test_files_in_the_place_of_the_folder(tmp_path):
    """A file, a path below a file and a dead link are named in one line."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in ("file", "file/below", "link"):
        with pytest.raises(UserError, match="fix: "):
            own(tmp_path / path, "run")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_tilde_makes_no_folder_of_that_name(tmp_path, monkeypatch):
    """No shell replaces it in train.output=~/out, and who removes ~ removes everything."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="begins with ~"):
        own(Path("~/out"), "run")
    with pytest.raises(UserError, match="begins with ~"), writing(Path("~/page.html")):
        write_file(Path("~/page.html"), "page")
    assert not list(tmp_path.iterdir())
