"""Arrays that are kept beside a file: what a killed write left goes with the next one."""

import numpy as np

from inputs.index import cached_array


def test_what_a_killed_write_left_is_removed(tmp_path):
    file = tmp_path / "rows[1].json"
    file.write_text("[]")
    (tmp_path / ".rows[1].json.index.abcd_123").write_text("half an index")
    (tmp_path / ".rows[1].json.index").write_text("of somebody")
    cached_array(file, "index", lambda: np.zeros((2, 3), np.int64))
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == [".rows[1].json.index", "rows[1].json", "rows[1].json.index"]
