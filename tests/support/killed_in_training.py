"""Runs a script as it is, but process 1 dies after the third step of training: no error, no clean-up."""

import os
import runpy
import signal
import sys

from transformers import Trainer, TrainerCallback


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


initialize = Trainer.__init__


def initialize_with_kill(self, *args, **kwargs):
    initialize(self, *args, **kwargs)
    self.add_callback(Kill())


if __name__ == "__main__":
    Trainer.__init__ = initialize_with_kill
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
