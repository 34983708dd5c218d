"""Engines of `casp bench` in threads of this process, which imports nothing anew."""

import multiprocessing
import os
from multiprocessing.connection import Connection
from threading import Thread


class Threads:
    """Stands in for the module multiprocessing and for a context of it."""

    Pipe = staticmethod(multiprocessing.Pipe)

    class Process(Thread):
        """A thread with an end of the pipe of its own, as a process has it."""

        def __init__(self, target, args):
            end, *rest = args
            super().__init__(target=target, args=(Connection(os.dup(end.fileno())), *rest))

        def terminate(self):
            """Do nothing: the thread ends where the pipe does."""

    @classmethod
    def get_context(cls, method):
        return cls
