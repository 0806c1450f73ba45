"""Math-Verify and what decides before it, and worker processes that survive any input."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from prefix_rft.reward import answers as answers_module
from prefix_rft.reward import grader as grader_module
from prefix_rft.reward.grader import Grader, RewardError, extract_answer
from prefix_rft.reward.spelling import clean_answer

BOMBS = ["(" * 2000 + digit + ")" * 2000 for digit in "123"]
BOMB_TIMEOUT_S = 1.5
START_S = 3.0  # of processor time that a worker takes before its first question, at most


@pytest.fixture(scope="module")
def grader():
    with Grader(num_workers=1, timeout_s=20.0, memory_mib=1024) as grader:
        yield grader


@pytest.fixture
def strict_grader(monkeypatch):
    monkeypatch.setattr(answers_module, "why_refused", lambda text: None)  # of the bombs
    with Grader(num_workers=2, timeout_s=BOMB_TIMEOUT_S, memory_mib=512) as grader:
        while not all(worker.is_ready for worker in grader._workers):
            assert grader.grade(["x/2"], ["2x/4"]) == ["correct"]
        yield grader


def pids(grader: Grader) -> set[int]:
    return {worker.process.pid for worker in grader._workers}


def processor_s_of_ended() -> float:
    """Of the processes that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def is_running(pid: int) -> bool:
    """Zombies do not count: with their parent gone, nobody may reap them."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        (r"\frac12", "0.5", "correct"),
        ("1/2", r"\frac{1}{2}", "correct"),
        ("1/2", r"\frac{1}{3}", "wrong"),
        (r"\frac{3}{4}", ".75", "correct"),
        (r"3\frac{1}{2}", "7/2", "correct"),
        ("-1/2", r"-\frac{1}{2}", "correct"),
        ("-1/2", r"\frac{1}{2}", "wrong"),
        ("[1,2)", "[1, 2)", "correct"),
        ("[1,2)", "(1,2)", "wrong"),
        (r"(-\infty, 3]", r"(-\infty,3]", "correct"),
        (r"\{1,2,3\}", r"\{3,1,2\}", "correct"),
        (r"\{1,2,3\}", r"\{1,2\}", "wrong"),
        ("1, 2", "2, 1", "correct"),
        (r"50\%", "0.5", "correct"),
        ("50", r"50\%", "correct"),
        ("50", r"60\%", "wrong"),
        ("18", r"18\text{ dollars}", "correct"),
        ("3", r"3 \text{ cm}^2", "correct"),
        (r"\text{yes}", "yes", "correct"),
        (r"\text{yes}", r"\text{no}", "wrong"),
        (r"\text{(B)}", "B", "correct"),
        (r"2\pi", r"\pi \cdot 2", "correct"),
        (r"2\pi", r"\pi", "wrong"),
        (r"\frac{\pi}{2}", r"0.5\pi", "correct"),
        ("10,000", r"10{,}000", "correct"),
        ("1,234,567", r"1{,}234{,}567", "correct"),
        (r"\sqrt{8}", r"2\sqrt{2}", "correct"),
        ("x=5", "5", "correct"),
        ("5", "x = 5", "correct"),
        ("15x - 80", "-80+15x", "correct"),
        ("15x - 80", "15x + 80", "wrong"),
        (r"90^\circ", "90", "correct"),
        # exact forms exactly, decimals within a millionth
        ("1/2018!", "1/2021!", "wrong"),
        ("1/2018!", r"\frac{1}{2018!}", "correct"),
        (r"\frac{x}{2018!}", r"\frac{x}{2021!}", "wrong"),
        (r"\{1/2018!, 1\}", r"\{1/2021!, 1\}", "wrong"),
        (r"2-\frac{1}{\mathrm{e}}", r"2+\frac{1}{\mathrm{e}}", "wrong"),
        (r"2-\frac{1}{\mathrm{e}}", "2-e^{-1}", "correct"),
        (r"2-\frac{1}{\mathrm{e}}", "1.6321206", "correct"),
        (r"2-\frac{1}{\mathrm{e}}", "1.63213", "wrong"),
        (r"\pi", r"\frac{355}{113}", "wrong"),
        (r"\pi", "3.14159265", "correct"),
        (r"\pi", "3.1416", "wrong"),
        (r"10^{-9} \pi", "3.14159265e-9", "correct"),
        (r"10^{-9} \pi", r"10^{-8} \pi", "wrong"),
        (r"10^{-9} x", r"10^{-8} x", "wrong"),
        (r"10^{-9} x", r"10^{-9} \cdot x", "correct"),
        ("0.1x + 1", r"\frac{x}{10} + 1", "correct"),
        ("x^2", "49", "wrong"),  # equal at the point that tells differences
        (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}", "correct"),
        (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{7}}", "wrong"),
        (r"\sqrt{2}-\frac{\sqrt{8}}{2}", "0", "correct"),
        (r"\frac12 \pi", "10^{10^8}", "wrong"),
        (r"\frac12 \pi", "99999999!", "wrong"),
        ("(1e-3, 2e5)", r"(0.001, 2 \times 10^5)", "correct"),
        ("(1e-3, 2e5)", r"(0.001, 2 \times 10^4)", "wrong"),
        ("3.3e-10", r"3.3 \cdot e -10", "wrong"),
        ("1+2i", "2i + 1", "correct"),
        ("1+2i", "1-2i", "wrong"),
        # the same relation, whatever the solutions; no part of an answer for the whole
        ("N=n", "N = n + 1", "wrong"),
        ("y=2x+3", "2y - 4x = 6", "correct"),
        ("y=2x+3", "2y - 4x = 7", "wrong"),
        ("y=2x+3", "y=2x+3z", "wrong"),
        ("x > 2", "-2x < -4", "correct"),
        ("x > 2", "-2x > -4", "wrong"),
        ("x^2=4", "x^2=-4", "wrong"),
        (r"\hbar \omega + \frac{E^{2}}{2 m \omega^{2}}", r"\frac{E^{3}}{2 m \omega^{2}}", "wrong"),
        (r"t(0,4]", "4", "wrong"),
        ("1+2i", r"1+2 \cdot i", "correct"),
        ("1+2i", "1+3*i", "wrong"),
        # a whole number with a point is no rounded one
        ("1625.0", r"\sqrt{2640625}", "correct"),
        ("1625.0", r"\sqrt{2640626}", "wrong"),
        (r"8\pi", "8*pi", "correct"),
        (r"8\pi", "8*p*i", "wrong"),
        # spellings
        ("4", r"4\sqrt(2)", "wrong"),
        (r"4\sqrt{2}", r"4\sqrt(2)", "correct"),
        (r"4\sqrt{2}", "4√2", "correct"),
        (r"4\sqrt{2}", "4 sqrt(2)", "correct"),
        (r"4\sqrt{12}", "4√12", "correct"),
        ("2^{n(n+1)}", "2^(n(n+1))", "correct"),
        (r"\infty", "∞", "correct"),
        (r"-\infty", "∞", "wrong"),
        (r"2\pi", "2π", "correct"),
        (r"\frac{x}{2}", "½x", "correct"),
        ("x^2 + 1", "x² + 1", "correct"),
        ("x^2 + 1", "x³ + 1", "wrong"),
        # units of what is no plain number, and variables that are none
        (r"12\pi", r"12\pi \text{ cm}^2", "correct"),
        (r"2\sqrt{5} \text{ cm}", r"\sqrt{20}", "correct"),
        ("x = 5", r"5 \text{ cm}", "correct"),
        ("17.5%", r"x = 17.5\%", "correct"),
        ("2c", "2", "wrong"),
        ("x+3t", "x+3", "wrong"),
        (r"2\sqrt{5} d", r"2\sqrt{5}", "wrong"),
        ("4:3", "8:6", "correct"),
        ("5", "6 $5", "wrong"),
        ("5", "}{", "wrong"),
        ("5", "\\", "wrong"),
        ("5", "\0", "wrong"),
        ("5", "\ud800", "wrong"),
    ],
)
def test_math(grader, gold, answer, expected):
    assert grader.grade([clean_answer(gold)], [clean_answer(answer)]) == [expected]


def test_which_gold_answers_can_be_compared_with(grader):
    golds = ["5", "1,000", r"\frac{1}{2}", r"\text{yes}", "?", "", "t(0,4]", "x" * 5000, "?"]
    expected = [True, True, True, True, False, False, False, False, False]
    assert grader.parseable(golds) == expected
    assert grader.parseable([]) == [] and grader.grade([], []) == []


def test_bombs_end_at_their_deadline_and_hold_nobody_up(strict_grader):
    before = pids(strict_grader)
    # Two bombs first, one per worker; the easy answers must wait for them.
    answers = [BOMBS[0], BOMBS[1], "0.5x", "2x/4", "x/3", BOMBS[2], "x+y"]
    start_s = processor_s_of_ended()
    statuses = strict_grader.grade([r"\frac{x}{2}"] * len(answers), answers)
    took_s = processor_s_of_ended() - start_s
    expected = ["timeout", "timeout", "correct", "correct", "wrong", "timeout", "wrong"]
    assert statuses == expected
    assert 3 * BOMB_TIMEOUT_S < took_s < 3 * (BOMB_TIMEOUT_S + START_S)
    assert not before & pids(strict_grader) and len(pids(strict_grader)) == 2
    assert not any(is_running(pid) for pid in before)


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" + "(" * 10_000 + "1" + ")" * 10_000 + "}",
        r"\boxed{" * 10_000 + "1" + "}" * 10_000,
        r"\boxed{" * 150_000,
        r"\boxed{" + "9" * 1_000_000 + "}",
        r"\boxed{" + "1+" * 500_000 + "1}",
        "{" * 1_000_000,
        "\\" * 1_000_000,
    ],
    ids=["parentheses", "boxes", "open boxes", "digits", "sum", "braces", "backslashes"],
)
def test_huge_answers_are_refused_at_once(grader, text):
    start = time.monotonic()
    answer = extract_answer(text, "boxed")
    assert answer is None or grader.grade(["5"], [answer]) == ["wrong"]
    assert time.monotonic() - start < 5.0


def test_a_memory_bomb_is_not_right_and_the_next_answer_is_graded():
    with Grader(num_workers=1, timeout_s=5.0, memory_mib=64) as grader:
        statuses = grader.grade(["5", "x/2"], ["2^{10^{10}}", "0.5x"])
    assert statuses[0] != "correct" and statuses[1] == "correct"


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited on Linux only")
def test_the_memory_limit_counts_from_what_is_in_use():
    script = textwrap.dedent(
        f"""
        import runpy
        limit_memory = runpy.run_path({str(grader_module._worker_file)!r})["limit_memory"]
        limit_memory(128)
        kept = bytearray(64 * 2**20)
        try:
            bytearray(128 * 2**20)
        except MemoryError:
            print("refused")
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited on Linux only")
def test_workers_have_a_memory_limit(strict_grader):
    for pid in pids(strict_grader):
        limits = Path(f"/proc/{pid}/limits").read_text()
        (line,) = [line for line in limits.splitlines() if line.startswith("Max address space")]
        in_use = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
        assert 0 < int(line.split()[3]) <= in_use + 512 * 2**20


def test_a_worker_that_dies_at_work_costs_one_error(strict_grader):
    killer = threading.Timer(0.5, lambda: [os.kill(pid, signal.SIGKILL) for pid in before])
    before = pids(strict_grader)
    killer.start()
    answers = [BOMBS[0], BOMBS[0], "0.5x"]
    assert strict_grader.grade(["x/2"] * 3, answers) == ["error", "error", "correct"]
    killer.join()


def test_a_worker_that_dies_idle_costs_nothing(strict_grader):
    for pid in pids(strict_grader):
        os.kill(pid, signal.SIGKILL)
        assert wait_until_gone(pid, 5.0)
    assert strict_grader.grade(["x/2"] * 3, ["0.5x", "2x/4", "x/3"]) == ["correct"] * 2 + ["wrong"]


def test_workers_take_no_notice_of_ctrl_c(strict_grader):
    before = pids(strict_grader)
    for pid in before:
        os.kill(pid, signal.SIGINT)
        assert os.getpgid(pid) != os.getpgid(0)
    assert strict_grader.grade(["x/2"], ["0.5x"]) == ["correct"]
    assert pids(strict_grader) == before


def test_an_interrupted_call_leaves_no_reply_behind(strict_grader):

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            strict_grader.grade(["x/2"] * 2, [BOMBS[0]] * 2)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert strict_grader.grade(["x/2"] * 2, ["x/3", "0.5x"]) == ["wrong", "correct"]


def test_closing_ends_the_workers():
    grader = Grader(num_workers=2, timeout_s=1.0, memory_mib=512)
    running = pids(grader)
    assert len(running) == 2 and all(map(is_running, running))
    grader.close()
    assert not any(map(is_running, running))


@pytest.mark.parametrize("answer", ["0.5x", BOMBS[0]], ids=["idle", "at work"])
def test_no_worker_outlives_a_parent_that_was_killed(answer):
    script = textwrap.dedent(
        f"""
        import time
        from prefix_rft.reward import answers
        from prefix_rft.reward.grader import Grader
        answers.why_refused = lambda text: None
        grader = Grader(num_workers=1, timeout_s=0.5, memory_mib=512)
        grader.grade(["x/2"], ["2x/4"])
        grader._timeout_s = 60.0
        print(grader._workers[0].process.pid, flush=True)
        grader.grade(["x/2"], [{answer!r}])
        time.sleep(60)
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.kill()
    parent.communicate()
    assert wait_until_gone(pid, 5.0)


def test_a_worker_that_cannot_start_stops_the_run(tmp_path, monkeypatch):
    broken = tmp_path / "worker.py"
    broken.write_text("import no_such_package\n")
    monkeypatch.setattr(grader_module, "_worker_file", broken)
    with (
        Grader(num_workers=2, timeout_s=1.0, memory_mib=512) as grader,
        pytest.raises(RewardError, match="did not start: it ended(.|\n)*no_such_package"),
    ):
        grader.grade(["x/2"], ["0.5x"])


def test_a_worker_that_never_gets_ready_stops_the_run(tmp_path, monkeypatch):
    asleep = tmp_path / "worker.py"
    asleep.write_text("import time; time.sleep(60)\n")
    monkeypatch.setattr(grader_module, "_worker_file", asleep)
    monkeypatch.setattr(grader_module, "START_TIMEOUT_S", 0.5)
    with (
        Grader(num_workers=1, timeout_s=1.0, memory_mib=512) as grader,
        pytest.raises(RewardError, match=r"did not start: not ready after 0\.5 s"),
    ):
        grader.grade(["x/2"], ["0.5x"])


def test_neither_the_grader_nor_its_workers_load_torch():
    script = textwrap.dedent(
        f"""
        import runpy, sys
        import prefix_rft.reward.grader
        assert "math_verify" not in sys.modules
        sys.argv = ["worker", "1.0", "512", "1e-6"]
        runpy.run_path({str(grader_module._worker_file)!r}, run_name="__main__")
        assert "math_verify" in sys.modules
        assert not {{"torch", "transformers"}} & set(sys.modules)
        """
    )
    assert subprocess.run([sys.executable, "-c", script], input=b"").returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="processor time of a child is read from /proc")
def test_a_busy_machine_changes_no_grading() -> None:
    """A worker that is not run for longer than its time has not used that up."""
    with Grader(num_workers=1, timeout_s=0.5, memory_mib=512) as grader:
        assert grader.grade(["x/2"], ["2x/4"]) == ["correct"]
        [pid] = pids(grader)
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(1.5, os.kill, (pid, signal.SIGCONT)).start()
        start = time.monotonic()
        assert grader.parseable([r"(x+1)^2", r"\sin y"]) == [True, True]
        assert time.monotonic() - start > 1.0
        assert pids(grader) == {pid}
