"""`WeightExporter`: writes the exported weights of a run while it trains, and deletes old ones.

Weights that can't be written do not end the run: its states have them too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from onewan.errors import CheckpointError
from onewan.files import link_or_copy, remove
from onewan.parallel.ranks import first_alone
from onewan.runs import events
from onewan.runs.layout import RunLayout
from onewan.runs.log import RunLog
from onewan.train.best import base_loss
from onewan.train.export import Exportable, ExportedFile, exported_files
from onewan.train.run import Run
from onewan.train.saved_state import BestStep

_FAILURES = (OSError, SafetensorError, CheckpointError)
"""What writing a file raises where the disk is full or unmounted."""


class WeightExporter:
    """Writes the files of `weights/` in the run's folder, and reports it in `log`."""

    def __init__(self, layout: RunLayout, log: RunLog) -> None:
        self._layout = layout
        self._log = log
        self._new_best = dict[Path, int]()
        """The steps at which this process wrote the files of the best weights, by their paths."""
        self.failure = ""
        """Why the newest export failed; empty if it did not."""

    def is_complete(self, run: Run) -> bool:
        """Whether all files of the present step exist."""
        return all(file.path.exists() for file in exported_files(Exportable.of(run), self._layout))

    def export(self, run: Run) -> None:
        """Write the weights of the present step in each format that the run file names, and delete
        old ones. Weights that can't be written are reported in the log and in `failure`. All
        processes of the run call this; the first one writes, or where weights are sharded, those
        that have all weights of an expert together."""
        with first_alone(run.ranks, together=run.division.is_sharded) as takes_part:
            if takes_part:
                self._export(run)

    def _export(self, run: Run) -> None:
        self.failure = ""
        try:
            for file in exported_files(Exportable.of(run), self._layout):
                if self._new_best.get(file.best_path) == run.state.step:
                    if run.ranks.is_first:
                        link_or_copy(file.best_path, file.path)
                else:
                    self._write(run, file, file.path)
                self._tell(
                    run,
                    events.Exported(step=run.state.step, expert=file.trainable, file=file.path),
                )
            if run.ranks.is_first:
                self._delete_old(run.config.output.keep_last)
        except _FAILURES as error:
            self.failure = f"the weights of step {run.state.step} can't be exported ({error})"
            if run.ranks.is_first:
                self._log.warn(f"{self.failure}; training continues")
        self._new_best.clear()

    def export_best(self, run: Run, improved: Mapping[str, BestStep]) -> None:
        """Write the weights of the present step that are in `improved` (`best.improved_weights`)
        as the best ones, and record them in the run's state once their files are complete. To be
        called as `export`."""
        with first_alone(run.ranks, together=run.division.is_sharded) as takes_part:
            if takes_part:
                self._export_best(run, improved)

    def _export_best(self, run: Run, improved: Mapping[str, BestStep]) -> None:
        for name, best in improved.items():
            before = run.state.best_weights.copy()
            run.state.best_weights[name] = best  # the header names the loss
            try:
                for file in exported_files(Exportable.of(run), self._layout):
                    if file.weights == name:
                        self._write(run, file, file.best_path)
                        self._new_best[file.best_path] = best.step
                        self._tell(
                            run,
                            events.Exported(
                                step=best.step,
                                expert=file.trainable,
                                file=file.best_path,
                                best_loss=best.loss,
                            ),
                        )
            except _FAILURES as error:
                run.state.best_weights = before
                self._log.warn(
                    f"the best weights so far, of step {best.step}, can't be exported ({error}); "
                    "training continues"
                )

    def _write(self, run: Run, file: ExportedFile, path: Path) -> None:
        """Write a file. Where weights are sharded all processes call this, and it fails in all of
        them if it does in one."""
        notices = list[str]()
        if not run.division.is_sharded:
            notices = file.write(path)
        else:
            is_own = file.trainable in run.group.experts
            if file.trainable == "embeddings":
                is_own = run.ranks.is_first
            failure = None
            try:
                notices = file.write(path) if is_own else []
            except _FAILURES as error:
                failure = str(error)
            found = run.ranks.gathered((failure, notices))
            if failures := [failure for failure, _ in found if failure]:
                raise CheckpointError(failures[0])
            notices = [notice for _, notices in found for notice in notices]
        for notice in notices:  # usually the same for the files of later steps
            self._log.warn_once(notice, prefix=f"{path.name}: ")

    def _tell(self, run: Run, event: events.Event) -> None:
        if run.ranks.is_first:
            self._log.emit(event)

    def _delete_old(self, keep_last: int | None) -> None:
        exported = self._layout.exported()
        # Without `keep_last` the slice is empty, so that nothing is deleted.
        for step in list(exported)[: -(keep_last or len(exported))]:
            for path in exported[step]:
                try:
                    remove(path)
                # Windows deletes nothing that another program has open.
                except OSError as error:  # noqa: PERF203  (a few files)
                    self._log.warn_once(
                        f"{path}: this old export can't be deleted yet ({error.strerror}); the "
                        "next save tries again"
                    )

    def best(self, run: Run) -> Iterator[events.BestWeights]:
        """The files of the best weights, for the end of the run: of an expert, in the first format
        that the run file names."""
        shown: set[str] = set()
        for file in exported_files(Exportable.of(run), self._layout):
            best = run.state.best_weights.get(file.weights)
            if best is not None and file.weights not in shown and file.best_path.exists():
                if file.trainable != "embeddings":  # which have a file each
                    shown.add(file.weights)
                yield events.BestWeights(
                    expert=file.trainable,
                    file=file.best_path,
                    step=best.step,
                    loss=best.loss,
                    base=base_loss(run.state, file.trainable),
                    held_out=bool(run.dataset.validation_clips),
                )
