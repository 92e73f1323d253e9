"""What a person sees, on any terminal and without one."""

import io
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pipelines.console import Progress, UserError, counted, run_command, say

SPEAKS = "from pipelines.console import run_command, say; run_command(lambda: [say('4×4 images'), say('done')])"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_a_terminal_cannot_show_is_replaced(monkeypatch, encoding):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding))
    run_command(lambda: say("4×4, 猫"))
    cat = "猫" if encoding == "utf-8" else "?"
    assert shown.getvalue().decode(encoding) == f"4{'?' if encoding == 'ascii' else '×'}4, {cat}\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_without_an_output_the_work_is_done(tmp_path, closed):
    script = SPEAKS.replace("say('done')", f"open({str(tmp_path / 'done')!r}, 'w').close()")
    done = subprocess.run(f'"{sys.executable}" -c "{script}" {closed}', shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr and (tmp_path / "done").exists()


def test_a_command_that_is_interrupted_while_it_is_imported_ends_without_a_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.generate", "mnist5k"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also where the tests run in the background
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == -signal.SIGINT


def test_a_command_that_is_interrupted_says_that_nothing_is_lost(capsys):
    heeded = signal.signal(signal.SIGINT, signal.SIG_DFL)  # as it is imported
    try:
        with pytest.raises(SystemExit) as ended:
            run_command(lambda: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, heeded)
    assert ended.value.code == 130 and "interrupted; nothing that was finished is lost" in capsys.readouterr().err


def test_where_nobody_reads_the_output_a_command_ends_as_others_do():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", SPEAKS], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 141 and "Traceback" not in done.stderr and "BrokenPipeError" not in done.stderr


def test_names_cannot_steer_the_terminal_nor_make_lines_of_their_own(capsys):
    def main():
        say("\x1b[2Ja.png\r\x07 \u202egnp.b \udcff é 猫 a\u3000b\n\tc.png", "next", "a\x85b\u2028c\u2029d\xa0e")
        raise UserError("no \x1b]0;title\x07\nerror: none")

    with pytest.raises(SystemExit):
        run_command(main)
    said = capsys.readouterr()
    assert said.out == "\\x1b[2Ja.png\\r\\x07 \\u202egnp.b \\udcff é 猫 a\u3000b\\n\tc.png\nnext\na\\x85b\\u2028c\\u2029d\xa0e\n"
    assert said.err == "error: no \\x1b]0;title\\x07\\nerror: none\n"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_a_sentence(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2 and "error: out of memory: smaller batches" in capsys.readouterr().err


def test_a_long_work_says_soon_how_long_it_takes_and_then_seldom(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("pipelines.console.time", SimpleNamespace(monotonic=lambda: now))
    with Progress("working", 1000, "images") as progress:
        for _ in range(1000):
            now += 1
            progress.update(1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "working: 6/1000 images, 0 %, 1.0 images/s, 16:34 left"
    assert len(lines) == Progress.LINES + 1 and "1000/1000 images, 100 %" in lines[-1]


def test_the_time_left_is_not_judged_by_the_first_step_which_may_compile(monkeypatch, capsys):
    clock = iter([0.0, 171.0, 177.0, 187.0])
    monkeypatch.setattr("pipelines.console.time.monotonic", lambda: next(clock))
    monkeypatch.setattr(Progress, "LINES", 4000)
    with Progress("stage 2", 4000, "steps") as progress:
        progress.update(1, {"loss": 5.0})
        progress.update(6)
        progress.update(9)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "stage 2: 1/4000 steps, 0 %, loss 5"
    assert second == "stage 2: 7/4000 steps, 0 %, 1.0 steps/s, 1:06:33 left"
    assert third.startswith("stage 2: 16/4000 steps, 0 %, 0.9 steps/s")


def test_of_one_there_is_no_plural():
    assert [counted(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert [counted(number, "of 5 has", "of 5 have") for number in (1, 5)] == ["1 of 5 has", "5 of 5 have"]
