"""The log of a run: what is written again is dropped, what cannot be read is passed over."""

import json

import pytest

from training.run_log import event_line, forget_after, parse_event, read_log, reporting, speed

STAGES = ["first", "second"]


def lines(*events) -> str:
    return "".join(event_line(kind, stage, step=step) for kind, stage, step in events)


def test_a_resumed_run_keeps_what_it_does_not_do_again(tmp_path):
    log = tmp_path / "log.jsonl"
    kept = lines(("start", "first", 0), ("end", "first", 9))
    kept_of_second = lines(("changed", "second", 0), ("skipped", "second", 2))
    again = lines(("start", "second", 0), ("skipped", "second", 3), ("end", "second", 9))
    log.write_text(kept + kept_of_second + again + lines(("end", "of another recipe", 0)))
    forget_after(log, STAGES, stage=1, step=2)
    assert log.read_text() == kept + kept_of_second
    forget_after(log, STAGES, stage=0, step=0)
    assert log.read_text() == ""
    assert not (tmp_path / "log.jsonl.damaged").exists()


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"\0\0\0\n",
        b"{}\n",
        b"null\n",
        b"\xff\n",
        b'{"event": "end", "stage": "first"}',  # without its end
        b'{"event": "end"}\n',
        b'{"event": "end", "stage": ["first"]}\n',
        b'{"event": "end", "stage": "first", "step": true}\n',
        b'{"event": "end", "stage": "first", "step": -1}\n',
        b'{"event": "end", "stage": "first", "step": 1e99}\n',
        b'{"event": "step", "stage": "first", "step": 1}\n',
        b'{"event": "step", "stage": "first", "loss": 1.0}\n',
        b'{"event": "step", "stage": "first", "step": 1, "loss": NaN}\n',
        b'{"event": "step", "stage": "first", "step": 1, "loss": "1"}\n',
        b'{"event": "validation", "stage": "first", "step": 1, "loss": 1' + b"0" * 400 + b"}\n",
        b'{"event": "end", "stage": "first", "step": ' + b"9" * 5000 + b"}\n",
        b"[" * 100_000 + b"\n",
    ],
)
def test_a_line_that_is_no_event_is_passed_over(tmp_path, line):
    log = tmp_path / "log.jsonl"
    good = event_line("end", "first", step=1).encode()
    log.write_bytes(good + line)
    assert parse_event(line) is None
    assert read_log(log) == [json.loads(good)]
    forget_after(log, STAGES, stage=1, step=0)
    assert log.read_bytes() == good
    assert (tmp_path / "log.jsonl.damaged").read_bytes() == good + line


def test_every_damaged_log_is_kept(tmp_path):
    log = tmp_path / "log.jsonl"
    for content in ("one", "two", "three"):
        log.write_text(content)
        forget_after(log, STAGES, stage=1, step=0)
    kept = sorted(path.name for path in tmp_path.glob("*.damaged*"))
    assert kept == ["log.jsonl.damaged", "log.jsonl.damaged2", "log.jsonl.damaged3"]


def test_what_only_reports_may_fail_but_an_interrupt_ends(capsys):
    with reporting("a picture"):
        raise ValueError("two\nlines")
    said = capsys.readouterr().out
    assert said == "warning: a picture failed, training goes on: two\\nlines\n"
    with pytest.raises(KeyboardInterrupt), reporting("a picture"):
        raise KeyboardInterrupt


def test_a_speed_is_shown_with_its_digits():
    shown = [speed(tokens) for tokens in (0.4, 31.2, 9999.4, 9999.6, 123456.0)]
    assert shown == ["0 tok/s", "31 tok/s", "9999 tok/s", "10.0k tok/s", "123.5k tok/s"]
