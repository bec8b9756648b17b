"""Self-attention within each latent frame only, to train style or characters without motion, in
diffusers' own forward pass."""

from __future__ import annotations

from typing import Any

from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn


class _FrameCount:
    """Number of latent frames of the current forward pass, which diffusers does not pass to
    attention processors."""

    value = 1


class _WithinFrames:
    """An attention processor that folds frames into the batch around the one that it wraps."""

    def __init__(self, inner: Any, frames: _FrameCount) -> None:
        self._inner = inner
        self._frames = frames

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if not attn.training:
            return self._inner(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
        batch, tokens, width = hidden_states.shape
        per_frame = tokens // self._frames.value
        if rotary_emb is not None:
            # [1, F*P, 1, D] -> [B*F, P, 1, D]: each token keeps its own position
            cos, sin = (
                table.reshape(self._frames.value, per_frame, 1, -1).repeat(batch, 1, 1, 1)
                for table in rotary_emb
            )
            rotary_emb = (cos, sin)
        folded = hidden_states.reshape(batch * self._frames.value, per_frame, width)
        out = self._inner(attn, folded, encoder_hidden_states, attention_mask, rotary_emb)
        return out.reshape(batch, tokens, width)


def attend_within_frames(transformer: WanTransformer3DModel) -> None:
    """Restrict `transformer`'s self-attention to tokens of the same latent frame, in training mode.

    In evaluation mode attention spans all frames, as in the programs that use the result. Tokens
    are ordered by frame, so folding frames into the batch is exact and costs less than a mask.
    Cross-attention to the text is unchanged.
    """
    frames = _FrameCount()
    patch = transformer.config["patch_size"][0]

    # Attention processors see tokens only. With gradient checkpointing, blocks run again in the
    # backward pass, when the stored value is still that of their forward pass.
    def store_frame_count(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        latents = args[0] if args else kwargs["hidden_states"]
        frames.value = latents.shape[2] // patch

    transformer.register_forward_pre_hook(store_frame_count, with_kwargs=True)
    # Only attn1: attn2 is the cross-attention to the text.
    for module in transformer.modules():
        if isinstance(module, WanTransformerBlock):
            processor: Any = _WithinFrames(module.attn1.processor, frames)
            module.attn1.set_processor(processor)
