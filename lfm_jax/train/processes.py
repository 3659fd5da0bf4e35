"""What changes when a run has many processes: joining, agreeing, stopping together, each one's share of a batch.

Every function here also works in a run of one process, where it is trivial.

Dimensions: B rows, T time.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lfm_jax.sharding import check_divides, spec
from lfm_jax.train.launch import STOPPED, Launch
from lfm_jax.train.objective import BatchArray

HEARTBEAT_SECONDS = 20
"""A process that is silent for so long is lost, and the others end."""


def join(launch: Launch) -> None:
    """Makes this process one of those of its run; call before JAX is used.

    Raises:
      ValueError: no cluster is detected, or devices are asked for too late.
    """
    try:
        if launch.devices_per_process:
            jax.config.update("jax_num_cpu_devices", launch.devices_per_process)
        if launch.many:
            _silence_libraries()
            jax.distributed.initialize(
                launch.coordinator, launch.num_processes, launch.process_id,
                cluster_detection_method="deactivate" if launch.coordinator else None,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=2 * HEARTBEAT_SECONDS,
            )
            barrier("joined")  # Connects what the barriers to come use, while all are here; see `compiled_together`.
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"this process cannot join its run: {error}") from error


def leave(status: int) -> None:
    """Ends a process of many that failed; does nothing where the run ended well, or there is one process."""
    if not jax.distributed.is_initialized() or status in (0, STOPPED):
        return
    # The orderly end is a barrier that all must reach, and this one failed alone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def device_failed(error: BaseException) -> bool:
    """Whether devices or the way between them failed, as in all other processes when one is lost."""
    ours = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")  # They come again with the next start.
    return isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(ours)


def is_main() -> bool:
    """Whether this process writes the run's files and lines."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def compiled_together(program: Any) -> Any:
    """A jitted function that runs, the first time, when every process has compiled it.

    CPU devices that exchange something for the first time connect through Gloo, where a process gives up when another
    one comes more than 30 seconds after it. On a crowded machine compiling can take that much longer in one of them.
    The barrier goes over connections made in `join` and has no such limit.
    """
    if jax.process_count() == 1:
        return program
    ready = False

    def call(*args: Any) -> Any:
        nonlocal ready
        if not ready:
            program.lower(*args).compile()  # Kept: the call below does not compile again.
            barrier("compiled")
            ready = True
        return program(*args)

    return call


def all_agree(ok: bool) -> bool:
    """Whether `ok` holds in every process."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def agreed(number: float) -> float:
    """The first process's number, in every process."""
    if jax.process_count() == 1:
        return number
    return float(multihost_utils.broadcast_one_to_all(np.float64(number)))


def gathered(x: jax.Array) -> np.ndarray:
    """A whole array on the host, in every process."""
    return np.asarray(x if jax.process_count() == 1 else multihost_utils.process_allgather(x, tiled=True))


class BatchPlacer:
    """Brings this process's rows of a batch onto its devices, as its part of the whole batch.

    Over a mesh (`jax.set_mesh`) each array is split by its logical axes; without one it lies on one device.

    Raises:
      ValueError: B in micro_batches, or T, does not divide over the mesh.
    """

    def __init__(self, arrays: Mapping[str, BatchArray], B: int, T: int, micro_batches: int = 1):
        self._shapes = {name: array.shape(B, T) for name, array in arrays.items()}
        self._shardings: dict[str, NamedSharding] = {}
        self._whole, self._rows = B, np.arange(B)
        layout = spec("batch")
        if layout is not None:
            mesh = jax.sharding.get_mesh()
            check_divides(B, T, micro_batches, mesh)
            for name, array in arrays.items():
                self._shardings[name] = NamedSharding(mesh, spec(*array.logical) or P())
            mine = NamedSharding(mesh, layout).addressable_devices_indices_map((B,)).values()
            self._rows = np.unique(np.concatenate([np.arange(B)[index[0]] for index in mine if index is not None]))

    @property
    def rows(self) -> np.ndarray | None:
        """Sorted row numbers of the whole batch that this process needs; None for all."""
        return None if len(self._rows) == self._whole else self._rows

    def local(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """This process's rows of a whole batch."""
        return {key: x[self._rows] for key, x in batch.items()}

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The whole batch as global arrays, from this process's rows of each."""
        return {name: self._place(name, x) for name, x in batch.items()}

    def _place(self, name: str, x: np.ndarray) -> jax.Array:
        if not self._shardings:
            return jax.numpy.asarray(x)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            # A device's rows are neighbours in the batch, hence in this process's share too.
            start, stop, _ = index[0].indices(self._whole)
            first = int(np.searchsorted(self._rows, start))
            return x[first : first + stop - start, *index[1:]]

        return jax.make_array_from_callback(self._shapes[name], self._shardings[name], part)


class StopRequest:
    """Whether the run shall stop, the same answer at the same step in every process.

    SIGTERM or SIGINT to any process asks for it; a second one acts as usual.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._previous: dict[int, Any] = {}
        self._asked = 0

    def __enter__(self) -> StopRequest:
        # Of many processes JAX itself watches SIGTERM, in C++, where a Python handler would replace it.
        numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def due(self) -> bool:
        """Call once a step, in every process."""
        # A count of its own, not the step, which a rollback turns back.
        self._asked += 1
        if jax.process_count() == 1:
            return bool(self._received)
        return multihost_utils.reached_preemption_sync_point(self._asked)

    def _on_signal(self, number: int, frame: Any) -> None:
        del frame
        self._received.append(number)
        self._restore()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


def _silence_libraries() -> None:
    """Keeps what libraries print to standard output (Gloo does) out of ours: only Python goes on writing there."""
    sys.stdout.flush()
    ours = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    sys.stdout = os.fdopen(ours, "w", buffering=1, encoding=sys.stdout.encoding)
