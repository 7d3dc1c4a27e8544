"""The system calls that a candidate may use: an allow-list, enforced by seccomp. Standard library only.

The list is what Python programs that compute need: files, memory, threads, pipes, clocks and signals to themselves.
Some calls are permitted for certain arguments only (`_rules`). All other calls, including those that future kernels
add, fail with EPERM: sockets, new processes, other processes, file attributes, shared memory, watches on folders.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from dataclasses import dataclass

# linux/audit.h names the architecture of a call; the numbers are those of arch/x86/entry/syscalls/syscall_64.tbl and of
# include/uapi/asm-generic/unistd.h. The filter for aarch64 has not been run.
_ARCHITECTURES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (0xC000003E, {
        "read": 0, "write": 1, "close": 3, "close_range": 436, "fstat": 5, "lseek": 8, "pread64": 17, "pwrite64": 18,
        "readv": 19, "writev": 20, "preadv": 295, "pwritev": 296, "preadv2": 327, "pwritev2": 328, "stat": 4,
        "lstat": 6, "readlink": 89, "readlinkat": 267, "statfs": 137, "fstatfs": 138,
        "newfstatat": 262, "statx": 332, "access": 21, "faccessat": 269, "faccessat2": 439,
        "ftruncate": 77, "fsync": 74, "fdatasync": 75, "rename": 82, "renameat": 264, "renameat2": 316, "mkdir": 83,
        "mkdirat": 258, "rmdir": 84, "unlink": 87, "unlinkat": 263, "getdents64": 217, "getcwd": 79, "chdir": 80,
        "fchdir": 81, "umask": 95, "sendfile": 40, "copy_file_range": 326,
        "dup": 32, "dup2": 33, "dup3": 292, "pipe": 22, "pipe2": 293, "poll": 7, "ppoll": 271, "select": 23,
        "pselect6": 270, "epoll_create": 213, "epoll_create1": 291, "epoll_ctl": 233, "epoll_wait": 232,
        "epoll_pwait": 281, "eventfd2": 290, "sendto": 44, "recvfrom": 45, "getsockname": 51, "getpeername": 52,
        "shutdown": 48,
        "mmap": 9, "munmap": 11, "mremap": 25, "mprotect": 10, "madvise": 28, "msync": 26, "brk": 12,
        "membarrier": 324, "futex": 202, "set_robust_list": 273, "rseq": 334, "set_tid_address": 218, "gettid": 186,
        "sched_yield": 24, "getcpu": 309,
        "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "rt_sigpending": 127, "rt_sigsuspend": 130,
        "rt_sigtimedwait": 128, "sigaltstack": 131, "restart_syscall": 219, "pause": 34, "alarm": 37, "getitimer": 36,
        "setitimer": 38,
        "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "nanosleep": 35, "gettimeofday": 96,
        "time": 201, "times": 100,
        "getpid": 39, "getppid": 110, "getpgrp": 111, "getuid": 102, "geteuid": 107, "getgid": 104, "getegid": 108,
        "getresuid": 118, "getresgid": 120, "getgroups": 115, "uname": 63, "sysinfo": 99, "getrusage": 98,
        "getrlimit": 97, "getrandom": 318, "exit": 60, "exit_group": 231,
        "openat": 257, "fcntl": 72, "ioctl": 16, "prctl": 157, "socketpair": 53, "clone": 56, "clone3": 435,
        "kill": 62, "tgkill": 234, "prlimit64": 302, "sched_getaffinity": 204,
    }),
    "aarch64": (0xC00000B7, {
        "read": 63, "write": 64, "close": 57, "close_range": 436, "fstat": 80, "lseek": 62, "pread64": 67,
        "pwrite64": 68, "readv": 65, "writev": 66, "preadv": 69, "pwritev": 70, "preadv2": 286, "pwritev2": 287,
        "readlinkat": 78, "statfs": 43,
        "fstatfs": 44, "newfstatat": 79, "statx": 291, "faccessat": 48, "faccessat2": 439, "ftruncate": 46, "fsync": 82,
        "fdatasync": 83, "renameat": 38, "renameat2": 276, "mkdirat": 34, "unlinkat": 35, "getdents64": 61,
        "getcwd": 17, "chdir": 49, "fchdir": 50, "umask": 166, "sendfile": 71, "copy_file_range": 285,
        "dup": 23, "dup3": 24, "pipe2": 59, "ppoll": 73, "pselect6": 72, "epoll_create1": 20, "epoll_ctl": 21,
        "epoll_pwait": 22, "eventfd2": 19, "sendto": 206, "recvfrom": 207, "getsockname": 204, "getpeername": 205,
        "shutdown": 210,
        "mmap": 222, "munmap": 215, "mremap": 216, "mprotect": 226, "madvise": 233, "msync": 227, "brk": 214,
        "membarrier": 283, "futex": 98, "set_robust_list": 99, "rseq": 293, "set_tid_address": 96, "gettid": 178,
        "sched_yield": 124, "getcpu": 168,
        "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "rt_sigpending": 136, "rt_sigsuspend": 133,
        "rt_sigtimedwait": 137, "sigaltstack": 132, "restart_syscall": 128, "getitimer": 102, "setitimer": 103,
        "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "nanosleep": 101, "gettimeofday": 169,
        "times": 153,
        "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "getresuid": 148,
        "getresgid": 150, "getgroups": 158, "uname": 160, "sysinfo": 179, "getrusage": 165, "getrlimit": 163,
        "getrandom": 278, "exit": 93, "exit_group": 94,
        "openat": 56, "fcntl": 25, "ioctl": 29, "prctl": 167, "socketpair": 199, "clone": 220, "clone3": 435,
        "kill": 129, "tgkill": 131, "prlimit64": 261, "sched_getaffinity": 123,
    }),
}  # fmt: skip


@dataclass(frozen=True)
class _Rule:
    """A call is permitted only if the lower half of an argument, masked, has one of these values."""

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF


_ACCESS_MODE, _TRUNCATE = os.O_ACCMODE, os.O_TRUNC
_THREAD, _NAMESPACES = 0x00010000, 0x7E020000
_AF_UNIX, _STREAM, _SOCKET_TYPE = 1, 1, 0xF
_DESCRIPTORS = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
_LOCKS = (5, 6, 7)  # F_GETLK, F_SETLK, F_SETLKW
_TERMINAL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_NAMES = (15, 16, 0x53564D41)  # PR_SET_NAME, PR_GET_NAME, PR_SET_VMA, by which glibc names memory


def _rules() -> dict[str, tuple[_Rule, ...]]:
    """Returns the calls that only some arguments permit, for this process."""
    own, self = _Rule(0, (os.getpid(),)), _Rule(0, (0, os.getpid()))
    reads_or_writes = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | _TRUNCATE, os.O_RDWR | _TRUNCATE)
    return {
        # Landlock of version 1 and 2 lets a file that is opened for reading be truncated.
        "openat": (_Rule(2, reads_or_writes, _ACCESS_MODE | _TRUNCATE),),
        # F_SETOWN and FIOSETOWN would direct signals at any process of the user.
        "fcntl": (_Rule(1, _DESCRIPTORS + _LOCKS),),
        "ioctl": (_Rule(1, _TERMINAL),),
        "prctl": (_Rule(0, _NAMES),),
        # asyncio needs a connected pair. Unlike a datagram socket, such a pair reaches no other address.
        "socketpair": (_Rule(0, (_AF_UNIX,)), _Rule(1, (_STREAM,), _SOCKET_TYPE)),
        "clone": (_Rule(0, (_THREAD,), _THREAD | _NAMESPACES),),
        "kill": (own,),
        "tgkill": (own,),
        "prlimit64": (self,),
        "sched_getaffinity": (self,),
    }


# The instructions of classic BPF (linux/filter.h) and the answers of seccomp (linux/seccomp.h).
_Instruction = tuple[int, int, int, int]
_LOAD, _AND, _JUMP_EQUAL, _JUMP_GREATER, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NOT_PERMITTED, _NO_SUCH_CALL = 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16


def filter_system_calls(libc: ctypes.CDLL) -> bool:
    """Restricts the system calls of this process and its threads for good. Returns whether the kernel agreed."""
    if platform.machine() not in _ARCHITECTURES:
        return False
    program = _program(*_ARCHITECTURES[platform.machine()])
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))
    pointer = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code))
    taken: int = libc.prctl(22, 2, pointer, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    return taken == 0


def _program(architecture: int, numbers: dict[str, int]) -> list[_Instruction]:
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_GREATER, 0, 1, 0x40000000),  # x32 has the same calls under other numbers
        (_RETURN, 0, 0, _KILL),
    ]
    rules = _rules()
    for name, number in numbers.items():
        # Without clone3, glibc falls back to clone, whose flags the filter can read.
        answer = _NO_SUCH_CALL if name == "clone3" else _ALLOW
        body = [line for rule in rules.get(name, ()) for line in _check(rule)]
        body.append((_RETURN, 0, 0, answer))
        program += [(_JUMP_EQUAL, 0, len(body), number), *body]
    return [*program, (_RETURN, 0, 0, _NOT_PERMITTED)]


def _check(rule: _Rule) -> list[_Instruction]:
    """Returns the instructions that refuse the call unless the rule holds, and otherwise go on."""
    last = len(rule.values)
    tests = [(_JUMP_EQUAL, last - index, 0, value) for index, value in enumerate(rule.values)]
    load = [(_LOAD, 0, 0, _ARGUMENTS + 8 * rule.argument), (_AND, 0, 0, rule.mask)]
    return [*load, *tests, (_RETURN, 0, 0, _NOT_PERMITTED)]
