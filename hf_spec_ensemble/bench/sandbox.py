"""
Runs model-written Python in a subprocess with limits, and says whether it ran to its end.

A guard against the accidents of generated code, not against an attacker: limits of the operating system on time, memory
and file size, and an audit hook that refuses what a programming puzzle has no use for (writing or removing files,
processes, sockets, foreign code). For code that may be hostile, run the whole benchmark in a container.
"""

import importlib.util
import secrets
import subprocess
import sys
import tempfile


# Runs in the subprocess, and sets the limits before the program's first line. What the program prints goes nowhere; a
# token that it does not know, written at the end, says that it did not just leave with exit code 0.
RUNNER = """
import os, resource, sys
seconds, memory, token = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
program = sys.stdin.read()
sys.argv = ["program"]
report, sys.stdout, sys.stderr = sys.stdout, open(os.devnull, "w"), open(os.devnull, "w")
for limit, value in (
    (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 4096),
    (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(limit, (value, value))

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
HARMLESS = {"os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv", "os.unsetenv", "os.add_dll_directory"}
REFUSED = ("os.", "shutil.", "subprocess.", "socket.", "ctypes.", "mmap.", "pty.", "signal.", "syslog.", "fcntl.",
           "resource.", "sqlite3.")

def audit(event, arguments):
    if event == "open" and (arguments[2] or 0) & WRITES:
        raise PermissionError(f"writing {arguments[0]!r} is not allowed")
    if event.startswith(REFUSED) and event not in HARMLESS:
        raise PermissionError(f"{event} is not allowed")

sys.addaudithook(audit)
exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
report.write(token)
report.flush()
"""


def can_run() -> bool:
    """Whether this operating system has the limits that `runs` sets."""
    return importlib.util.find_spec("resource") is not None


def runs(program: str, seconds: int = 10, memory: int = 1 << 30) -> bool:
    """
    Whether a program runs to its end without an error, within its limits.

    Args:
        program (`str`): Python source.
        seconds (`int`): Of processor time, and twice as many on the clock.
        memory (`int`): Bytes of address space.

    Returns:
        `bool`: `False` after any error or exit, beyond a limit, and for anything that writes files, starts processes or
        opens connections.

    Example:

    >>> from hf_spec_ensemble.bench.sandbox import runs

    >>> runs("assert 1 + 1 == 2"), runs("assert 1 + 1 == 3"), runs("raise SystemExit(0)")
    (True, False, False)
    """
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out:  # a file: no pipe to flood
        command = [sys.executable, "-I", "-B", "-c", RUNNER, str(seconds), str(memory), token]
        try:
            subprocess.run(
                command, input=program.encode(), stdout=out, stderr=subprocess.DEVNULL, cwd=folder, env={},
                timeout=2 * seconds, start_new_session=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
        out.seek(0)
        return out.read() == token.encode()
