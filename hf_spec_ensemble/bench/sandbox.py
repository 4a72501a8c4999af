"""
Runs model-written Python in a subprocess with limits, and says whether it ran to its end.

Three guards: limits of the operating system on time, memory and file size; on Linux a filter of system calls, with
which the kernel refuses to start processes or threads, to write or remove files, to open connections and to send
signals; and an audit hook of Python, which refuses the same and some more. `enforced` tries whether the filter holds.
Where it does not, the hook is all there is. That stops accidents and not attackers: C functions without an audit event
get past it. Either way the program may read what the user may read.
"""

import importlib.util
import secrets
import subprocess
import sys
import tempfile
from functools import cache

from .seccomp import filter_for


# What runs in the subprocess, and sets the limits before the program's first line. What the program prints goes
# nowhere; a token that it does not know, written at the end, says that it did not just leave with exit code 0.
LIMITS = """
import os, resource, sys
seconds, memory, token, calls = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], bytes.fromhex(sys.argv[4])
program = sys.stdin.read()
sys.argv = ["program"]
report, sys.stdout, sys.stderr = sys.stdout, open(os.devnull, "w"), open(os.devnull, "w")
for limit, value in (
    (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 4096),
    (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(limit, (value, value))

def set_filter():
    import ctypes, struct
    code = ctypes.create_string_buffer(calls, len(calls))
    fprog = ctypes.create_string_buffer(struct.pack("@HP", len(calls) // 8, ctypes.addressof(code)))
    number = ctypes.c_ulong
    prctl = ctypes.CDLL(None).prctl
    prctl(38, number(1), number(0), number(0), number(0))  # PR_SET_NO_NEW_PRIVS
    prctl(22, number(2), fprog)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER

if calls:
    try:
        set_filter()
    except (ImportError, OSError, AttributeError):
        pass  # `enforced` says so
"""

HOOK = """
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
"""

RUN = """
exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
report.write(token)
report.flush()
"""

# Runs to its end only if the kernel refuses all of this.
PROBE = """
import os, socket

def is_refused(call, *arguments):
    try:
        call(*arguments)
    except PermissionError:
        return
    os._exit(1)  # of a child too

is_refused(os.fork)
is_refused(open, "probe", "w")
is_refused(os.mkdir, "probe")
is_refused(socket.socket)
is_refused(os.kill, os.getpid(), 0)
"""


def can_run() -> bool:
    """Whether this operating system has the limits that `runs` sets."""
    return importlib.util.find_spec("resource") is not None


@cache
def enforced() -> bool:
    """Whether the kernel holds programs to what `runs` says: found by trying, once in a process."""
    return can_run() and _run(PROBE, LIMITS + RUN, filter_for())


def runs(program: str, seconds: int = 10, memory: int = 1 << 30) -> bool:
    """
    Whether a program runs to its end without an error, within its limits.

    Attempts to start processes, to write or remove files, or to open connections fail with a `PermissionError`: by the
    kernel where `enforced()`, and else by Python, as far as that notices them.

    Args:
        program (`str`): Python source.
        seconds (`int`): Of processor time, and twice as many on the clock.
        memory (`int`): Bytes of address space.

    Returns:
        `bool`: `False` after any error or exit, beyond a limit, and if `program` is not valid text.

    Example:

    >>> from hf_spec_ensemble.bench.sandbox import runs

    >>> runs("assert 1 + 1 == 2"), runs("assert 1 + 1 == 3"), runs("raise SystemExit(0)")
    (True, False, False)
    """
    return _run(program, LIMITS + HOOK + RUN, filter_for() if enforced() else None, seconds, memory)


def _run(program: str, runner: str, calls: bytes | None, seconds: int = 10, memory: int = 1 << 30) -> bool:
    try:
        source = program.encode()
    except UnicodeEncodeError:
        return False
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out:  # a file: no pipe to flood
        command = [sys.executable, "-I", "-B", "-c", runner, str(seconds), str(memory), token, (calls or b"").hex()]
        try:
            subprocess.run(
                command, input=source, stdout=out, stderr=subprocess.DEVNULL, cwd=folder, env={},
                timeout=2 * seconds, start_new_session=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
        out.seek(0)
        return out.read() == token.encode()
