"""Which process trains a run: a file in the folder of the run. Standard library only."""

import os
import socket

from runtime.files import proc_stat, read_json

LOCK_FILE = 'running.json'  # in the folder of a run that trains: by whom


def running_pid(folder):
    """The number of the process of this machine, another than this, that trains the run of a folder; or None."""
    mark = read_json(folder / LOCK_FILE)
    here = mark.get('host') == socket.gethostname() and mark.get('pid') != os.getpid()
    return mark['pid'] if here and mark.get('started') is not None and is_alive(mark) else None


def is_alive(mark):
    """Whether the process of this machine that wrote the mark still runs."""
    return process_start_time(mark.get('pid', 0)) == mark.get('started')


def process_start_time(pid):
    """When a process of this machine began, in the system's ticks: a number that a later one of the same pid has not;
    None where there is none."""
    if proc_stat('self'):
        stat = proc_stat(pid)
        return stat[19] if stat else None
    if os.name == 'nt':  # os.kill would end it
        return ''
    try:  # not Linux: whether it is there is all that can be told
        os.kill(pid, 0)
    except OSError:
        return None
    return ''


def lock_content():
    return {'host': socket.gethostname(), 'pid': os.getpid(), 'started': process_start_time(os.getpid())}
