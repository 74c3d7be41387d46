"""The lock file in a run's folder, which names the process that trains it. Standard library only."""

import os
import socket

from runtime.files import proc_stat, read_json

LOCK_FILE = 'running.json'


def running_pid(folder):
    """Return the pid of another process on this machine that trains the run, or None."""
    lock = read_json(folder / LOCK_FILE)
    is_other_process = lock.get('host') == socket.gethostname() and lock.get('pid') != os.getpid()
    return lock['pid'] if is_other_process and lock.get('started') is not None and is_alive(lock) else None


def is_alive(mark):
    """Whether the process on this machine that wrote the lock file still runs. mark: its content."""
    return process_start_time(mark.get('pid', 0)) == mark.get('started')


def process_start_time(pid):
    """Return the start time of a process in clock ticks, which tells reused pids apart; None if it does not exist."""
    if proc_stat('self'):
        stat = proc_stat(pid)
        return stat[19] if stat else None
    if os.name == 'nt':  # os.kill would end it
        import ctypes

        query, still_active, code = 0x1000, 259, ctypes.c_ulong()  # PROCESS_QUERY_LIMITED_INFORMATION, STILL_ACTIVE
        handle = ctypes.windll.kernel32.OpenProcess(query, False, pid)
        found = handle and ctypes.windll.kernel32.GetExitCodeProcess(handle, ctypes.byref(code))
        ctypes.windll.kernel32.CloseHandle(handle)
        return '' if found and code.value == still_active else None
    try:  # not Linux: only check that it exists
        os.kill(pid, 0)
    except OSError:
        return None
    return ''


def lock_content():
    return {'host': socket.gethostname(), 'pid': os.getpid(), 'started': process_start_time(os.getpid())}
