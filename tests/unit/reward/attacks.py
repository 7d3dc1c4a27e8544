"""Attempts of a program to reach what is not its own, by kind. They run in one process, with the names of `VICTIMS`.

An attempt raises OSError if the kernel refuses it. `call` is a system call by its number on x86_64.
"""

PREAMBLE = """
import ctypes, fcntl, json, mmap, os, pickle, resource, signal, socket, struct, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)

def call(number, *arguments):
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    answer = libc.syscall(ctypes.c_long(number), *values)
    if answer == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return answer

def refused(code):
    if code != 0:
        raise PermissionError(1, "the command did not run")
"""

DRIVER = """
given = json.loads(input())
found = {}
for name, code in given["attempts"].items():
    try:
        exec(code, globals() | given["victims"])
        found[name] = "done"
    except OSError as error:
        found[name] = error.errno
    except BaseException as error:
        found[name] = repr(error)
print(json.dumps(found))
"""

ORDINARY = {
    "files: read": "open(secret).read()",
    "files: list": "os.listdir(folder)",
    "files: create": "open(target, 'w')",
    "files: append": "open(secret, 'a')",
    "files: write over": "open(secret, 'r+')",
    "files: truncate by path": "os.truncate(secret, 1)",
    "files: truncate what is opened for reading": "open('own', 'w'); os.open('own', os.O_RDONLY | os.O_TRUNC)",
    "files: create a folder": "os.mkdir(target + '-folder')",
    "files: rename": "os.rename(secret, secret + '2'); os.rename(secret + '2', secret)",
    "files: take by a rename": "open('mine', 'w'); os.rename('mine', target + '-renamed')",
    "files: a named pipe": "os.mkfifo(target + '-pipe')",
    "files: /etc/passwd": "open('/etc/passwd').read()",
    "files: lock": "fcntl.flock(os.open('.', os.O_RDONLY), fcntl.LOCK_EX)",
    "files: copy all to disk": "call(162)",
    "metadata: chmod": "os.chmod(secret, 0o644)",
    "metadata: fchmod": "os.fchmod(os.open('mode', os.O_CREAT | os.O_RDWR), 0o600)",
    "metadata: fchmodat": "call(268, -100, secret.encode(), 0o644, 0)",
    "metadata: chown": "os.chown(secret, os.getuid(), os.getgid())",
    "metadata: lchown": "os.lchown(secret, os.getuid(), os.getgid())",
    "metadata: times": "os.utime(secret, (1, 1))",
    "metadata: attributes": "os.setxattr(secret, 'user.mark', b'1')",
    "links: symbolic link": "os.symlink(secret, 'link'); open('link').read()",
    "links: write through a link": "open(link, 'a')",
    "links: hard link": "os.link(secret, target + '-hard')",
    "links: the folder of another process": "os.readlink(f'/proc/{victim}/cwd')",
    "network: tcp": "socket.create_connection(('127.0.0.1', port))",
    "network: udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', port))",
    "network: tcp over ipv6": "socket.socket(socket.AF_INET6)",
    "network: listen": "socket.create_server(('127.0.0.1', 0))",
    "network: netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "network: datagram pair": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "network: packet pair": "socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)",
    "unix: connect": "socket.socket(socket.AF_UNIX).connect(stream)",
    "unix: datagram to an abstract name": (
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', abstract)"
    ),
    "unix: bind an abstract name": "socket.socketpair()[0]; socket.socket(socket.AF_UNIX).bind('\\0taken')",
    "unix: pass files": "one, other = socket.socketpair(); socket.send_fds(one, [b'x'], [0])",
    "processes: subprocess": "subprocess.run(['true'], check=True)",
    "processes: spawn": "os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)",
    "processes: shell": "refused(os.system('true'))",
    "processes: fork": "os.fork() or os._exit(0)",
    "processes: look at another": "call(434, victim, 0)",
    "processes: priority": "os.setpriority(os.PRIO_PROCESS, victim, 5)",
    "processes: limits of another": "resource.prlimit(victim, resource.RLIMIT_NOFILE, (64, 64))",
    "processes: memory of another": "call(310, victim, ctypes.byref((ctypes.c_long * 2)()), 0, None, 0, 0)",
    "processes: wait": "os.posix_spawn('/bin/true', ['true'], {}); os.wait()",
    "signals: kill": "os.kill(victim, 0)",
    "signals: to a thread": "call(234, victim, victim, 0)",
    "signals: tkill": "call(200, victim, 0)",
    "signals: by a descriptor": "call(424, call(434, victim, 0), 0, None, 0)",
    "signals: at input or output, F_SETOWN": "fcntl.fcntl(os.pipe()[0], 8, victim)",
    "signals: at input or output, F_SETOWN_EX": "fcntl.fcntl(os.pipe()[0], 15, struct.pack('ii', 1, victim))",
    "signals: at input or output, F_SETSIG": "fcntl.fcntl(os.pipe()[0], 10, 9)",
    "signals: at input or output, FIOSETOWN": (
        "fcntl.ioctl(socket.socketpair()[0], 0x8901, struct.pack('i', os.getpid()))"
    ),
    "signals: at input or output, SIOCSPGRP": (
        "fcntl.ioctl(socket.socketpair()[0], 0x8902, struct.pack('i', os.getpid()))"
    ),
    "signals: at a change of a folder": "fcntl.fcntl(os.open('.', os.O_RDONLY), 1026, 1)",
    "signals: outlive the parent": "call(157, 1, 0, 0, 0, 0)",
    "signals: a timer": "call(222, 0, None, ctypes.byref(ctypes.c_int()))",
    "memory: a SysV segment": "call(29, 0, 4096, 0o1600)",
    "memory: read a SysV segment": "call(30, segment, None, 0o10000)",
    "memory: list SysV segments": "call(31, 0, 14, ctypes.create_string_buffer(256))",
    "memory: SysV semaphores": "call(64, 0, 1, 0o1600)",
    "memory: SysV messages": "call(68, 0, 0o1600)",
    "memory: memfd": "os.memfd_create('m')",
    "memory: /dev/shm": "open('/dev/shm/megatron-rl-attack', 'w'); os.remove('/dev/shm/megatron-rl-attack')",
    "memory: larger pipes": "fcntl.fcntl(os.pipe()[0], 1031, 2**20)",
    "proc: command lines": "open(f'/proc/{victim}/cmdline').read()",
    "proc: list": "os.listdir('/proc')",
    "proc: own memory": "open('/proc/self/mem', 'r+b')",
    "proc: own environment": "open('/proc/self/environ').read()",
    "proc: around the root": "open('/proc/self/root' + secret).read()",
    "proc: the machine": "open('/sys/kernel/mm/transparent_hugepage/enabled').read()",
    "pickles: a command": "refused(pickle.loads(b'cposix\\nsystem\\n(Vtrue\\ntR.'))",
    "pickles: a file": "pickle.loads(b'cio\\nopen\\n(V' + secret.encode() + b'\\ntR.').read()",
    "scheduler: policy": "call(144, victim, 3, ctypes.byref(ctypes.c_int(0)))",
    "scheduler: attributes": "call(314, victim, struct.pack('IIQiIQQQ', 48, 3, 0, 0, 0, 0, 0, 0), 0)",
    "scheduler: processors": "os.sched_setaffinity(victim, os.sched_getaffinity(0))",
    "scheduler: processors of another": "os.sched_getaffinity(victim)",
    "scheduler: input and output": "call(251, 1, victim, (2 << 13) | 7)",
    "inotify: watch": "call(254, call(294, 0), folder.encode(), 2)",
    "keys: add": "call(248, b'user', b'attack', b'x', 1, -2)",
    "keys: read": "call(250, 0, -3, 0)",
    "kernel: io_uring": "call(425, 1, ctypes.create_string_buffer(120))",
    "kernel: another filter": "call(317, 2, 0, struct.pack('I', 0x7FFF0000))",
    "kernel: another ruleset": "call(444, None, 0, 1)",
    "kernel: personality": "call(135, 0x40000)",
}
"""Attempts that work outside the sandbox, for every user, so that a refusal is the sandbox's."""

PRIVILEGED = {
    "files: a device": "os.mknod('device', 0o20600, os.makedev(1, 1))",
    "files: by handle": "call(304, -100, struct.pack('ii8x', 8, 1), 0)",
    "metadata: give away": "os.chown('given', 12345, 12345)",
    "processes: trace": "call(101, 16, victim, 0, 0)",
    "processes: clone": "call(56, 17, 0, 0, 0, 0) or os._exit(0)",
    "processes: clone3": "call(435, struct.pack('11Q', *[0] * 4, 17, *[0] * 6), 88) or os._exit(0)",
    "processes: another user": "os.setuid(12345)",
    "processes: other groups": "os.setgroups([0])",
    "processes: capabilities": "call(126, struct.pack('<Ii', 0x20080522, 0), struct.pack('<6I', *[2**32 - 1] * 6))",
    "processes: a session": "os.setsid()",
    "processes: a higher limit": "call(302, 0, 9, struct.pack('QQ', 2**40, 2**40), None)",
    "processes: exec": "os.execv('/bin/true', ['true'])",
    "processes: exec of a file": "call(322, os.open('/bin/true', os.O_RDONLY), b'', None, None, 0x1000)",
    "signals: to all": "os.kill(-1, 9)",
    "signals: to the group": "os.kill(0, 9)",
    "signals: to the parent": "os.kill(os.getppid(), 9)",
    "signals: queued": "call(129, victim, 9, ctypes.create_string_buffer(128))",
    "memory: secret memory": "call(447, 0)",
    "memory: page faults": "call(323, 0)",
    "memory: pages of another": "call(440, -1, None, 0, 4, 0)",
    "memory: in the parent": "call(311, os.getppid(), None, 0, None, 0, 0)",
    "namespaces: unshare": "call(272, 0x10000000)",
    "namespaces: enter": "call(308, 0, 0)",
    "namespaces: a thread in a new one": "call(56, 0x20010000, 0, 0, 0, 0)",
    "namespaces: mount": "call(165, b'none', b'/tmp', b'tmpfs', 0, None)",
    "namespaces: root": "os.chroot('.')",
    "time: set the clock": "time.clock_settime(time.CLOCK_REALTIME, 0)",
    "time: set the time of day": "call(164, struct.pack('qq', 0, 0), None)",
    "time: slow the clock": "call(159, ctypes.create_string_buffer(256))",
    "inotify: all of a file system": "call(300, 0, 0)",
    "kernel: bpf": "call(321, 0, ctypes.create_string_buffer(128), 128)",
    "kernel: performance events": "call(298, ctypes.create_string_buffer(128), 0, -1, -1, 0)",
    "kernel: log": "call(103, 3, ctypes.create_string_buffer(64), 64)",
    "kernel: module": "call(175, None, 0, b'')",
    "kernel: reboot": "call(169, 0, 0, 0, None)",
    "kernel: ports": "call(172, 3)",
    "kernel: segments": "call(154, 0, None, 0)",
    "kernel: host name": "socket.sethostname('x')",
    "kernel: a call of the future": "call(900)",
}
"""Attempts that need rights, or that would harm the process or the machine outside the sandbox."""
