"""`WanTransformer`: diffusers' transformer, whose blocks can be run by a runner of ours.

Without a runner it is diffusers' transformer in every respect. With one, the layers before and
after the blocks compute as in diffusers, and the runner decides how the blocks do: where their
weights come from, what is kept for the backward pass and where, and how many batches go through a
block together (`onewan.memory.block_runner`). Samplers and other programs call the transformer as
they call diffusers'.

TI2V-5B conditions on clean latent frames, the first or the last, by a timestep for each token, of
which a clip has only a few different ones. The runner's path embeds those (`frame_groups`), where
diffusers holds a modulation for each token: 2 GB per block at 121 frames of 704x1280.

Wan2.2-Fun-Control has one more layer, `ref_conv`, which embeds the latents of a reference image as
the tokens of a further frame before the clip's first one (`full_ref` in VideoX-Fun's
``videox_fun/models/wan_transformer3d.py:923-928``). diffusers does not have it, so such a
transformer always computes its ends here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from onewan.model.block_parts import BlockInputs, by_group, groups_within
from onewan.model.shared_tokens import SharedTokens, TokenSharing


class BlockRunner(Protocol):
    """Runs all blocks of a transformer."""

    def run(self, hidden: list[Tensor], inputs: Sequence[BlockInputs]) -> list[Tensor]:
        """The hidden states [B, N, d] after the last block, for each of several batches.

        `hidden` are those before the first block; the list is emptied, so that each can be freed.
        """
        ...


@dataclass(frozen=True, slots=True)
class TransformerCall:
    """The arguments of one forward pass, as diffusers' transformer takes them."""

    latents: Tensor
    """[B, C, F, H, W] noisy latents, with the condition's channels."""
    timestep: Tensor
    """[B]; or [B, N] for each token, equal in the first latent frame, in the last one and in the
    others."""
    text: Tensor
    """[B, 512, D] text embeddings, padded to 512 tokens."""
    reference: Tensor | None = None
    """[B, C, H, W] latents of a reference image, for a transformer with `ref_conv`; None: zeros, as
    in VideoX-Fun without an image. [1, C, H, W] is the same image for all samples."""


class WanTransformer(WanTransformer3DModel):
    """diffusers' Wan transformer with an optional runner of its blocks, and an optional layer for a
    reference image."""

    block_runner: BlockRunner | None = None
    reference: Tensor | None = None
    """[1, C, H, W]: the reference image of calls of `forward`, which a pipeline makes without
    one."""
    sharing: TokenSharing | None = None
    """The processes that share the tokens of what goes through `forward_batches`, for which they
    need a runner; None if this one has all tokens."""

    def add_ref_conv(self, channels: int) -> None:
        """Add `ref_conv` for reference images of `channels` latent channels, on the device and in
        the dtype of the patch embedding, with PyTorch's initial values."""
        patches = self.patch_embedding
        _, *patch = self.config["patch_size"]
        self.ref_conv = nn.Conv2d(
            channels,
            patches.out_channels,
            kernel_size=tuple(patch),
            stride=tuple(patch),
            device=patches.weight.device,
            dtype=patches.weight.dtype,
        )
        self.register_to_config(reference_channels=channels)

    @property
    def takes_reference(self) -> bool:
        """Whether there is a `ref_conv`."""
        return "ref_conv" in self._modules

    @property
    def runs_batches(self) -> bool:
        """Whether `forward_batches` computes a forward pass, and not diffusers' own."""
        is_ours = self.block_runner is not None or self.takes_reference
        return is_ours or self.sharing is not None

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """As `WanTransformer3DModel.forward`. Tokens are not shared: each process makes sample
        videos of its own."""
        if not self.runs_batches:
            return super().forward(
                hidden_states,
                timestep,  # pyright: ignore[reportArgumentType]  (their hint is wrong)
                encoder_hidden_states,
                encoder_hidden_states_image,
                return_dict,
                attention_kwargs,
            )
        if encoder_hidden_states_image is not None or attention_kwargs is not None:
            raise ValueError("Wan 2.2 has no image embeddings, and adapters are scaled elsewhere")
        call = TransformerCall(hidden_states, timestep, encoder_hidden_states, self.reference)
        (sample,) = self._forward_batches([call], None)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def forward_batches(self, calls: Sequence[TransformerCall]) -> list[Tensor]:
        """The predictions [B, C, F, H, W] of several batches. With a runner they go through each
        block together, so that its weights are brought to the device once for all of them. With
        `sharing`, all processes that share the tokens make the same calls, and all of them get the
        whole predictions."""
        return self._forward_batches(calls, self.sharing)

    def _forward_batches(
        self, calls: Sequence[TransformerCall], sharing: TokenSharing | None
    ) -> list[Tensor]:
        if sharing is not None and self.block_runner is None:
            raise ValueError("tokens are shared by processes only where blocks have a runner")
        hidden: list[Tensor] = []
        embedded = [self._embed(call, hidden, sharing) for call in calls]
        inputs = [inputs for _, inputs in embedded]
        last = self._through_blocks(hidden, inputs)
        return [
            self._unpatchify(states, time, inputs, call.latents)
            for states, (time, inputs), call in zip(last, embedded, calls, strict=True)
        ]

    def _through_blocks(self, hidden: list[Tensor], inputs: list[BlockInputs]) -> list[Tensor]:
        if self.block_runner is not None:
            return self.block_runner.run(hidden, inputs)
        states = list(hidden)
        for block in self.blocks:
            states = [
                block(s, i.text, i.time[:, 0], i.rotary)
                for s, i in zip(states, inputs, strict=True)
            ]
        return states

    def _reference_tokens(self, call: TransformerCall) -> Tensor:
        """[B, rows * columns, d]: the tokens of the reference image."""
        batch, _, _, height, width = call.latents.shape
        image = call.reference
        if image is None:
            channels = self.ref_conv.in_channels
            image = call.latents.new_zeros(1, channels, height, width)
        return self.ref_conv(image).flatten(2).transpose(1, 2).expand(batch, -1, -1)

    def _tokens(self, call: TransformerCall) -> Tensor:
        """The hidden states of the first block. A method of its own: what it computes on the way is
        as large as the result, and would be held while the text and the timesteps are embedded."""
        tokens = self.patch_embedding(call.latents).flatten(2).transpose(1, 2)
        if self.takes_reference:
            if call.timestep.ndim == 2:
                raise ValueError("a transformer with ref_conv takes one timestep for each sample")
            tokens = torch.cat([self._reference_tokens(call).to(tokens), tokens], dim=1)
        return tokens.contiguous()

    def _embed(
        self, call: TransformerCall, states: list[Tensor], sharing: TokenSharing | None
    ) -> tuple[Tensor, BlockInputs]:
        """(time embedding [B, T, d], inputs of all blocks); appends the hidden states of the first
        block to `states`."""
        latents = call.latents
        _, rows, columns = self.config["patch_size"]
        per_frame = (latents.shape[3] // rows) * (latents.shape[4] // columns)
        states.append(self._tokens(call))
        shared = None if sharing is None else sharing.of(states[-1].shape[1])
        if shared is not None:
            states[-1] = states[-1][:, _slice(shared)].clone()  # the others' are freed
        frames = latents.shape[2] + self.takes_reference
        # Positions follow from the shape alone; a reference image is at frame 0.
        rotated = latents[:, :, :1].expand(-1, -1, frames, -1, -1)
        timestep, groups = call.timestep, tuple[int, ...]()
        if timestep.ndim == 2:
            groups = frame_groups(latents.shape[2], per_frame)
            timestep = torch.stack([part[:, 0] for part in timestep.split(groups, dim=1)], dim=1)
        count = len(groups) or None
        time, modulation, text, _ = self.condition_embedder(
            timestep.flatten(), call.text, None, timestep_seq_len=count
        )
        if count is None:
            time, modulation = time[:, None], modulation[:, None]
        cos, sin = self.rope(rotated)
        if shared is not None:
            cos, sin = cos[:, _slice(shared)], sin[:, _slice(shared)]
            groups = groups_within(groups, shared.own)
        inputs = BlockInputs(
            text=text,
            time=modulation.unflatten(2, (6, -1)),
            groups=groups,
            rotary=_without_base((cos, sin)),
            frames=frames,
            shared=shared,
        )
        return time, inputs

    def _unpatchify(
        self, hidden_BNd: Tensor, time_BTd: Tensor, inputs: BlockInputs, latents: Tensor
    ) -> Tensor:
        table = self.scale_shift_table[:, None] + time_BTd[:, :, None]
        shift, scale = (chunk.squeeze(2) for chunk in table.chunk(2, dim=2))
        normed = self.norm_out(hidden_BNd.float())
        normed = by_group(
            normed, inputs.groups, lambda part, of: part * (1 + scale[:, of]) + shift[:, of]
        )
        if self.takes_reference and inputs.shared is None:
            normed = normed[:, normed.shape[1] // inputs.frames :]
        patches = self.proj_out(normed.type_as(hidden_BNd))
        if inputs.shared is not None:
            patches = inputs.shared.gathered(patches)
            if self.takes_reference:
                patches = patches[:, patches.shape[1] // inputs.frames :]
        frames, rows, columns = self.config["patch_size"]
        batch, _, f, h, w = latents.shape
        grid = patches.reshape(
            batch, f // frames, h // rows, w // columns, frames, rows, columns, -1
        )
        return grid.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _without_base(rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    # Views of a [F, h, w, D] tensor: code that is compiled for one with F = w would not be used for
    # others.
    cos, sin = rotary
    return cos.clone(), sin.clone()


def _slice(shared: SharedTokens) -> slice:
    return slice(shared.own.start, shared.own.stop)


def frame_groups(frames: int, per_frame: int) -> tuple[int, ...]:
    """Numbers of tokens with one timestep: those of the first latent frame, of the frames between,
    and of the last one."""
    between = ((frames - 2) * per_frame,) if frames > 2 else ()
    return (per_frame, *between, per_frame) if frames > 1 else (per_frame,)
