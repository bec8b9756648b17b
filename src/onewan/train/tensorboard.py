"""Writes a run's events as TensorBoard curves."""

# TensorBoard's protocol buffers have no types.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import io
import os
import socket
import time
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from onewan.runs.events import Event, Sampled, Saved, StepDone, Validated
from onewan.train.curves import curve_values, frame_strip

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

_HISTOGRAM_BINS = np.linspace(0, 1, 51)
"""Edges of the bins for timesteps, which are in [0, 1]."""


class TensorBoardSink:
    """The curves of each expert by step (`onewan.train.curves`), frames of the sample videos, and
    at each saved state a histogram of the timesteps that each expert trained on since the one
    before."""

    label = "TensorBoard"
    required = False

    def __init__(self, folder: Path, resumed_step: int) -> None:
        """Curves of an interrupted run beyond `resumed_step`, whose steps are repeated, are
        replaced by the new ones."""
        self._folder = folder
        self._purge_step = resumed_step + 1 if resumed_step else None
        self._file: _CurveFile | None = None
        self._timesteps: dict[str, list[float]] = {}

    def write(self, event: Event) -> None:
        if isinstance(event, StepDone | Validated):
            for name, value in curve_values(event).items():
                self._write_scalar(name, value, event.step)
        if isinstance(event, StepDone):
            self._timesteps.setdefault(event.expert, []).extend(event.t)
        elif isinstance(event, Sampled):
            self._write_strip(event)
        elif isinstance(event, Saved):
            # At saved states only: a histogram of few timesteps shows nothing.
            from torch.utils.tensorboard.summary import histogram

            for expert, timesteps in self._timesteps.items():
                values = np.array(timesteps)
                self._write(histogram(f"t/{expert}", values, _HISTOGRAM_BINS), event.step)
            self._timesteps.clear()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write_scalar(self, tag: str, value: float, step: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        self._write(scalar(tag, value), step)

    def _write_strip(self, event: Sampled) -> None:
        """Write some frames of a sample video as one picture, described by its prompt."""
        # Not as an animation, for which torch's `add_video` needs moviepy.
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

        pixels = frame_strip(event.file)
        encoded = io.BytesIO()
        PIL.Image.fromarray(pixels).save(encoded, "PNG")
        height, width, colors = pixels.shape
        image = Summary.Image(
            height=height,
            width=width,
            colorspace=colors,
            encoded_image_string=encoded.getvalue(),
        )
        value = Summary.Value(
            tag=f"samples/{event.file.stem}",
            image=image,
            metadata=SummaryMetadata(summary_description=event.prompt),
        )
        self._write(Summary(value=[value]), event.step)

    def _write(self, summary: Summary, step: int) -> None:
        # Opened by the first event, so that a folder that can't be written is a failure of this
        # sink, like a later one; imported here and above because the import takes a second.
        if self._file is None:
            self._file = _CurveFile(self._folder, self._purge_step)
        self._file.write(summary=summary, step=step)


class _CurveFile:
    """One of TensorBoard's event files, written record by record.

    torch's `SummaryWriter` writes in a thread of its own. When the folder is deleted, that thread
    prints a traceback and ends, and the next call, or closing the writer, raises or waits for it.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard recognizes its files by the name, and reads them in the order of the time in
        # it. "x" instead of "w": no file of another process is overwritten.
        seconds, rest = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010}.{socket.gethostname()}.{os.getpid()}.{rest:09}"
        self._path = folder / name
        self._file = FileIO(self._path, "x")
        self._records = RecordWriter(self._file)
        self.write(file_version="brain.Event:2")
        if purge_step is not None:
            self.write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, **fields: Any) -> None:
        """Append a record with the present time. OSError if that fails, or if the file was deleted:
        writing to a deleted file raises no error by itself."""
        from tensorboard.compat.proto.event_pb2 import Event as Record

        self._path.stat()
        self._records.write(Record(wall_time=time.time(), **fields).SerializeToString())

    def close(self) -> None:
        self._file.close()
