"""oneDNN and torch keep few compiled products where a text goes through experts, unless the user says otherwise."""

import os
import subprocess
import sys

SHOW = "sh -c 'echo $LRU_CACHE_CAPACITY'"
ASK = (
    "import os, subprocess; from moesaic.core.primitives import keep_few; keep_few(); "
    f'print(subprocess.getoutput("{SHOW}"), subprocess.run("{SHOW}", shell=True, capture_output=True, text=True, '
    "env=dict(os.environ)).stdout.strip() or None)"
)


def said(**environment):
    return subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, env={**os.environ, **environment}).stdout


def test_the_process_itself_sees_it_and_those_with_pythons_environment_do_not():
    assert said().split() == ["32", "None"]


def test_the_user_has_the_last_word():
    assert said(LRU_CACHE_CAPACITY="7").split() == ["7", "7"]
