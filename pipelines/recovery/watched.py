"""What Ray's controller and the workers of a training do so that the watchdog hears them.

The controller and the main thread of every worker import this before anything heavy, so it stays light.
"""

from functools import partial

import ray.train

from pipelines.compat.ray import StartPhases
from pipelines.io.pulse import Phase, begin, mark
from pipelines.recovery.preemption import listen
from pipelines.recovery.stall import CONTROLLER
from pipelines.recovery.stuck_processes import show_stacks_on_signal


def start_worker(mailbox: str) -> None:
    """First of all in a worker, in its main thread: a SIGTERM is a notice, and the process beats."""
    listen()
    show_stacks_on_signal()
    begin(mailbox, f"worker {ray.train.get_context().get_world_rank()}")


def _begin_controller(mailbox: str) -> None:
    begin(mailbox, CONTROLLER)
    mark(Phase.ROOM)


def watched_controller(mailbox: str) -> StartPhases:
    """A callback that makes Ray's controller beat, and say which part of a start it is at."""
    return StartPhases(
        began=partial(_begin_controller, mailbox),
        room=partial(mark, Phase.ROOM),
        placing=partial(mark, Phase.PLACE),
        starting=partial(mark, Phase.START),
        running=partial(mark, Phase.RUNNING),
    )
