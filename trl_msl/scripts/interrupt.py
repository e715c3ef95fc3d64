# SPDX-License-Identifier: Apache-2.0
"""Training in a command, which Ctrl-C stops with a checkpoint."""

import logging
import os
import signal

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import Trainer, TrainerCallback

from .loading import checkpoint_to_resume


logger = logging.getLogger(__name__)


def train(trainer: Trainer) -> None:
    """
    Train, from the checkpoint that the config names.

    Raises:
        `KeyboardInterrupt`: at the first Ctrl-C, once the current step is done and its checkpoint complete; at the
            second, at once.
    """
    callback = StopAtInterrupt()
    trainer.add_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=checkpoint_to_resume(trainer.args))
    finally:
        signal.signal(signal.SIGINT, callback.handler_before)
        trainer.remove_callback(callback)


class StopAtInterrupt(TrainerCallback):
    """Handles SIGINT: the training ends after the current step, with a checkpoint and a `KeyboardInterrupt`."""

    def __init__(self):
        self.process, self.is_interrupted, self.is_stopping = os.getpid(), False, False
        self.handler_before = signal.getsignal(signal.SIGINT)
        if self.handler_before != signal.SIG_IGN:  # as of a job in the background of a shell script
            signal.signal(signal.SIGINT, self.interrupt)

    def interrupt(self, signum, frame):
        if os.getpid() != self.process:  # a data loader's worker, which the trainer still needs
            return
        self.is_interrupted = True
        signal.signal(signal.SIGINT, self.handler_before)
        logger.warning("Stopping after this step, with a checkpoint. Press Ctrl-C again to stop at once.")

    def on_step_end(self, args, state, control, **kwargs):
        self.is_stopping = self.is_interrupted
        if args.world_size > 1:  # one process may have been interrupted a step before another
            self.is_stopping = bool(reduce(torch.tensor(int(self.is_interrupted), device=args.device), "sum"))
        if self.is_stopping:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self.is_stopping:
            PartialState().wait_for_everyone()  # a process that left would take the others with it while they save
            place = f"step {state.global_step} of {state.max_steps}"
            raise KeyboardInterrupt(f"stopped at {place}; continue with --resume_from_checkpoint last")
