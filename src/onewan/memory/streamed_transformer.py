"""`StreamedTransformer`: the placement of a transformer whose blocks are streamed."""

from __future__ import annotations

from itertools import chain

from torch import Tensor, nn

from onewan.memory.block_weights import BlockWeights
from onewan.memory.residency import leaving
from onewan.memory.streaming import BlockStream
from onewan.memory.tensor_moves import TensorMoves


class StreamedTransformer:
    """A `Placement`: what is trained and what is outside of the blocks goes to the device, and the
    blocks' frozen weights come through a `BlockStream`, which several transformers share."""

    def __init__(
        self,
        transformer: nn.Module,
        weights: BlockWeights,
        stream: BlockStream,
        *,
        resident: int,
        first_trained: int = 0,
    ) -> None:
        """`weights` are those of the blocks of `transformer`, taken after everything was attached
        to it. `resident` and `first_trained`: see `BlockStream.select`."""
        self.weights = weights
        self._transformer = transformer
        self._stream = stream
        self._resident = resident
        self._first_trained = first_trained
        self._is_on_device = False
        self._moves = TensorMoves(stream.device)

    @property
    def is_ready(self) -> bool:
        return self._is_on_device and self._stream.weights is self.weights

    @property
    def resident(self) -> int:
        """The number of blocks that stay on the device. It may be changed between two passes, for
        another size of videos."""
        return self._resident

    @resident.setter
    def resident(self, count: int) -> None:
        self._resident = count
        if self.is_ready:
            self._select()

    def enter(self) -> None:
        self.weights.check_bound_to_host()
        self._moves.enter(self._others())
        self._is_on_device = True
        self._select()

    def leave(self, *, trained: bool = True) -> None:
        self._is_on_device = False
        selected = self._stream.weights
        # The buffers stay for a transformer that has been announced: they hold its blocks already.
        if selected is None or (selected is self.weights and not self._stream.is_changing):
            self._stream.release()
        self._moves.leave(leaving(self._others(), trained=trained))

    def announce(self, other: StreamedTransformer) -> None:
        """`other` is trained in the next step; called before the last backward pass of this one."""
        self._stream.announce(other.weights)

    def _select(self) -> None:
        self._stream.select(self.weights, self._resident, first_trained=self._first_trained)

    def _others(self) -> dict[str, Tensor]:
        """The tensors that are not streamed."""
        streamed = {id(tensor) for tensor in self.weights.tensors()}
        module = self._transformer
        named = chain(module.named_parameters(), module.named_buffers())
        return {name: tensor for name, tensor in named if id(tensor) not in streamed}
