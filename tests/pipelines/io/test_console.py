"""What reaches the terminal of a job and what its log file: by mark, from every process, at once and to the end."""

from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys
import termios
import threading
import warnings
from pathlib import Path

import pytest

from pipelines.io import console, storage

ROOT = Path(__file__).resolve().parents[3]


def test_marked_lines_are_shown_and_everything_is_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with console.quiet(tmp_path / "job.log"):
        console.say("two\nlines")
        sys.stdout.write("noise of Python\n")
        os.write(1, b"native noise\n")
        subprocess.run(["sh", "-c", "echo noise of a child; echo to its stderr >&2"], check=True)
        # As Ray forwards a worker's line.
        sys.stdout.write("\x1b[36m(RayTrainWorker pid=7)\x1b[0m [meteor 3/16] step 3/16  loss 1\n")
        sys.stderr.write("Loading: 3%\r[meteor] behind a bar\n")
        console.progress(4, 16, "step 4/16")
        os.write(2, b"[meteor] the last line has no end")
    assert capfd.readouterr() == (
        "two\nlines\nstep 3/16  loss 1\nbehind a bar\nstep 4/16\nthe last line has no end\n",
        "",
    )
    logged = (tmp_path / "job.log").read_text()
    for noise in ("noise of Python", "native noise", "noise of a child", "to its stderr", "(RayTrainWorker pid=7)"):
        assert noise in logged
    console.say("after")
    assert capfd.readouterr().out == "after\n"


def test_progress_is_a_few_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with console.quiet(tmp_path / "job.log"):
        for step in range(1, 1001):
            console.progress(step, 1000, f"step {step}")
        console.progress(900, 1000, "step 900")
    shown = [int(line.removeprefix("step ")) for line in capfd.readouterr().out.splitlines()]
    assert shown == [1, *(-(-1000 * share // 12) for share in range(1, 13)), 900], "900 is of another start"
    assert len((tmp_path / "job.log").read_text().splitlines()) == 1001


def test_a_slow_job_tells_every_minute() -> None:
    last = console._Shown()
    assert [last.is_next(done, 10_000, 20.0 * done) for done in range(1, 6)] == [True, False, False, True, False]


@pytest.mark.filterwarnings("always")
def test_own_warnings_are_shown_and_those_of_libraries_logged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with console.quiet(tmp_path / "job.log"):
        logging.getLogger("pipelines.io.retry").warning("storage is away for %d s", 5)
        logging.getLogger("pipelines.io.retry").info("details")
        logging.getLogger("some.library").warning("deprecated")
        warnings.warn("lambda is not solved", stacklevel=1)
        warnings.warn_explicit("of a library", UserWarning, "/lib/ray/data.py", 3)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert capfd.readouterr().out == "  warning: storage is away for 5 s\n  warning: lambda is not solved\n"


def test_a_worker_marks_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    console.say_from_worker("one\ntwo")
    console.progress_from_worker(1, 2, "step 1/2")
    assert capsys.readouterr().out == "[meteor] one\n[meteor] two\n[meteor 1/2] step 1/2\n"


def test_without_a_console_lines_are_printed_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("said")
    console.progress(1, 2, "step 1/2")
    console.keep_log("nowhere")
    assert capsys.readouterr().out == "said\nstep 1/2\n"


def test_the_log_is_kept_with_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        with console.quiet(tmp_path / "pretrain.log"):
            console.keep_log(str(tmp_path / "runs" / "logs"))
            console.keep_log("s3://no bucket")
            console.say("said to http://me:Xq7-pw@host")
            os.write(1, b"a library prints http://me:Xq7-pw@host/runs\n")
            assert (tmp_path / "pretrain.log").stat().st_mode & 0o077 == 0
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    logged = (tmp_path / "pretrain.log").read_text()
    assert "Xq7-pw" not in logged
    assert "a library prints http://(redacted)@host/runs\n" in logged
    (kept,) = storage.list_files(str(tmp_path / "runs" / "logs"))
    assert kept.endswith("-pretrain.log")
    assert (tmp_path / "runs" / "logs" / kept).read_text().startswith("[meteor] said to http://(redacted)@host\n")
    assert "Xq7-pw" not in (tmp_path / "runs" / "logs" / kept).read_text()
    printed = capfd.readouterr().out
    assert "warning: the log is not kept with the run: " in printed
    assert "Xq7-pw" not in printed


def test_a_job_that_writes_much_is_not_blocked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        for _ in range(2000):
            os.write(1, b"x" * 999 + b"\n")

    with console.quiet(tmp_path / "job.log"):
        threads = [threading.Thread(target=write) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        console.say("done")
    assert capfd.readouterr().out == "done\n"
    assert (tmp_path / "job.log").stat().st_size == 4 * 2000 * 1000 + len("[meteor] done\n")


PROGRAM = """
import sys, time
from pathlib import Path
from pipelines.io import console
with console.quiet(Path(sys.argv[1])):
    console.say("phase")
    for step in (1, 2, 4):
        console.progress(step, 4, f"step {step}/4")
        time.sleep(0.3)
    console.say("result")
"""


def test_progress_is_a_bar_on_a_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "job.log")], cwd=ROOT, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # the other side is closed
        pass
    assert process.wait() == 0
    os.close(ours)
    text = shown.decode()
    assert text.startswith("phase\r\n")
    assert text.endswith("result\r\n")
    assert " 50% |" in text
    assert "100% |" in text
    assert text.count("\n") == 3, "the bar takes one line"


def test_logs_have_a_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(console.LOG_FOLDER_VARIABLE, str(tmp_path))
    assert console.default_log("predict").parent == tmp_path
    monkeypatch.delenv(console.LOG_FOLDER_VARIABLE)
    assert console.default_log("predict").name.startswith("predict-")
