"""What a process has only one of, and whose turn it is to use it.

Pyro and NumPyro keep their stack of handlers once per process, Pyro its parameter store and torch its default dtype and
generators as well. So threads take turns: every run of a program, traced or not, is inside `TURN`, and between two runs
of one thread another may have its own. What is computed outside of it sees nothing that the others change.
"""

from __future__ import annotations

import threading

TURN = threading.RLock()
"""One lock for all of it, as two could be taken in two orders; a thread that has it may take it again."""
