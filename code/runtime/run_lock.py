"""Which process trains a run: a file in the folder of the run. Standard library only."""

import os
import socket

from runtime.files import process_stat, read_json

MARK = 'running.json'  # in the folder of a run that trains: by whom


def trained_by(folder):
    """The number of the process of this machine, another than this, that trains the run of a folder; or None."""
    mark = read_json(folder / MARK)
    here = mark.get('host') == socket.gethostname() and mark.get('pid') != os.getpid()
    return mark['pid'] if here and mark.get('started') is not None and is_there(mark) else None


def is_there(mark):
    """Whether the process of this machine that wrote the mark still runs."""
    return started(mark.get('pid', 0)) == mark.get('started')


def started(pid):
    """When a process of this machine began, in the system's ticks: a number that a later one of the same pid has not;
    None where there is none."""
    if process_stat('self'):
        stat = process_stat(pid)
        return stat[19] if stat else None
    if os.name == 'nt':  # os.kill would end it
        return ''
    try:  # not Linux: whether it is there is all that can be told
        os.kill(pid, 0)
    except OSError:
        return None
    return ''


def mark_of_this_process():
    return {'host': socket.gethostname(), 'pid': os.getpid(), 'started': started(os.getpid())}
