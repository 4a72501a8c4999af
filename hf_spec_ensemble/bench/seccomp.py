"""
A filter of system calls for Linux (seccomp), as bytes: a process with it can compute and read files, and nothing else.

Each call that is not in `ALLOWED` fails with "operation not permitted". So a call that is new to the kernel, or missing
here, is refused. Setting the filter needs no rights. It holds for any user, including root, and cannot be removed.
"""

import errno
import os
import platform
import struct
import sys


# By machine: its number for the kernel, and of each call that is allowed its number. aarch64 has no old forms of calls.
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOWED = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
        "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
        "pread64": 17, "readv": 19, "access": 21, "select": 23, "sched_yield": 24, "mremap": 25, "madvise": 28,
        "nanosleep": 35, "getpid": 39, "exit": 60, "uname": 63, "getdents": 78, "getcwd": 79, "readlink": 89,
        "gettimeofday": 96, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107,
        "getegid": 108, "getppid": 110, "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202,
        "sched_getaffinity": 204, "getdents64": 217, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
        "exit_group": 231, "newfstatat": 262, "readlinkat": 267, "faccessat": 269, "pselect6": 270, "ppoll": 271,
        "getrandom": 318, "membarrier": 324, "statx": 332, "faccessat2": 439,
    },
    "aarch64": {
        "getcwd": 17, "faccessat": 48, "close": 57, "getdents64": 61, "lseek": 62, "read": 63, "write": 64, "readv": 65,
        "pread64": 67, "pselect6": 72, "ppoll": 73, "readlinkat": 78, "newfstatat": 79, "fstat": 80, "exit": 93,
        "exit_group": 94, "futex": 98, "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114,
        "clock_nanosleep": 115, "sched_getaffinity": 123, "sched_yield": 124, "sigaltstack": 132, "rt_sigaction": 134,
        "rt_sigprocmask": 135, "rt_sigreturn": 139, "times": 153, "uname": 160, "getrusage": 165, "gettimeofday": 169,
        "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178,
        "sysinfo": 179, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233,
        "getrandom": 278, "membarrier": 283, "statx": 291, "faccessat2": 439,
    },
}  # fmt: skip
# Opening is allowed for reading: by machine and number, which argument holds the flags.
OPENING = {"x86_64": {2: 1, 257: 2}, "aarch64": {56: 2}}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# Of struct seccomp_data: where the call's number, the machine and the first argument are. Of BPF: instructions.
NUMBER, MACHINE, ARGUMENTS = 0, 4, 16
LOAD, IS, HAS_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000


def filter_for(machine: str = platform.machine()) -> bytes | None:
    """
    The program for `prctl(PR_SET_SECCOMP, ...)`: instructions of eight bytes. `None` where the kernel's calls are not
    known.

    >>> from hf_spec_ensemble.bench.seccomp import filter_for

    >>> filter_for("abacus") is None
    True
    """
    if machine not in MACHINES or sys.platform != "linux" or struct.calcsize("P") != 8:
        return None
    code = [(LOAD, 0, 0, MACHINE), (IS, 1, 0, MACHINES[machine]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    for number in ALLOWED[machine].values():
        code += [(IS, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    for number, argument in OPENING[machine].items():
        code += [
            (IS, 0, 4, number),
            (LOAD, 0, 0, ARGUMENTS + 8 * argument),  # the lower half, on machines of little-endian order
            (HAS_BIT, 0, 1, WRITING),
            (RETURN, 0, 0, REFUSE),
            (RETURN, 0, 0, ALLOW),
        ]
    code.append((RETURN, 0, 0, REFUSE))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)
