"""Runs a command and writes down what it used: exit code, seconds of processor time, peak memory as the system has it.

A process of its own, because what a child takes is told together with what its parent had taken when it was begun.
Started as `python used.py FILE COMMAND…`; FILE becomes a JSON list of the three.
"""

import json
import os
import subprocess
import sys

if __name__ == "__main__":
    process = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    with open(sys.argv[1], "w") as fp:
        json.dump([process.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss], fp)
