"""Python that has torch imported already: half of what the tests' commands take is the start of their interpreters.

    python warm.py serve SOCKET
    python warm.py run [-u] SCRIPT|-m MODULE ...      as `python ...` would, by the server that WARM_PYTHON names

Who asks (`Process`) gets a new process, forked from the server, that runs a script as `python SCRIPT ...` would: with
its own number, folder, environment, files 0 to 2 and group of processes; of this project it has imported nothing. Only
what Python and torch read when they start (FIXED), limits and ignored signals are the server's. `run` hands on the
signals that it gets, and ends as the other does.
"""

import array
import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

WARM = 'WARM_PYTHON'  # the variable that names the socket
AS_PYTHON = 'WARM_EXECUTABLE'  # where it is set, what scripts take for the interpreter (`python`)
FIXED = ('PYTHON', 'LD_', 'OMP_', 'MKL_', 'MALLOC_', 'CUDA_', 'LANG', 'LC_')  # beginnings of names


def usable(env):
    """Whether a process in this environment may come from the server."""
    names = {name for name in {*env, *os.environ} if name.startswith(FIXED)}
    return all(env.get(name) == os.environ.get(name) for name in names)


@functools.cache
def started():
    """Start a server that lives as long as this process, and name it in the environment. Returns the path of a program
    to call in place of python."""
    folder = tempfile.mkdtemp(prefix='warm')
    command = [sys.executable, __file__, 'serve', f'{folder}/socket']
    server = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    server.stdout.readline()
    os.environ[WARM] = f'{folder}/socket'
    atexit.register(lambda: (server.kill(), shutil.rmtree(folder)))
    with open(f'{folder}/python', 'w') as file:
        file.write(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" run "$@"\n')
    os.chmod(f'{folder}/python', 0o755)
    return f'{folder}/python'


class Process:
    """`python *argv`, begun. files: the numbers of its standard ones. pid: its number, and that of its group;
    returncode: minus the signal that ended it; None while it runs."""

    def __init__(self, argv, cwd, env, files):
        self.to, self.returncode = socket.socket(socket.AF_UNIX), None
        self.to.connect(os.environ[WARM])
        text = json.dumps({'argv': [*map(os.fspath, argv)], 'cwd': str(cwd), 'env': dict(env)}).encode()
        numbers = array.array('i', files)
        self.to.sendmsg([len(text).to_bytes(4, 'big')], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])
        self.to.sendall(text)
        self.pid = int.from_bytes(received(self.to, 4), 'big')

    def poll(self):
        if self.returncode is None and select.select([self.to], [], [], 0)[0]:
            self.returncode = int.from_bytes(received(self.to, 4), 'big', signed=True)
            self.to.close()
        return self.returncode

    def wait(self, timeout=None):
        """Its exit code. Raises TimeoutError, the process killed."""
        if self.returncode is None and not select.select([self.to], [], [], timeout)[0]:
            self.to.close()
            raise TimeoutError(f'{timeout} s')
        return self.poll()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


def received(of, count):
    data = b''
    while len(data) < count:
        part = of.recv(count - len(data))
        if not part:
            raise ConnectionError('the warm Python has gone')
        data += part
    return data


def serve(path):
    for name in ('torch', 'torchvision', 'torch.utils.tensorboard', 'torch._dynamo', 'sklearn.cluster', 'fire'):
        __import__(name)
    import matplotlib.figure  # noqa: F401
    import PIL.Image

    PIL.Image.init()
    sys.dont_write_bytecode, sys.pycache_prefix = False, os.path.dirname(path)  # the project's, compiled once
    gc.freeze()  # at their ends, the processes leave alone what they have in common
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who watches over a child is forked as well, and nobody's concern
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(path)
        door.listen(16)
        print('ready', flush=True)
        while True:
            visitor, _ = door.accept()
            if not os.fork():
                door.close()
                watch_over(visitor)
            visitor.close()


def watch_over(visitor):
    """Start what the visitor asks for, tell its number, wait, tell how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, control, _, _ = visitor.recvmsg(4, socket.CMSG_SPACE(3 * 4))
    files = array.array('i')
    files.frombytes(control[0][2][: 3 * files.itemsize])
    asked = json.loads(received(visitor, int.from_bytes(length, 'big')))
    pid = os.fork()
    if not pid:
        visitor.close()
        become(asked, files)
    visitor.sendall(pid.to_bytes(4, 'big'))
    done = 0
    while not done:
        done, status = os.waitpid(pid, os.WNOHANG)
        if not done and select.select([visitor], [], [], 0.01)[0]:
            os.kill(pid, signal.SIGKILL)  # who asked has gone
            done, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    with contextlib.suppress(BrokenPipeError):
        visitor.sendall(code.to_bytes(4, 'big', signed=True))
    os._exit(0)


def become(asked, files):
    """The script, from here on."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
    for file in files:
        if file > 2:
            os.close(file)
    os.chdir(asked['cwd'])
    os.environ.clear()
    os.environ.update(asked['env'])
    if 'TZ' in os.environ:
        time.tzset()
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, 'w')
    sys.stderr = os.fdopen(2, 'w', buffering=1, errors='backslashreplace')
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.executable = os.environ.get(AS_PYTHON, sys.executable)
    sys.argv[:] = asked['argv']
    try:
        if sys.argv[0] == '-m':
            del sys.argv[0]
            sys.path[0] = os.getcwd()
            runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
            runpy.run_path(sys.argv[0], run_name='__main__')
        code = 0
    except SystemExit as end:
        code = end.code or 0
    if not isinstance(code, int):
        sys.exit(code)
    threading._shutdown()  # what Python does at its end, but for taking all modules apart
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


if __name__ == '__main__':
    if sys.argv[1] == 'serve':
        serve(sys.argv[2])
    words = sys.argv[2:]
    process = Process(words[words[0] == '-u' :], os.getcwd(), os.environ, [0, 1, 2])
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: process.send_signal(number))
    code = process.wait()
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
